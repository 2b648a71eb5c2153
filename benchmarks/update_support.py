"""Writes the tables of features and models in docs/compatibility.md, and the README's list, from what tests have shown.

    python benchmarks/update_support.py [--check]

The rows are those that the marks of the tests name today (tests/record.py). `make support` and `make support-gpu`
record what became of these tests in benchmarks/results/support_cpu.json and support_gpu.json. A cell reads *shown* only
if every test that names the row for that device has passed. With --check nothing is written; the exit status is 1
when a document differs from the records.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from records import RESULTS, load, update_document

sys.path.append(str(RESULTS.parent.parent / "tests"))
from record import NOT_RECORDED, SHOWN, Tables, Tests, cell, fact, outcomes

from vllm_adamas.tables import markdown

ROOT = RESULTS.parent.parent
DOCUMENT, README = ROOT / "docs" / "compatibility.md", ROOT / "README.md"
TESTS = ROOT / "tests"
DEVICES = {"cpu": "CPU", "gpu": "H200"}


def marked() -> Tables:
    """What the marks name, with ``device`` of each test: the record of a run that only collects."""
    marks = re.compile(r"mark\.(supports|refuses)\(")
    files = sorted(path for path in TESTS.rglob("test_*.py") if marks.search(path.read_text()))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "marked.json")
        command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "--record", file]
        done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        return json.loads(file.read_text())


def recorded(name: str) -> tuple[Tables, str]:
    """The tables of a record and what they were recorded on; no tables if there is no such record."""
    if not (RESULTS / f"{name}.json").exists():
        return {}, NOT_RECORDED
    tables, environment = load(name)
    ran = [
        test
        for table, rows in tables.items()
        if table != "environment"
        for tests in rows.values()
        for test in tests.values()
        if "on" in test
    ]
    machines = sorted({test["on"] for test in ran})
    if environment.gpu and (others := [one for one in machines if DEVICES["gpu"] not in one]):
        sys.exit(
            f"{name}.json is of {others[0]} too, and the column is that of the {DEVICES['gpu']}."
        )
    packages = ("vllm", "torch", "transformers")
    versions = ", ".join(f"{package} {environment.versions[package]}" for package in packages)
    return tables, f"{'; '.join(machines)}; {versions}; to {max(test['date'] for test in ran)}"


def names(tests: Tests) -> str:
    """Tests as documents name them, without classes and parameters."""
    found = [re.search(r"(\w+)\.py::(?:\w+::)*(\w+)", test).groups() for test in tests]
    return ", ".join(dict.fromkeys(f"`{file}::{name}`" for file, name in found))


class Matrix:
    """The rows that tests name today, with what the records know of these tests."""

    def __init__(self) -> None:
        self._marked = marked()
        self._known = {device: recorded(f"support_{device}") for device in DEVICES}

    def rows(self, table: str) -> dict[str, Tests]:
        """All tests of each row, in alphabetical order."""
        return dict(sorted(self._marked[table].items(), key=lambda row: row[0].lower()))

    def of(self, table: str, row: str, device: str = "cpu") -> Tests:
        """What the record of a device knows of a row's tests for that device."""
        known = self._known[device][0].get(table, {}).get(row, {})
        return outcomes(self._marked[table][row], known, device)

    def where(self) -> list[str]:
        return [f"- {name}: {self._known[device][1]}." for device, name in DEVICES.items()]

    def features(self) -> list[str]:
        rows = []
        for row in self.rows("features"):
            found = [self.of("features", row, device) for device in DEVICES]
            rows.append([row, *(f"{cell(tests)} {names(tests)}".strip() for tests in found)])
        return markdown(["feature", *(f"on {name}" for name in DEVICES.values())], rows)

    def refused(self) -> list[str]:
        rows = [
            [row, f"{fact(self.of('refused', row), 'sentence')} {names(tests)}"]
            for row, tests in self.rows("refused").items()
        ]
        return markdown(["refused", "in this sentence"], rows)

    def models(self) -> list[str]:
        facts = ("sparse_layers", "sparse_rows", "compared")
        rows = [
            [
                row,
                *(fact(self.of("models", row), name) for name in facts),
                fact(self.of("models", row, "gpu"), "compared"),
                fact(self.of("models", row), "tokens"),
            ]
            for row in self._marked["models"]
        ]
        refused = [
            [row, fact(self.of("refused models", row), "sentence")]
            for row in self._marked["refused models"]
        ]
        return [
            *markdown(
                [
                    "configuration",
                    "sparse layers",
                    "sparse rows",
                    *(f"same tokens, {name}" for name in DEVICES.values()),
                    "of",
                ],
                rows,
            ),
            "",
            *markdown(["refused", "in this sentence"], refused),
        ]

    def listed(self) -> list[str]:
        """The features in one sentence for each device, and what is refused."""
        features = self.rows("features")
        lines = []
        for device, name in DEVICES.items():
            shown = [row for row in features if cell(self.of("features", row, device)) == SHOWN]
            if shown:
                lines.append(f"- **Shown on {name}:** {'; '.join(shown)}.")
        refused = [row for row in self.rows("refused") if cell(self.of("refused", row)) == SHOWN]
        return [*lines, f"- **Refused by name:** {'; '.join(refused)}."]


def main() -> int:
    matrix = Matrix()
    features = [*matrix.where(), "", *matrix.features(), "", *matrix.refused()]
    return max(
        update_document(DOCUMENT, "update_support", features, matrix.models()),
        update_document(README, "update_support", matrix.listed()),
    )


if __name__ == "__main__":
    sys.exit(main())
