"""What the sdist, the wheel and the editable install contain, and where they put it."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from common import MODEL, ROOT

IMPORTS = """
import vllm_adamas, vllm_adamas.backends, vllm_adamas.serving, vllm_adamas.serving.launch
for module in (vllm_adamas, vllm_adamas.backends, vllm_adamas.serving):
    print(module.__file__)
"""

# What a native library may need from its host: nothing of CPython, of PyTorch, or of a CUDA runtime.
SYSTEM_LIBRARIES = "libtvm_ffi libstdc++ libm libgomp libgcc_s libc libpthread libdl librt ld-linux"
SYSTEM_SYMBOLS = re.compile(
    r"TVMFFI\w+$|_ZNK?St\w+$|\S+@+(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP)_[\w.]+$"
)
SELECT_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it fails from here on
import numpy as np, tvm_ffi
library = tvm_ffi.load_module(sys.argv[1])
library.use_isa("auto")
scores = np.array([[[3, 1, 4, 1, 5, 9, 2, 6]]], dtype=np.float32)
tokens = np.full((1, 1, 3), -1, dtype=np.int32)
lens, budgets = np.array([8], dtype=np.int32), np.array([3], dtype=np.int32)
library.select(*map(tvm_ffi.from_dlpack, (scores, lens, budgets, tokens)), 0, 0)
print(tokens.ravel().tolist())
"""


def build(kind: str, source: Path, target: Path) -> Path:
    """Builds `sdist` or `wheel` from a source folder; the one file made."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "-o", target, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (made,) = target.iterdir()
    return made


def names(archive: Path) -> list[str]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.namelist()
    with tarfile.open(archive) as sdist:
        return [member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()]


def imported_from(folder: Path, cwd: Path) -> list[Path]:
    """Where a fresh interpreter finds the packages; folder comes first on its path."""
    env = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.split()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with its compiled objects, so that builds neither disturb it nor wait."""
    copy = tmp_path_factory.mktemp("checkout") / "vllm-adamas"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "dist", "lib.*", "bdist.*")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", checkout, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


def test_sdist_carries_what_a_build_needs(sdist: Path) -> None:
    found = set(names(sdist))
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    needed = {str(path.relative_to(ROOT)) for path in sources}
    needed |= {"pyproject.toml", "setup.py", "LICENSE", "vllm_adamas/__init__.py"}
    needed |= {"backends/__init__.py", "serving/__init__.py"}
    assert needed <= found
    assert not [name for name in found if name.endswith((".so", ".o", ".pyc"))]


def test_sdist_builds_the_same_wheel(
    sdist: Path, wheel: Path, checkout: Path, tmp_path: Path
) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    (unpacked,) = tmp_path.iterdir()
    # Times survive in the archive, so the objects still count as made from these sources.
    shutil.copytree(checkout / "build" / "native", unpacked / "build" / "native")
    again = build("wheel", unpacked, tmp_path / "dist")
    assert again.name == wheel.name
    assert sorted(names(again)) == sorted(names(wheel))


def test_wheel_holds_one_package(wheel: Path) -> None:
    info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    assert {name.partition("/")[0] for name in names(wheel)} == {"vllm_adamas", info}
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{info}/top_level.txt").decode().split() == ["vllm_adamas"]


def test_wheel_holds_every_module(wheel: Path) -> None:
    rooms = {"vllm_adamas": "vllm_adamas", "backends": "vllm_adamas/backends"}
    rooms["serving"] = "vllm_adamas/serving"
    modules = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for folder, package in rooms.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert modules == {name for name in names(wheel) if name.endswith(".py")}


def test_wheel_holds_texts_and_profiles(wheel: Path) -> None:
    data = {name for name in names(wheel) if "/data/" in name or "/profiles/" in name}
    assert data == {
        "vllm_adamas/evaluate/data/alice.txt",
        "vllm_adamas/profiles/SmolLM2-135M-Instruct.json",
    }


def test_wheel_serves_every_python_version(wheel: Path) -> None:
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    assert "vllm_adamas/backends/cpu/libadamas_cpu.so" in names(wheel)


@pytest.fixture(scope="module")
def libraries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel's native libraries by device: `cpu`, and `cuda` where the build found nvcc."""
    folder = tmp_path_factory.mktemp("libraries")
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(folder, found)
    return {Path(name).parent.name: folder / name for name in found}


def test_libraries_serve_every_python_and_pytorch(libraries: dict[str, Path]) -> None:
    """They link neither, so no release of either can break them."""
    assert "cpu" in libraries
    for path in libraries.values():
        dynamic = subprocess.run(
            ["readelf", "-d", path], capture_output=True, text=True, check=True
        )
        needed = re.findall(r"NEEDED.*\[(.+?)\.so", dynamic.stdout)
        assert "libtvm_ffi" in needed
        assert {name.partition("-x86")[0] for name in needed} <= set(SYSTEM_LIBRARIES.split())
        command = ["nm", "-D", "--undefined-only", path]
        symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        required = [line.split()[1] for line in symbols.splitlines() if line.split()[0] == "U"]
        assert any(name.startswith("TVMFFI") for name in required)
        assert not [name for name in required if not SYSTEM_SYMBOLS.match(name)]


def test_libraries_compute_without_pytorch(libraries: dict[str, Path]) -> None:
    command = [sys.executable, "-c", SELECT_WITHOUT_TORCH, libraries["cpu"]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "[4, 5, 7]", done.stderr


def test_wheel_never_requires_vllm(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requirements = email.message_from_bytes(archive.read(path)).get_all("Requires-Dist")
    assert not [line for line in requirements if line.startswith("vllm") and "extra ==" not in line]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "--no-input"]
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return target


def test_installed_wheel_is_self_contained(installed: Path, tmp_path: Path) -> None:
    package = installed / "vllm_adamas"
    assert imported_from(installed, tmp_path) == [
        package / "__init__.py",
        package / "backends" / "__init__.py",
        package / "serving" / "__init__.py",
    ]
    points = metadata.Distribution.at(next(installed.glob("*.dist-info"))).entry_points
    assert {(point.group, point.name, point.value) for point in points} == {
        ("vllm.general_plugins", "adamas", "vllm_adamas.serving.plugin:register"),
        ("console_scripts", "vllm-adamas", "vllm_adamas.cli:main"),
    }


def test_the_doctor_runs_from_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    """Its own command, in an empty folder: the kernels that it tests are those of the wheel."""
    env = {**os.environ, "PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
    command = [installed / "bin" / "vllm-adamas", "doctor", "--no-timing", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    tested = json.loads(done.stdout)["self-test"]["cpu"]
    assert tested["cases"] > 0
    assert tested["failures"] == []


@pytest.mark.serve
@pytest.mark.slow
def test_a_server_runs_from_the_installed_wheel(installed: Path) -> None:
    """Its engine has loaded the wheel's kernels, and its counters show that they ran."""
    from vllm_adamas.serving.launch import Server

    env = {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    args = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "1024"]
    with Server(MODEL, "adamas", {"token_budget": 64}, args, env) as server:
        body = {"prompt": "tick " * 300, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        answer = server.post("/v1/completions", body)
        assert answer["usage"]["completion_tokens"] == 4
        assert server.metrics()["vllm:adamas_sparse_rows_total"] > 0
        loaded = [
            maps
            for process in Path("/proc").glob("[0-9]*")
            if (maps := mapped(process)) and str(installed) in maps
        ]
        assert any("libadamas_cpu" in maps for maps in loaded)


def mapped(process: Path) -> str:
    """The files that a process has mapped; nothing if it has ended or is not ours."""
    try:
        return (process / "maps").read_text()
    except OSError:
        return ""


def test_editable_install_maps_the_rooms(tmp_path: Path) -> None:
    origin = metadata.distribution("vllm-adamas").read_text("direct_url.json") or ""
    if '"editable": true' not in origin:
        pytest.skip("vllm-adamas is not an editable install here")
    assert imported_from(tmp_path, tmp_path) == [
        ROOT / "vllm_adamas" / "__init__.py",
        ROOT / "backends" / "__init__.py",
        ROOT / "serving" / "__init__.py",
    ]


COMPILER = """#!/bin/sh
# Stands for nvcc and c++: knows two GPUs, and makes empty files.
[ "$1" = --list-gpu-code ] && exec echo sm_80 sm_90
echo "$@" >> "$LOG"
while [ "$1" != -o ]; do shift; done
: > "$2"
"""


def compiled(folder: Path, archs: str | None) -> tuple[int, str, dict[str, list[str]]]:
    """Builds the native libraries with a stand-in for the compilers.

    Returns:
        The exit status, the error, and the commands by the library that they belong to.
    """
    nvcc, log = folder / "bin" / "nvcc", folder / "log"
    nvcc.parent.mkdir()
    nvcc.write_text(COMPILER)
    nvcc.chmod(0o755)
    changes = {"CUDA_HOME": str(folder), "CXX": str(nvcc), "LOG": str(log), "MAX_JOBS": "1"}
    changes |= {"ADAMAS_BUILD_CUDA": "1", "ADAMAS_CUDA_ARCHS": archs or ""}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-temp", str(folder / "temp"), "--build-lib", str(folder / "lib")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **changes}, capture_output=True, text=True
    )
    found: dict[str, list[str]] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        found.setdefault(re.search(r"temp/libadamas_(\w+)", line)[1], []).append(line)
    return done.returncode, done.stderr, found


@pytest.mark.parametrize(
    ("archs", "hopper", "others"),
    [
        (None, ["90a,code=sm_90a"], []),
        ("all", ["90a,code=sm_90a"], ["80,code=sm_80", "90,code=sm_90"]),
        ("80,86,120", [], ["80,code=[sm_80,sm_86]", "90,code=sm_120"]),
    ],
)
def test_architectures_of_cuda_code(tmp_path: Path, archs, hopper, others) -> None:
    """Hopper's, all that nvcc knows, or those that are named. Other GPUs have all kernels but the one for Hopper alone."""
    status, error, found = compiled(tmp_path, archs)
    assert status == 0, error
    for name, wanted in (("sm90", hopper), ("sm80", others)):
        commands = found.get(name, [])
        assert bool(commands) == bool(wanted)
        for command in commands:
            assert re.findall(r"-gencode=arch=compute_(\S+)", command) == wanted
            assert ("-DADAMAS_SM80" in command) == (name == "sm80")
            assert name == "sm90" or "decode_fused" not in command
        assert any("decode_split/scan.cu" in command for command in commands) == bool(wanted)


def test_architectures_without_kernels(tmp_path: Path) -> None:
    status, error, found = compiled(tmp_path, "80,75")
    assert status != 0 and not found
    assert "ADAMAS_CUDA_ARCHS=80,75 is not valid: use some of 90a, 80, 86, 89" in error
