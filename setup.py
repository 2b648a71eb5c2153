"""Package layout and native libraries; everything else is in pyproject.toml.

`csrc/cpu` and each `csrc/sm<capability>` become a shared library that is loaded with `tvm_ffi.load_module`.
The library of `csrc/sm80`, for other GPUs than Hopper, is built from the sources of `csrc/sm90` as well.
The libraries do not use the CPython ABI, so one wheel serves every Python version. Objects are kept in
`build/native` (`--build-temp` names another folder). They are rebuilt when a source, a header or the
compiler's command line changes.

Environment: CXX, ADAMAS_CXX_FLAGS (added to its flags, as in `make sanitize-cpu`), CUDA_HOME, MAX_JOBS,
ADAMAS_BUILD_CUDA = auto (default: if nvcc is found), 0 or 1,
ADAMAS_CUDA_ARCHS = architectures of CUDA code, comma-separated, or all, of those in CUDA_ARCHS that nvcc knows (default:
90a, Hopper; other GPUs take Triton unless they are told otherwise).
"""

import os
import platform
import shlex
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOMS = {
    "vllm_adamas": "vllm_adamas",
    "vllm_adamas.backends": "backends",
    "vllm_adamas.serving": "serving",
}

CXX_FLAGS = "-std=c++20 -O3 -fopenmp -fPIC -fvisibility=hidden -Wall"
ISA_FLAGS = {
    "_avx2": "-mavx2 -mfma -mf16c -mbmi2 -mpopcnt",
    # GCC 12 warns about its own AVX-512 headers, hence the last two flags.
    "_avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vnni"
    " -mavx512vpopcntdq -mavx512bitalg -mf16c -mfma -mbmi2 -mpopcnt -mprefer-vector-width=512"
    " -Wno-uninitialized -Wno-maybe-uninitialized",
}
#: Architectures of CUDA code, with the one whose PTX theirs is made of.
CUDA_ARCHS = {
    "90a": "90a",  # csrc/sm90
    "80": "80",  # this one and all others: csrc/sm80
    "86": "80",
    "89": "89",  # the first with conversions of fp8
    "90": "90",  # the first with dependent launches; for tests of csrc/sm80 on Hopper
    "100": "90",
    "120": "90",
}
NVCC_FLAGS = (
    "-std=c++17 -O3 --expt-relaxed-constexpr"
    " -Xcompiler -fPIC,-fvisibility=hidden -Xfatbin -compress-all"
)


def packages() -> list[str]:
    names = []
    for package, folder in ROOMS.items():
        names += [package, *(f"{package}.{name}" for name in find_packages(folder))]
    return names


def sources(folder: str, suffix: str) -> list[str]:
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    found = sorted(Path(folder).rglob(f"*{suffix}"))
    return [str(path) for path in found if is_x86 or isa(path) is None]


def isa(source: str | Path) -> str | None:
    return next((name for name in ISA_FLAGS if Path(source).stem.endswith(name)), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def cuda_archs() -> list[str]:
    """Architectures to build, among ``CUDA_ARCHS``."""
    wanted = os.environ.get("ADAMAS_CUDA_ARCHS") or "90a"
    if wanted == "all":
        listed = subprocess.run([find_nvcc(), "--list-gpu-code"], capture_output=True, text=True)
        known = listed.stdout.split()
        # Some releases do not list those with an `a`.
        return [arch for arch in CUDA_ARCHS if arch == "90a" or f"sm_{arch}" in known]
    archs = [arch.strip() for arch in wanted.split(",")]
    if set(archs) - set(CUDA_ARCHS):
        names = ", ".join([*CUDA_ARCHS, "all"])
        raise SystemExit(f"ADAMAS_CUDA_ARCHS={wanted} is not valid: use some of {names}.")
    return archs


def cuda_sources(folder: Path, archs: list[str]) -> list[str]:
    """Sources of the library of a folder of csrc; none if it has none of the architectures."""
    if folder.name == "sm90":
        return sources(str(folder), ".cu") if "90a" in archs else []
    if set(archs) <= {"90a"}:
        return []
    shared = [path for path in sources("csrc/sm90", ".cu") if "decode_fused" not in path]
    return [*sources(str(folder), ".cu"), *shared]


def cuda_flags(library: str) -> list[str]:
    """What nvcc is told of the target of a library."""
    archs = [arch for arch in cuda_archs() if (arch == "90a") == library.endswith("_sm90")]
    codes: dict[str, list[str]] = {}
    for arch in archs:
        codes.setdefault(CUDA_ARCHS[arch], []).append(f"sm_{arch}")
    flags = []
    for ptx, made in codes.items():
        code = made[0] if len(made) == 1 else f"[{','.join(made)}]"
        flags.append(f"-gencode=arch=compute_{ptx},code={code}")
    return flags if library.endswith("_sm90") else [*flags, "-DADAMAS_SM80"]


def libraries() -> list[Extension]:
    wanted = os.environ.get("ADAMAS_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"ADAMAS_BUILD_CUDA={wanted} is not valid: use auto, 0 or 1.")
    found = {"cpu.libadamas_cpu": sources("csrc/cpu", ".cc")}
    if wanted == "1" and find_nvcc() is None:
        raise SystemExit("ADAMAS_BUILD_CUDA=1 needs nvcc: put it on PATH or set CUDA_HOME.")
    if wanted == "1" or (wanted == "auto" and find_nvcc()):
        archs = cuda_archs()
        for folder in sorted(Path("csrc").glob("sm*")):
            found[f"cuda.libadamas_{folder.name}"] = cuda_sources(folder, archs)
    return [
        Extension(f"vllm_adamas.backends.{library}", files)
        for library, files in found.items()
        if files
    ]


def run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        sentence = f"The compiler {command[0]} was not found: install it or name another in CXX."
        raise SystemExit(sentence) from None
    except subprocess.CalledProcessError:
        raise SystemExit(f"The compiler stopped with an error: {shlex.join(command)}") from None


def refresh(target: Path, newest_input: float, command: list[str]) -> None:
    """Runs the command unless it has already made the target and no input has changed since."""
    record = target.with_suffix(f"{target.suffix}.cmd")
    text = shlex.join(command)
    if (
        record.exists()
        and record.read_text() == text
        and target.exists()
        and target.stat().st_mtime > newest_input
    ):
        return
    print(f"building {target}", flush=True)
    record.unlink(missing_ok=True)
    started = time.time()
    run(command)
    # An input edited during the run counts as newer than the target.
    os.utime(target, (started, started))
    record.write_text(text)


class BuildNative(build_ext):
    """Plain compiler calls, because setuptools has no per-file flags, header tracking or nvcc."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_temp = os.path.join("build", "native")

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extension(self, ext: Extension) -> None:
        tvm_ffi = Path(find_spec("tvm_ffi").submodule_search_locations[0])
        capability = ext.name.rpartition("_sm")[2]
        if capability.isdigit():
            compiler = [find_nvcc(), *cuda_flags(ext.name), *shlex.split(NVCC_FLAGS)]
            # Static, so that the library loads with any CUDA runtime.
            link_flags = ["-cudart", "static"]
        else:
            added = os.environ.get("ADAMAS_CXX_FLAGS", "")
            compiler = shlex.split(f"{os.environ.get('CXX', 'c++')} {CXX_FLAGS} {added}")
            link_flags = []
        compiler += ["-Icsrc", f"-I{tvm_ffi / 'include'}"]
        # `__FILE__` of its headers names no folder of the building machine.
        prefix = f"-ffile-prefix-map={tvm_ffi}=tvm_ffi"
        compiler += ["-Xcompiler", prefix] if capability.isdigit() else [prefix]

        folder = Path(self.build_temp, ext.name.rpartition(".")[2])
        folder.mkdir(parents=True, exist_ok=True)
        own = ext.name.rpartition("_")[2]  # cpu, sm80 or sm90
        included = ["common", own, *(["sm90"] if own == "sm80" else [])]
        headers = [p.stat().st_mtime for name in included for p in Path("csrc", name).rglob("*.*h")]

        def compile_one(source: str) -> Path:
            target = folder / f"{Path(source).stem}.o"
            extra = shlex.split(ISA_FLAGS.get(isa(source), ""))
            newest_input = max([*headers, Path(source).stat().st_mtime])
            refresh(target, newest_input, [*compiler, *extra, "-c", source, "-o", str(target)])
            return target

        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(compile_one, ext.sources))

        library = folder / f"{folder.name}.so"
        command = [*compiler, "-shared", *link_flags, *map(str, objects), "-o", str(library)]
        # For the linker alone: nvcc would record a path that it sees itself in the library.
        command += ["-Xlinker", str(tvm_ffi / "lib" / "libtvm_ffi.so")]
        refresh(library, max(path.stat().st_mtime for path in objects), command)

        output = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(output))
        self.copy_file(str(library), output)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    packages=packages(),
    package_dir=ROOMS,
    ext_modules=libraries(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
