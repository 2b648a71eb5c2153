"""``--record FILE``: what the tests that name a row of docs/compatibility.md have shown.

``@pytest.mark.supports("prefix caching")`` says that the test shows this feature, and ``@pytest.mark.refuses("MLA")`` that
it is refused. A mark may name several rows. ``{name}`` in a row stands for the parameter ``name`` of the test, and
``table=`` names another table than that of the mark. A test that adds facts to its row (``record_property``) has them recorded; of a refusal it is the
``sentence``.

The file holds the tables; they hold rows, and rows the outcome of each test, with the machine that it ran ``on``. A run
replaces the outcomes of its tests and keeps the others if they come from the same versions. With ``--collect-only`` every
outcome is ``not run``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_adamas.environment import Environment

ROOT = Path(__file__).parents[1]
SHOWN, NOT_RECORDED, NO_TEST = "shown", "not recorded", "–"
TABLES = {"supports": "features", "refuses": "refused"}  #: by mark, if it names no other
Tests = dict[str, dict[str, Any]]  #: outcome, device and facts, by test
Tables = dict[str, dict[str, Tests]]  #: by table and row


def rows_of(item: pytest.Item) -> list[tuple[str, str]]:
    """Tables and rows that a test names."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return [
        (mark.kwargs.get("table", table), row.format(**parameters))
        for name, table in TABLES.items()
        for mark in item.iter_markers(name)
        for row in mark.args
    ]


class Recorder:
    """The plugin that writes the file."""

    def __init__(self, file: Path):
        self._file = file
        self._items: list[pytest.Item] = []
        self._shown: dict[str, dict[str, Any]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._items = [item for item in session.items if rows_of(item)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        shown: dict[str, Any] = {"outcome": report.outcome}
        if report.skipped:  # or expected to fail
            why = getattr(report, "wasxfail", None) or report.longrepr[-1]
            shown["why"] = why.removeprefix("Skipped: ")
        if facts := dict(report.user_properties):
            shown["facts"] = facts
        self._shown[report.nodeid] = shown

    def pytest_sessionfinish(self) -> None:
        here = Environment.capture(ROOT, ["transformers"])
        tables: Tables = {}
        if self._file.exists():
            known = json.loads(self._file.read_text())
            there = Environment(**known.pop("environment")).compared()
            if {**there, "device": None} == {**here.compared(), "device": None}:
                tables = known
        for rows in tables.values():
            for row in list(rows):  # a test may name other rows than before
                rows[row] = {
                    test: was for test, was in rows[row].items() if test not in self._shown
                }
                if not rows[row]:
                    del rows[row]
        for item in self._items:
            device = "gpu" if item.get_closest_marker("gpu") else "cpu"
            shown = self._shown.get(item.nodeid)
            for table, row in rows_of(item):
                tests = tables.setdefault(table, {}).setdefault(row, {})
                if shown is None:
                    tests.setdefault(item.nodeid, {"outcome": "not run", "device": device})
                else:
                    where = {"on": here.device, "date": here.date, "commit": here.commit}
                    tests[item.nodeid] = {**shown, "device": device, **where}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps({"environment": here.record(), **tables}, indent=1) + "\n")


def outcomes(marked: Tests, known: Tests, device: str) -> Tests:
    """What a record knows of those tests of a row that are for a device."""
    return {
        test: known.get(test, shown) for test, shown in marked.items() if shown["device"] == device
    }


def cell(tests: Tests) -> str:
    """What a row says of the tests that name it: the worst of their outcomes."""
    found = {shown["outcome"]: shown for shown in tests.values()}
    if "failed" in found:
        return "**failed**"
    if "not run" in found:
        return NOT_RECORDED
    if "skipped" in found:
        return f"skipped ({found['skipped']['why']})"
    return SHOWN if tests else NO_TEST


def fact(tests: Tests, name: str) -> str:
    """What the tests of a row say of a fact if all have passed; otherwise what became of them."""
    verdict = cell(tests)
    said = [str(shown["facts"][name]) for shown in tests.values() if verdict == SHOWN]
    return " ".join(dict.fromkeys(said)) or verdict


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="file that is written with what the tests showed")


def pytest_configure(config: pytest.Config) -> None:
    if (file := config.getoption("--record")) is not None:
        config.pluginmanager.register(Recorder(file))
