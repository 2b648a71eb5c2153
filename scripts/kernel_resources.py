"""Registers and stack of the kernels in CUDA libraries, by architecture; needs cuobjdump, not a GPU.

Stack is what a kernel spills, and frames of functions that are not inlined.

    python scripts/kernel_resources.py [LIBRARY ...]
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORST = 5  #: kernels of an architecture that are named


def find_tool(name: str) -> str:
    """A program of the CUDA toolkit, or the copy of it in Triton's package."""
    home, triton = os.environ.get("CUDA_HOME"), find_spec("triton")
    folders = [f"{home}/bin"] if home else []
    folders += os.environ.get("PATH", "").split(os.pathsep)
    if triton:
        folders += [f"{path}/backends/nvidia/bin" for path in triton.submodule_search_locations]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise SystemExit(f"{name} was not found: put it on PATH or set CUDA_HOME.")
    return found


def resources(library: Path) -> Iterator[tuple[str, str, int, int]]:
    """Architecture, mangled name, registers and stack in bytes of every kernel of a library."""
    command = [find_tool("cuobjdump"), "--dump-resource-usage", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    arch = name = ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function (\w+):", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+)", line):
            yield arch, name, int(found[1]), int(found[2])


def readable(name: str) -> str:
    """A mangled name as it is written, without parameters."""
    if shutil.which("c++filt"):
        name = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|\((?:int|bool|adamas::Mode)\)|adamas::", "", name)
    return re.sub(r"\(.*", "", name)


def main() -> None:
    folder = ROOT / "vllm_adamas" / "backends" / "cuda"
    built = [path for place in (folder, ROOT / "backends" / "cuda") for path in place.glob("*.so")]
    for library in map(Path, sys.argv[1:] or sorted(built)):
        kernels: dict[str, list[tuple[int, int, str]]] = {}
        for arch, name, registers, stack in resources(library):
            kernels.setdefault(arch, []).append((stack, registers, name))
        for arch, found in kernels.items():
            spilling = sorted((one for one in found if one[0]), reverse=True)
            most = max(registers for _, registers, _ in found)
            print(
                f"{library.name} {arch}: {len(found)} kernels, at most {most} registers, "
                f"{len(spilling)} with a stack"
            )
            for stack, registers, name in spilling[:WORST]:
                print(f"  {stack:5} bytes, {registers} registers: {readable(name)}")


if __name__ == "__main__":
    main()
