"""Every sentence that refuses something is explained in docs/troubleshooting.md, found in the sources.

A sentence is known by its first part, up to the way out. What the program fills in is written `…`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from common import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
ROOMS = ("vllm_adamas", "serving", "backends")
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
CHECKS, OPTIONS = "serving/checks.py", "vllm_adamas/config.py"
COMMON = "the adamas backend does not support "
#: Functions that return a sentence for others to raise, by module.
WRITERS = {OPTIONS: "_sentence", "serving/compat.py": "unsupported_vllm"}
WRITERS |= {"serving/loadtest/scenario.py": "_sentence"}
#: Raised as they were returned.
PASSED_ON = {"_sentence(err)", "_sentence(name, error)", "problem"}
#: Functions whose ValueErrors pydantic hands to `_sentence`, and what it writes around them.
VALIDATORS = {"_check": "adamas.{}", "_check_budget": "adamas.{}"}
VALIDATORS |= {"_number_layers": "adamas.layer_budgets=… is not valid ({})"}
WRAPPED = "adamas.…."  #: how `_sentence` passes on those of the first two


class Sentences(ast.NodeVisitor):
    """The sentences of one module.

    Args:
        name: of the module's file in the repository.
    """

    def __init__(self, name: str):
        self.name = name
        self.found: list[str] = []
        self.sites = 0  #: calls that make a sentence
        self._loops: dict[str, list[ast.expr]] = {}
        self._function = ""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self._function = self._function, node.name
        self.generic_visit(node)
        self._function = outer

    def visit_For(self, node: ast.For) -> None:
        """Knows inside a loop over literal rows what its variables stand for."""
        outer = self._loops
        if isinstance(node.target, ast.Tuple) and isinstance(node.iter, ast.Tuple):
            columns = zip(*(row.elts for row in node.iter.elts), strict=True)
            names = [variable.id for variable in node.target.elts]
            self._loops = {**outer, **dict(zip(names, columns, strict=True))}
        self.generic_visit(node)
        self._loops = outer

    def visit_Return(self, node: ast.Return) -> None:
        none = node.value is None or ast.unparse(node.value) == "None"
        if self._function == WRITERS.get(self.name) and not none:
            self.found += [text for text in self.texts(node.value) if text != WRAPPED]
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        refuses = called == "_refuse" and self.name == CHECKS
        validates = called == "ValueError" and self.name == OPTIONS
        if refuses or validates or called == "AdamasError":
            self.sites += 1
            argument = node.args[0]
            around = VALIDATORS[self._function] if validates else COMMON + "{}" if refuses else "{}"
            defines = self._function == "_refuse" and self.name == CHECKS
            if not defines and ast.unparse(argument) not in PASSED_ON:
                self.found += [around.replace("{}", text) for text in self.texts(argument)]
        self.generic_visit(node)

    def texts(self, node: ast.expr) -> list[str]:
        """The texts that an expression may give: several for the variable of a loop."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [node.value]
        assert isinstance(node, ast.JoinedStr), f"{self.name}:{node.lineno}: not a literal sentence"
        found = [""]
        for part in node.values:
            filled = isinstance(part, ast.FormattedValue)
            ends = self.filled_in(part.value) if filled else self.texts(part)
            found = [text + end for text in found for end in ends]
        return [re.sub("…+", "…", text) for text in found]

    def filled_in(self, node: ast.expr) -> list[str]:
        rows = self._loops.get(node.id, ()) if isinstance(node, ast.Name) else ()
        return [text for row in rows for text in self.texts(row)] or ["…"]


def first_part(sentence: str) -> str:
    """A sentence up to its way out, which follows a colon that is not in brackets and has words before it."""
    depth = 0
    for at, sign in enumerate(sentence):
        depth += (sign == "(") - (sign == ")")
        words = re.search(r"\w", sentence[:at])
        if not depth and (
            re.match(r"\.$", sentence[at:]) or (words and sentence[at : at + 2] in (": ", "; "))
        ):
            return sentence[:at]
    return sentence


def read(name: str, source: str) -> Sentences:
    module = Sentences(name)
    module.visit(ast.parse(source))
    return module


def raised() -> dict[str, str]:
    """The first parts of all sentences, and the file that raises each."""
    found = {}
    for file in FILES:
        name = file.relative_to(ROOT).as_posix()
        found |= {first_part(text): name for text in read(name, file.read_text()).found}
    return found


def explained() -> Iterator[str]:
    """The sentences of the page: first cells of its tables, in code, below a heading that may begin them."""
    start = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("#"):
            start = COMMON if line == f"## {COMMON.strip().capitalize()}" else ""
        elif row := re.match(r"\| (`+) ?(.*?) ?\1 \|.*\S.*\|.*\S.*\|$", line):
            yield start + row[2]


def test_every_sentence_is_explained() -> None:
    known = set(explained())
    missing = [f"| `{text}` | | | ({name})" for text, name in raised().items() if text not in known]
    assert not missing, f"rows that {PAGE.name} needs:\n" + "\n".join(missing)


def test_every_row_is_a_sentence_of_the_sources() -> None:
    rows = list(explained())
    assert len(rows) == len(set(rows))
    assert set(rows) - set(raised()) == set()


def test_every_refusal_of_the_checks_is_read() -> None:
    """As many as the text of the module has, and each gives a sentence that is not only filled in."""
    source = (ROOT / CHECKS).read_text()
    module = read(CHECKS, source)
    written = re.findall(r"(?<!def )\b(?:_refuse|AdamasError)\(", source)
    assert len(module.found) == len(written) - 1 == module.sites - 1 > 40  # one stands in `_refuse`
    assert all(re.search(r"\w{3}", text.removeprefix(COMMON)) for text in module.found)


def test_no_error_has_another_name() -> None:
    for file in FILES:
        other = r"import .*AdamasError as |\(AdamasError\):|= AdamasError\n"
        assert not re.search(other, file.read_text()), file


def test_a_new_refusal_is_found() -> None:
    source = """
def _check(config):
    for wanted, what in ((a, "sinks"), (b, f"{c} heads")):
        if wanted:
            raise AdamasError(f"no {what} (a: b) {x}{y}: drop --flag.")
    _refuse(f"layers of {kind}", "another backend")
    raise AdamasError(f"{file}: {problem}: correct it.")
"""
    assert list(map(first_part, read(CHECKS, source).found)) == [
        "no sinks (a: b) …",
        "no … heads (a: b) …",
        f"{COMMON}layers of …",
        "…: …: correct it",
    ]


@pytest.mark.parametrize("argument", ["sentence", "'a' + b", "str(error)"])
def test_a_sentence_that_cannot_be_read_fails(argument: str) -> None:
    with pytest.raises(AssertionError, match="not a literal sentence"):
        read("serving/any.py", f"raise AdamasError({argument})")
