"""What docs/compatibility.md says of models is what a run of these tests has shown."""

from __future__ import annotations

import json

from architectures import REFUSED, SERVED, digest
from checkpoints import QUANTISED
from common import ROOT
from test_features import FEATURES

RECORD = json.loads((ROOT / "benchmarks" / "results" / "models_cpu.json").read_text())


def test_it_has_every_model_as_it_is_tested_now() -> None:
    assert {name: row["config"] for name, row in RECORD["models"].items()} == {
        name: digest(config) for name, config in SERVED.items()
    }


def test_it_has_every_feature() -> None:
    weights = {f"{name} weights" for name in QUANTISED}
    assert RECORD["features"].keys() == FEATURES.keys() | weights | {"LoRA"}


def test_it_has_every_refusal() -> None:
    assert {name: row["config"] for name, row in RECORD["refused"].items()} == {
        name: digest(config) for name, (config, _) in REFUSED.items()
    }
