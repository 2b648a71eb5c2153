"""Check the vLLM names that the package uses against vLLM's sources, which are read and never imported.

    scripts/check_vllm_names.py                 the installed vLLM
    scripts/check_vllm_names.py WHEEL           another one: a wheel, or a folder that holds vllm/
    scripts/check_vllm_names.py WHEEL --record  also record its facts about these names, for the tests

Names are spelled as paths, such as ``vllm.config.VllmConfig.cache_config.block_size``: a module, a name in
it, then attributes, resolved through annotations; ``()`` is what a call returns. Attributes of values
without an annotated type are not followed. Calls must bind to the signature, overriding methods must take
what the original takes, and no abstract method may be missing.
"""

from __future__ import annotations

import argparse
import ast
import copy
import enum
import inspect
import json
import logging
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = [ROOT / "vllm_adamas", ROOT / "backends", ROOT / "serving"]
RECORD = ROOT / "tests" / "data" / "vllm_names.json"  #: facts of the newest supported release

#: Types of parameters without an annotation, by name.
PARAMETERS = {
    "vllm_config": "vllm.config.VllmConfig",
    "model_config": "vllm.config.ModelConfig",
    "attn_selector_config": "vllm.v1.attention.selector.AttentionSelectorConfig",
    "ops": "vllm._custom_ops",
    "common_attn_metadata": "vllm.v1.attention.backend.CommonAttentionMetadata",
    "spec": "vllm.v1.kv_cache_interface.AttentionSpec",
    "worker": "vllm.v1.worker.gpu_worker.Worker",
}

#: Keywords that reach a function through ``**``.
FLASH = "vllm.v1.attention.backends.fa_utils.flash_attn_varlen_func"
KEYWORDS = {
    FLASH: [
        "q",
        "out",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "seqused_k",
        "block_table",
    ]
}

#: Functions that are passed every field of a class as a keyword.
FIELDS = {
    "vllm.v1.attention.backend.AttentionBackend.validate_configuration": (
        "vllm.v1.attention.selector.AttentionSelectorConfig"
    )
}

#: Methods that vLLM calls although no base class has them, with the methods whose signatures they follow.
ALIKE = {
    "do_kv_cache_update": (
        "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.do_kv_cache_update"
    )
}

#: Classes that define the methods replaced by ``compat._wrap_classmethod``.
PATCHED = ("vllm.platforms.interface.Platform", "vllm.platforms.cpu.CpuPlatform")

#: Names that classes inherit from bases outside vLLM.
INHERITED = {*dir(object), *dir(enum.Enum), *dir(logging.Logger), "__members__", "_asdict"}


@dataclass(frozen=True)
class Found:
    """What a path resolves to: a module if ``node`` is None, else a node in it."""

    module: str
    node: ast.AST | None = None
    method: bool = False


@dataclass(frozen=True)
class Use:
    """A use of a path in the package.

    Args:
        kind: "exists", "call", "takes", "override" or "subclass".
        wanted: for a call its number of positional arguments, its keywords and whether these are all;
            for "takes" the class whose fields are passed; for an override its signature; for a subclass
            the names that it defines.
    """

    path: str
    where: str
    kind: str = "exists"
    wanted: tuple = ()


parse = cache(ast.parse)


def signature(arguments: ast.arguments, skip_first: bool) -> str:
    """A signature without annotations, and with ``...`` for every default."""
    bare = copy.deepcopy(arguments)
    for arg in [*bare.posonlyargs, *bare.args, *bare.kwonlyargs, bare.vararg, bare.kwarg]:
        if arg is not None:
            arg.annotation = None
    bare.defaults = [ast.Constant(...) for _ in bare.defaults]
    bare.kw_defaults = [default and ast.Constant(...) for default in bare.kw_defaults]
    if skip_first:
        del (bare.posonlyargs or bare.args)[0]
        del bare.defaults[: max(0, len(bare.defaults) - len(bare.posonlyargs + bare.args))]
    return f"({ast.unparse(bare)})"


def parsed(text: str) -> inspect.Signature:
    """Parses the signature at the end of a fact."""
    args = ast.parse(f"def f{text[text.index('(') :]}: ...").body[0].args
    kinds = inspect.Parameter
    places = [*args.posonlyargs, *args.args]
    required = len(places) - len(args.defaults)
    found = [
        kinds(a.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if i < required else ...)
        for i, a in enumerate(places)
    ]
    if args.vararg:
        found.append(kinds(args.vararg.arg, kinds.VAR_POSITIONAL))
    for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found.append(kinds(a.arg, kinds.KEYWORD_ONLY, default=... if default else kinds.empty))
    if args.kwarg:
        found.append(kinds(args.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)


def decorators(node: ast.FunctionDef) -> set[str]:
    """Last names of a function's decorators, such as ``abstractmethod``."""
    calls = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return {ast.unparse(d).rpartition(".")[2] for d in calls}


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a scope in order, including those under conditions."""
    for statement in body:
        yield statement
        for part in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = getattr(statement, part, [])
                for each in inner:
                    yield from statements(
                        each.body if isinstance(each, ast.ExceptHandler) else [each]
                    )


class Sources:
    """The Python files of one vLLM.

    Args:
        place: a wheel, or the folder that holds ``vllm/``.
    """

    def __init__(self, place: Path):
        self.place = place
        self._wheel = zipfile.ZipFile(place) if place.is_file() else None
        self._names = set(self._wheel.namelist()) if self._wheel else set()
        self.tree, self.find = cache(self.tree), cache(self.find)
        self._stores = cache(self._stores)
        if self.tree("vllm") is None:
            sys.exit(
                f"{place} holds no vllm package: give a wheel, or the folder of an unpacked one."
            )

    def _read(self, name: str) -> str | None:
        if self._wheel:
            return self._wheel.read(name).decode() if name in self._names else None
        file = self.place / name
        return file.read_text() if file.is_file() else None

    def tree(self, module: str) -> ast.Module | None:
        stem = module.replace(".", "/")
        text = self._read(f"{stem}.py")
        if text is None:
            text = self._read(f"{stem}/__init__.py")
        return None if text is None else parse(text)

    @cached_property
    def version(self) -> str:
        text = self._read("vllm/_version.py") or ""
        found = re.search(r"__version__ = .*?['\"]([^'\"]+)", text)
        return found[1] if found else "unknown"

    def find(self, path: str) -> Found | None:
        """What a path resolves to, or None."""
        found = None
        for part in re.findall(r"\(\)|[^.()]+", path):
            found = Found(part) if found is None else self._step(found, part)
            if found is None or (found.node is None and self.tree(found.module) is None):
                return found
        return found

    def _step(self, found: Found, name: str) -> Found | None:
        node = found.node
        if node is None:
            return self._lookup(found.module, name)
        if name == "()":
            if isinstance(node, ast.ClassDef):
                return found
            returns = getattr(node, "returns", None)
            return self._type(found.module, returns)
        if isinstance(node, ast.ClassDef):
            return self._member(found, name)
        if isinstance(node, ast.AnnAssign):
            kind = self._type(found.module, node.annotation)
        elif isinstance(node, ast.FunctionDef) and decorators(node) & {
            "property",
            "cached_property",
        }:
            kind = self._type(found.module, node.returns)
        else:
            return UNKNOWN
        return kind if kind == UNKNOWN else self._step(kind, name)

    def _lookup(self, module: str, name: str, seen: frozenset = frozenset()) -> Found | None:
        """Resolves a name in a module by the first of its definitions that resolves."""
        tree = self.tree(module)
        if tree is None or (module, name) in seen:
            return None
        seen |= {(module, name)}
        for node in statements(tree.body):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                return Found(module, node)
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
                return Found(module, node)
            if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
                if isinstance(node.value, ast.Name):
                    return self._lookup(module, node.value.id, seen) or EXISTS
                return EXISTS
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return Found(alias.name) if self.tree(alias.name) else EXISTS
            if isinstance(node, ast.ImportFrom):
                source = self._absolute(module, node)
                for alias in node.names:
                    if name == (alias.asname or alias.name) or alias.name == "*":
                        if source.split(".")[0] != "vllm":
                            return EXISTS
                        original = name if alias.name == "*" else alias.name
                        if found := self._lookup(source, original, seen):
                            return found
        return Found(f"{module}.{name}") if self.tree(f"{module}.{name}") else None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module
        package = self._read(f"{module.replace('.', '/')}.py") is None
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _type(self, module: str, annotation: ast.AST | None) -> Found:
        """The class that an annotation names, or UNKNOWN if it is not one of vLLM's."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            return self._type(module, ast.parse(annotation.value, mode="eval").body)
        if isinstance(annotation, ast.BinOp):
            sides = [annotation.left, annotation.right]
            kinds = [self._type(module, side) for side in sides if ast.unparse(side) != "None"]
            return UNKNOWN if UNKNOWN in kinds else kinds[0]
        if isinstance(annotation, ast.Name):
            found = self._lookup(module, annotation.id)
            return found if found and isinstance(found.node, ast.ClassDef) else UNKNOWN
        return UNKNOWN

    def _member(self, cls: Found, name: str) -> Found | None:
        for node in statements(cls.node.body):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return Found(cls.module, node, "staticmethod" not in decorators(node))
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
                return Found(cls.module, node)
            if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
                return EXISTS
        if name in (stored := self._stores(cls.node)):  # set in its methods
            return Found(cls.module, stored[name]) if stored[name] else EXISTS
        for base in self._bases(cls):
            if found := self._member(base, name):
                return found
        # Set elsewhere in the module, or inherited from outside vLLM.
        return EXISTS if name in {*self._stores(self.tree(cls.module)), *INHERITED} else None

    def _bases(self, cls: Found) -> Iterator[Found]:
        """Bases of a class in vLLM."""
        for base in cls.node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base  # Generic[T]
            found = self._lookup(cls.module, base.id) if isinstance(base, ast.Name) else None
            if found and isinstance(found.node, ast.ClassDef):
                yield found

    def _stores(self, place: ast.AST) -> dict[str, ast.AnnAssign | None]:
        """Attributes that are set inside a node, with their annotations if any."""
        stored: dict[str, ast.AnnAssign | None] = {}
        for node in ast.walk(place):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                stored.setdefault(node.attr, None)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
                stored[node.target.attr] = node
        return stored

    def fact(self, path: str) -> str | None:
        """One line that describes what a path resolves to, with its signature; None if it does not."""
        found = self.find(path)
        if found is None:
            return None
        node = found.node
        if isinstance(node, ast.FunctionDef):
            if decorators(node) & {"property", "cached_property"}:
                return "property"
            return f"function{signature(node.args, found.method)}"
        return "class" if isinstance(node, ast.ClassDef) else "something"

    def constructor(self, path: str) -> str | None:
        """The fact of a path that is called: for a class, that of its constructor."""
        cls = self.find(path)
        if cls is None or not isinstance(cls.node, ast.ClassDef):
            return self.fact(path)
        return f"class{self._constructor(cls)}"

    def _constructor(self, cls: Found) -> str:
        made = self._member(cls, "__init__")
        if made and isinstance(made.node, ast.FunctionDef):
            return signature(made.node.args, True)
        fields = [node for node in cls.node.body if isinstance(node, ast.AnnAssign)]
        return f"({', '.join(ast.unparse(f.target) + ('=...' if f.value else '') for f in fields)})"

    def abstract(self, path: str) -> str:
        """The abstract methods of a class, sorted."""
        found, names, done = self.find(path), set(), set()

        def visit(cls: Found) -> None:
            for node in cls.node.body:
                if isinstance(node, ast.FunctionDef) and node.name not in done:
                    done.add(node.name)
                    if "abstractmethod" in decorators(node):
                        names.add(node.name)
            for base in self._bases(cls):
                visit(base)

        if found and isinstance(found.node, ast.ClassDef):
            visit(found)
        return " ".join(sorted(names))


UNKNOWN = Found("")  #: a value whose type is not vLLM's or not annotated; not followed
EXISTS = Found("", ast.Pass())  #: a name that exists and of which no more is known


@dataclass
class Scope:
    """Names in a scope of the package.

    Args:
        names: the vLLM path of each name.
        own: attributes of ``self`` that the package defines.
        base: path of the class's base in vLLM.
    """

    names: dict[str, str] = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    base: str | None = None

    def inner(self, **changes) -> Scope:
        return Scope(**{"names": dict(self.names), "own": self.own, "base": self.base, **changes})


class Reader:
    """Collects the uses of one file of the package."""

    def __init__(self, sources: Sources, file: Path):
        self.sources, self.file = sources, file
        self.uses: set[Use] = set()
        self.tree = ast.parse(file.read_text())
        self._scope(self.tree.body, Scope())

    def _use(self, path: str, node: ast.AST, kind: str = "exists", wanted: tuple = ()) -> None:
        place = f"{self.file.relative_to(ROOT)}:{node.lineno}"
        self.uses.add(Use(path, place, kind, wanted))

    def _scope(self, body: list[ast.stmt], scope: Scope) -> None:
        for node in statements(body):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._import(node, scope)
            elif isinstance(node, ast.ClassDef):
                self._class(node, scope)
            elif isinstance(node, ast.FunctionDef):
                self._function(node, scope)
            else:
                self._statement(node, scope)

    def _import(self, node: ast.Import | ast.ImportFrom, scope: Scope) -> None:
        source = getattr(node, "module", None)
        for alias in node.names:
            path = f"{source}.{alias.name}" if source else alias.name
            if path.split(".")[0] == "vllm":
                self._use(path, node)
                scope.names[alias.asname or alias.name] = path
            else:
                scope.names.pop(alias.asname or alias.name, None)

    def _class(self, node: ast.ClassDef, scope: Scope) -> None:
        bases = (b.value if isinstance(b, ast.Subscript) else b for b in node.bases)
        base = next(filter(None, (self._value(b, scope) for b in bases)), None)
        methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
        stored = {
            each.attr
            for each in ast.walk(node)
            if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
        }
        fields = {
            each.id
            for statement in node.body
            if isinstance(statement, (ast.Assign, ast.AnnAssign))
            for each in ast.walk(statement)
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
        }
        own = frozenset({method.name for method in methods} | stored | fields)
        if base:
            self._use(base, node, "subclass", tuple(sorted(own)))
            for name in sorted(fields):
                if self.sources.find(f"{base}.{name}"):
                    self._use(f"{base}.{name}", node)
        inner = scope.inner(own=own, base=base)
        for _ in range(2):  # what one method stores, another reads
            for method in methods:
                path = ALIKE.get(method.name) or f"{base}.{method.name}"
                if base and self.sources.find(path):
                    static = "staticmethod" in decorators(method)
                    self._use(path, method, "override", (signature(method.args, not static),))
                self._function(method, inner, share=True)
        self._scope([each for each in node.body if each not in methods], inner)

    def _function(self, node: ast.FunctionDef, scope: Scope, share: bool = False) -> None:
        inner = scope.inner()
        for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            inner.names.pop(arg.arg, None)
            path = PARAMETERS.get(arg.arg) if arg.annotation is None else None
            if path := path or self._annotated(arg.annotation, scope):
                self._use(path, node)
                inner.names[arg.arg] = path
        self._scope(node.body, inner)
        if share:
            kept = {k: v for k, v in inner.names.items() if k.startswith("self.")}
            scope.names.update(kept)

    def _annotated(self, node: ast.AST | None, scope: Scope) -> str | None:
        if isinstance(node, ast.BinOp):
            return self._annotated(node.left, scope)
        return self._value(node, scope) if isinstance(node, (ast.Name, ast.Attribute)) else None

    def _statement(self, node: ast.stmt, scope: Scope) -> None:
        blocks = ("body", "orelse", "handlers", "finalbody")
        for name, part in ast.iter_fields(node):
            for each in part if isinstance(part, list) and name not in blocks else [part]:
                if isinstance(each, ast.AST):
                    self._value(each, scope)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value, scope)

    def _assign(self, target: ast.expr, value: ast.expr, scope: Scope) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=False):
                self._assign(one, other, scope)
            return
        name, path = ast.unparse(target), self._value(value, scope)
        if path:
            scope.names[name] = path
        elif isinstance(target, ast.Name):
            scope.names.pop(name, None)

    def _value(self, node: ast.AST, scope: Scope) -> str | None:
        """The path of an expression; records the uses inside it."""
        if isinstance(node, ast.Name):
            return scope.names.get(node.id)
        if isinstance(node, ast.Attribute):
            if (whole := ast.unparse(node)) in scope.names:
                return scope.names[whole]
            if ast.unparse(node.value) == "self":
                outside = scope.base and node.attr not in scope.own
                return self._attribute(scope.base, node.attr, node) if outside else None
            return self._attribute(self._value(node.value, scope), node.attr, node)
        if isinstance(node, ast.Call):
            return self._call(node, scope)
        if isinstance(node, ast.Lambda):
            return None
        for child in ast.iter_child_nodes(node):
            self._value(child, scope)
        return None

    def _attribute(self, path: str | None, name: str, node: ast.AST) -> str | None:
        if path is None or self.sources.find(path) in (None, UNKNOWN):
            return None
        path = f"{path}.{name}"
        if self.sources.find(path) == UNKNOWN:
            return None
        self._use(path, node)
        return path

    def _call(self, node: ast.Call, scope: Scope) -> str | None:
        called = ast.unparse(node.func)
        values = [self._value(arg, scope) for arg in node.args]
        for keyword in node.keywords:
            self._value(keyword.value, scope)
        if called == "type" and len(values) == 1:
            return values[0]
        if called == "super":
            return scope.base
        if called == "getattr" and isinstance(node.args[1], ast.Constant):
            return self._attribute(values[0], node.args[1].value, node)
        if called == "dataclasses.replace" and values[0]:
            for keyword in node.keywords:
                self._use(f"{values[0]}.{keyword.arg}", node)
            return values[0]
        if called == "_wrap_classmethod":
            self._patched(node)
        path = self._value(node.func, scope)
        if path is None or self.sources.find(path) in (None, UNKNOWN):
            return None
        starred = any(isinstance(arg, ast.Starred) for arg in node.args)
        names = [keyword.arg for keyword in node.keywords if keyword.arg]
        complete = not starred and len(names) == len(node.keywords)
        number = sum(not isinstance(arg, ast.Starred) for arg in node.args)
        self._use(path, node, "call", (number, tuple(sorted(names)), complete))
        return f"{path}()"

    def _patched(self, node: ast.Call) -> None:
        name = node.args[1].value
        for made in ast.walk(self.tree):
            if isinstance(made, ast.FunctionDef) and made.name == name:
                for cls in PATCHED:
                    self._use(f"{cls}.{name}", made, "override", (signature(made.args, True),))


def collect(sources: Sources) -> list[Use]:
    """All uses of vLLM in the package; types are resolved in the given sources."""
    files = [file for folder in PACKAGE for file in sorted(folder.rglob("*.py"))]
    uses = {use for file in files for use in Reader(sources, file).uses}
    uses |= {
        Use(path, "scripts/check_vllm_names.py", "call", (0, tuple(sorted(names)), False))
        for path, names in KEYWORDS.items()
    }
    uses |= {
        Use(path, "scripts/check_vllm_names.py", "takes", (fields,))
        for path, fields in FIELDS.items()
    }
    return sorted(uses, key=lambda use: (use.where, use.path, use.kind))


def facts(uses: list[Use], sources: Sources) -> dict[str, str]:
    """Facts of all used paths in the sources; paths that do not resolve are left out."""
    found = {use.path: sources.fact(use.path) for use in uses}
    for use in uses:
        if use.kind == "call":
            found[use.path] = sources.constructor(use.path)
        if use.kind == "subclass":
            found[f"abstract {use.path}"] = sources.abstract(use.path)
        if use.kind == "takes":
            found[use.wanted[0]] = sources.constructor(use.wanted[0])
    return {path: fact for path, fact in sorted(found.items()) if fact is not None}


def problems(uses: list[Use], known: dict[str, str]) -> list[str]:
    """One line for each use that contradicts the facts."""
    lines = []
    for use in uses:
        fact = known.get(use.path)
        problem = "there is no such name" if fact is None else _problem(use, fact, known)
        if problem:
            lines.append(f"{use.where}: {use.path}: {problem}")
    return lines


def _problem(use: Use, fact: str, known: dict[str, str]) -> str | None:
    if use.kind == "subclass":
        missing = set(known[f"abstract {use.path}"].split()) - set(use.wanted)
        return f"abstract methods are missing: {', '.join(sorted(missing))}" if missing else None
    if use.kind == "exists" or "(" not in fact:
        return None
    if use.kind == "override":
        return _override_problem(use.wanted[0], fact)
    takes = parsed(fact)
    try:
        if use.kind == "takes":
            takes.bind_partial(**dict.fromkeys(parsed(known[use.wanted[0]]).parameters))
        else:
            number, names, complete = use.wanted
            bind = takes.bind if complete else takes.bind_partial
            bind(*[None] * number, **dict.fromkeys(names))
    except TypeError as error:
        return f"{error}, of {fact}"
    return None


def _override_problem(ours: str, theirs: str) -> str | None:
    mine, original = (list(parsed(text).parameters.values()) for text in (ours, theirs))
    for place, parameter in enumerate(original):
        here = mine[place] if place < len(mine) else None
        if here is None or here.name != parameter.name or here.kind != parameter.kind:
            return f"overridden as {ours}, which does not take {parameter.name} of {theirs}"
        if here.default is inspect.Parameter.empty is not parameter.default:
            return f"overridden as {ours}, where {parameter.name} has no default, unlike {theirs}"
    any_number = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    extras = [extra for extra in mine[len(original) :] if extra.kind not in any_number]
    if any(extra.default is inspect.Parameter.empty for extra in extras):
        return f"overridden as {ours}, which wants more than {theirs}"
    return None


def installed() -> Sources:
    """Sources of the vLLM in this environment, which is located without importing it."""
    spec = find_spec("vllm")
    if spec is None:
        sys.exit("vLLM is not installed: give a wheel, or a folder that holds vllm/.")
    return Sources(Path(spec.origin).parents[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("place", type=Path, nargs="?", metavar="WHEEL_OR_FOLDER")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    args = parser.parse_args()
    sources = Sources(args.place) if args.place else installed()
    uses = collect(installed())
    known = facts(uses, sources)
    wrong = problems(uses, known)
    print("\n".join(wrong))
    print(f"vLLM {sources.version}: {len(known)} names, {len(uses)} uses, {len(wrong)} problems")
    if args.record and not wrong:
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps({"version": sources.version, "names": known}, indent=1) + "\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
