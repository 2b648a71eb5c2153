"""The tables of features say no more than tests have shown."""

import json
import re

import pytest
from common import ROOT
from record import NOT_RECORDED, Tables, cell, fact, outcomes
from test_docs import GENERATED

from vllm_adamas.environment import Environment

pytest_plugins = ["pytester"]

DOCUMENT = (ROOT / "docs" / "compatibility.md").read_text()
TEST = re.compile(r"`(test_\w+::test_\w+)`")
GPU_COLUMN = 2


def claims() -> list[str]:
    """Hand-written rows of tables that say *works*."""
    lines = GENERATED.sub("", DOCUMENT).splitlines()
    return [line for line in lines if "works" in map(str.strip, line.split("|"))]


def verdicts() -> dict[str, list[tuple[int, str]]]:
    """The generated cells that name a test, by the test: their columns and texts, which begin with the verdict."""
    found: dict[str, list[tuple[int, str]]] = {}
    for line in "".join(GENERATED.findall(DOCUMENT)).splitlines():
        for column, text in enumerate(line.strip("|").split("|")):
            for test in TEST.findall(text):
                found.setdefault(test, []).append((column, text.strip()))
    return found


def test_what_is_claimed_by_hand_was_recorded() -> None:
    """A row that says *works* names a test with a mark, and each of these has passed.

    Those for GPUs may also be without a record, as the generated tables say then.
    """
    known, wrong = verdicts(), []
    assert len(claims()) > 40
    for claim in claims():
        found = [verdict for test in TEST.findall(claim) for verdict in known.get(test, ())]
        bad = [
            text
            for column, text in found
            if text.startswith(("**failed**", "skipped"))
            or (text.startswith(NOT_RECORDED) and column < GPU_COLUMN)
        ]
        if bad or not found:
            wrong.append(f"{claim} {bad}")
    assert not wrong, "\n".join(wrong)


# The record, of these tests in a folder of their own.

TESTS = """
import pytest

@pytest.fixture
def broken():
    yield
    assert False

@pytest.mark.supports("all pass", "other")
def test_pass(): ...

@pytest.mark.supports("one fails", "other")
@pytest.mark.parametrize("n", [0, 1])
def test_one(n):
    assert n

@pytest.mark.supports("fails at its end")
def test_end(broken): ...

@pytest.mark.supports("no engine")
def test_engine(no_such_fixture): ...

@pytest.mark.supports("needs a moon")
def test_moon():
    pytest.skip("there is none")

@pytest.mark.supports("needs a moon")
def test_sun(): ...

@pytest.mark.supports("is known to fail")
@pytest.mark.xfail(reason="no moon yet")
def test_tide():
    assert False

@pytest.mark.supports("all pass on GPUs")
@pytest.mark.gpu
def test_gpu(): ...

@pytest.mark.refuses("{named[0]}", table="of their own")
@pytest.mark.parametrize("named", [("MLA", "DCP")])
def test_refused(record_property, named):
    record_property("sentence", "no.")
"""


@pytest.fixture
def record(pytester: pytest.Pytester):
    """``record(source, *arguments)``: the tables after a run over the source."""
    file = pytester.path / "record.json"

    def run(source: str, *arguments: str) -> Tables:
        pytester.makepyfile(source)
        pytester.runpytest_inprocess("-p", "record", "--record", file, *arguments)
        return json.loads(file.read_text())

    return run


def cells(marked: Tables, known: Tables, device: str) -> dict[str, str]:
    return {
        row: cell(outcomes(tests, known["features"].get(row, {}), device))
        for row, tests in marked["features"].items()
    }


def test_only_what_has_passed_is_shown(record, pytester: pytest.Pytester) -> None:
    marked = record(TESTS, "--collect-only")
    assert set(cells(marked, marked, "cpu").values()) == {"not recorded", "–"}
    (pytester.path / "record.json").unlink()
    known = record(TESTS, "-m", "not gpu")
    assert cells(marked, known, "cpu") == {
        "all pass": "shown",
        "other": "**failed**",
        "one fails": "**failed**",
        "fails at its end": "**failed**",
        "no engine": "**failed**",
        "needs a moon": "skipped (there is none)",
        "is known to fail": "skipped (no moon yet)",
        "all pass on GPUs": "–",
    }
    assert cells(marked, known, "gpu")["all pass on GPUs"] == "not recorded"
    assert cells(marked, record(TESTS), "gpu")["all pass on GPUs"] == "shown"
    refusals = marked["of their own"]["MLA"]
    assert fact(refusals, "sentence") == "not recorded"
    refusals = outcomes(refusals, known["of their own"]["MLA"], "cpu")
    assert fact(refusals, "sentence") == "no."


def test_runs_add_to_a_record_of_the_same_versions(record, monkeypatch) -> None:
    record(TESTS)
    later = TESTS.replace("assert n", "...").replace("one fails", "both pass")
    later = record(later, "-k", "test_one")
    shown = cells(later, later, "cpu")
    assert shown["both pass"] == shown["other"] == "shown"
    assert "one fails" not in shown
    assert shown["needs a moon"] == "skipped (there is none)"
    here = Environment(**later["environment"])
    there = here.model_copy(update={"cpu": "another"})
    monkeypatch.setattr(Environment, "capture", lambda *about: there)
    moved = record(TESTS, "-k", "test_pass")["features"]
    assert len(moved) > 2
    machines = {test["on"] for tests in moved.values() for test in tests.values() if "on" in test}
    assert machines == {here.device, there.device}
    newer = there.model_copy(update={"versions": {**there.versions, "vllm": "9"}})
    monkeypatch.setattr(Environment, "capture", lambda *about: newer)
    assert record(TESTS, "-k", "test_pass")["features"].keys() == {"all pass", "other"}
