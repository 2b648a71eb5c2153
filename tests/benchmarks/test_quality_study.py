"""The quality study: what --merge writes, and the arm of a calibrated profile."""

import json
import sys
from pathlib import Path

import pytest
import quality
from records import RESULTS

from vllm_adamas.evaluate.study import DEFAULT

RECORD = RESULTS / "quality_SmolLM2-135M-Instruct-default.json"


def test_merged_results_get_their_report(tmp_path: Path, monkeypatch) -> None:
    args = ["quality.py", "any", "--name", "small", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*args, "--merge", str(RECORD)])
    quality.main()
    table = (tmp_path / "quality_small.md").read_text()
    cells = json.loads((tmp_path / "quality_small.json").read_text())["cells"]
    assert f"{DEFAULT}-256" in cells
    assert all(f"| {name} " in table for name in cells if name != "dense")
    if (tmp_path / "quality_small.png").exists():
        assert "![plot](quality_small.png)" in table


def test_a_calibrated_profile_is_an_arm_with_its_suggestion() -> None:
    arm = quality.calibrated("SmolLM2-135M-Instruct")
    budget = quality.profiles.load("SmolLM2-135M-Instruct").suggestion.token_budget
    assert (arm.name, arm.budget) == (f"calibrated-{budget}", budget)
    assert arm.options["profile"] == "SmolLM2-135M-Instruct"
    assert not arm.batched


def test_a_family_with_a_profile_needs_one() -> None:
    with pytest.raises(quality.AdamasError, match="--profile"):
        quality.arm(f"dot{quality.PROFILE}", 256, None)
