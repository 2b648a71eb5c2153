"""The process of the engines, and the record of what was shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from common import ROOT
from engines import Engines

from vllm_adamas.environment import Environment


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="file that is written with what the tests showed")


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    with Engines() as process:
        yield process


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Iterator[dict[str, dict]]:
    """Rows of the support tables: a test adds one at its end.

    ``--record`` keeps the other rows of its file if they come from the same device and versions.
    """
    shown: dict[str, dict] = {"models": {}, "features": {}, "refused": {}}
    yield shown
    if (file := request.config.getoption("--record", None)) is None:
        return
    here = Environment.capture(ROOT, ["transformers"])
    if file.exists():
        known = json.loads(file.read_text())
        if Environment(**known["environment"]).compared() == here.compared():
            shown = {table: {**known.get(table, {}), **rows} for table, rows in shown.items()}
    file.write_text(json.dumps({"environment": here.record(), **shown}, indent=1) + "\n")
