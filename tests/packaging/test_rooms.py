"""The rooms of the package and who may import whom, read from the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from common import ROOT

ROOMS = {"vllm_adamas": "vllm_adamas", "backends": "vllm_adamas.backends"}
ROOMS |= {"serving": "vllm_adamas.serving"}
#: Floors from the bottom: a module imports its own floor and those below.
FLOORS = (
    r"vllm_adamas(\.(config|layout|errors|dtypes|budget|profile|identity|environment|tables|page|worker))?",
    r"vllm_adamas\.backends\b.*",
    r"vllm_adamas\.serving\b.*",
    r"vllm_adamas\.(evaluate\b.*|doctor\b.*|bench\b.*|cli)",
)
MEETS_VLLM = r"vllm_adamas\.(serving\b.*|evaluate\.(engine|forcing)|bench\.engine)"


def module_name(folder: str, file: Path) -> str:
    parts = file.relative_to(ROOT / folder).with_suffix("").parts
    return ".".join((ROOMS[folder], *(part for part in parts if part != "__init__")))


FILES = {
    module_name(folder, file): file for folder in ROOMS for file in (ROOT / folder).rglob("*.py")
}


def imports(file: Path, lazy: bool = True) -> Iterator[str]:
    """Modules that a file imports, in full; what it takes from a package that is a module counts as that.

    Args:
        lazy: also inside functions, and for type checkers.
    """
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module


def floor(module: str) -> int:
    (found,) = (i for i, pattern in enumerate(FLOORS) if re.fullmatch(pattern, module))
    return found


def test_every_module_stands_on_one_floor() -> None:
    assert len(FILES) > 40
    for module in FILES:
        floor(module)


@pytest.mark.parametrize("module", FILES)
def test_imports_lead_down(module: str) -> None:
    """Core, backends, serving, and on top the commands. `plugin` alone starts what lies above it."""
    for other in imports(FILES[module]):
        if other.partition(".")[0] == "vllm_adamas":
            assert floor(other) <= floor(module), f"{module} imports {other}"


@pytest.mark.parametrize("module", FILES)
def test_vllm_is_met_in_one_room(module: str) -> None:
    met = [other for other in imports(FILES[module]) if other.partition(".")[0] == "vllm"]
    assert not met or re.fullmatch(MEETS_VLLM, module), f"{module} imports {met}"


@pytest.mark.parametrize("module", [name for name in FILES if ".backends." in name])
def test_no_backend_imports_another(module: str) -> None:
    own = module.split(".")[2]
    for other in imports(FILES[module]):
        parts = other.split(".")
        if parts[:2] == ["vllm_adamas", "backends"] and len(parts) > 2 and own != "registry":
            shared = (ROOT / "backends" / f"{parts[2]}.py").exists()
            assert shared or parts[2] == own, f"{module} imports {other}"


def test_no_imports_go_in_a_circle() -> None:
    """Those inside functions count: they only put a circle off."""
    known = {
        module: {other for other in imports(file) if other in FILES and other != module}
        for module, file in FILES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in known[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in known:
        visit(module, ())


@pytest.mark.parametrize("module", FILES)
def test_private_names_of_vllm_stand_in_compat_alone(module: str) -> None:
    if module.endswith(".compat"):
        return
    tree = ast.parse(FILES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            private += [part for part in node.module.split(".") if part.startswith("_")]
            assert not private, f"{module} imports {private}"
        # Of an object that is not the module's own: vLLM's, or PyTorch's.
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            owner = node.value
            own = isinstance(owner, ast.Name) and owner.id in ("self", "cls")
            if not own and re.fullmatch(MEETS_VLLM, module):
                names = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
                names |= {
                    n.attr
                    for n in ast.walk(tree)
                    if isinstance(n, ast.Attribute)
                    and isinstance(n.value, ast.Name)
                    and n.value.id == "self"
                }
                assert node.attr in names, f"{module}:{node.lineno} reads .{node.attr}"


def test_a_factory_stands_apart_from_what_it_makes() -> None:
    """A function that picks one of several classes of a base stands in no module of theirs."""
    found = []
    for module, file in FILES.items():
        tree = ast.parse(file.read_text())
        classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith(("get_", "make_")):
                returns = ast.unparse(node.returns) if node.returns else ""
                found.append(f"{module}.{node.name}")
                assert returns not in classes, f"{module}.{node.name} makes {returns}"
    assert "vllm_adamas.backends.registry.get_backend" in found


def test_the_range_of_vllm_stands_once() -> None:
    """The extra for GPU hosts says in pip's words what `compat.py` says."""
    from vllm_adamas.serving.compat import VLLM_MAX, VLLM_MIN

    low, high = (".".join(map(str, version)) for version in (VLLM_MIN, VLLM_MAX))
    assert f'"vllm>={low},<{high}"' in (ROOT / "pyproject.toml").read_text()
