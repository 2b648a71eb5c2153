"""What result files say of hosts and software."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from common import ROOT

from vllm_adamas import __version__, environment, page
from vllm_adamas.environment import Environment

RECORDED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
#: Without reports, whose records name the host in words (tests/evaluate/test_findings.py).
RESULTS = [path for path in RECORDED if json.loads(path.read_text()).get("format") != page.FORMAT]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_result_files_have_the_schema(path: Path) -> None:
    result = json.loads(path.read_text())
    parts = [result, *result.get("configurations", {}).values()]
    for recorded in (part["environment"] for part in parts):
        found = Environment.model_validate(recorded)
        assert found.record() == recorded
        assert found.versions


def test_a_record_names_this_host_and_what_runs_on_it(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = Environment.capture(packages=["pytest", "no-such-package"])
    assert found.cpu
    assert found.cores >= 1
    assert found.memory_gib > 0
    assert (found.gpu, found.driver, found.commit) == (None, None, None)
    assert found.device == f"{found.cpu}, {found.cores} cores"
    assert found.versions["vllm-adamas"] == __version__
    assert found.versions["torch"] == torch.__version__
    assert found.versions["pytest"] == pytest.__version__
    assert {"python", "vllm"} <= found.versions.keys()
    assert "no-such-package" not in found.versions
    assert None not in found.record().values()


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_gpus_are_those_of_the_driver(two_gpus, monkeypatch) -> None:
    listed = "Other GPU, 580.1\nOther GPU, 580.1\n"
    monkeypatch.setattr(
        environment.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, listed)
    )
    found = Environment.capture()
    assert (found.gpu, found.num_gpus) == ("Other GPU", 2)
    assert (found.driver, found.cuda) == ("580.1", "13.0")
    assert found.device == "Other GPU"


def test_without_nvidia_smi_the_driver_is_unknown(two_gpus, monkeypatch) -> None:
    def run(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(environment.subprocess, "run", run)
    found = Environment.capture()
    assert (found.gpu, found.driver, found.cuda) == ("Some GPU", None, "13.0")
    assert "driver" not in found.record()


def test_results_are_comparable_by_device_and_main_versions() -> None:
    one = Environment(gpu="x", cores=4, versions={"torch": "1", "python": "3.11"}, date="a")
    same = Environment(gpu="x", cores=8, versions={"torch": "1", "python": "3.12"}, date="b")
    assert one.compared() == same.compared()
    other = Environment(gpu="x", versions={"torch": "2"})
    assert one.compared() != other.compared()


def test_the_commit_is_that_of_the_checkout() -> None:
    describe = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(describe, capture_output=True, text=True, cwd=ROOT)
    expected = done.stdout.strip() or None
    assert Environment.capture(checkout=ROOT).commit == expected
