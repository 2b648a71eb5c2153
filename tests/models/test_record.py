"""The models of docs/compatibility.md were recorded as they are tested now."""

from __future__ import annotations

import json

import pytest
from architectures import REFUSED, SERVED, digest
from common import ROOT

RECORD = json.loads((ROOT / "benchmarks" / "results" / "support_cpu.json").read_text())


@pytest.mark.parametrize(
    ("table", "configs"),
    [
        ("models", SERVED),
        ("refused models", {name: config for name, (config, _) in REFUSED.items()}),
    ],
)
def test_it_has_every_model_as_it_is_tested_now(table: str, configs: dict) -> None:
    recorded = {
        name: shown["facts"]["config"]
        for name, tests in RECORD[table].items()
        for shown in tests.values()
    }
    assert recorded == {name: digest(config) for name, config in configs.items()}
