"""Quality on a small fixed slice, through the real engine: a kernel change that costs quality fails.

The tolerances hold for other processors and batches; a wrong threshold, scale or bit is far outside.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from common import MODEL

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]
SMALL = ["--max-num-seqs", "16", "--kv-cache-gib", "0.5"]


def run(*args: str) -> str:
    command = [sys.executable, "-m", "vllm_adamas.cli", *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("calibrate") / "profile.json"
    out = run(
        "calibrate",
        str(MODEL),
        "--output",
        str(path),
        "--tokens",
        "2048",
        "--context",
        "1024",
        *SMALL,
    )
    assert "token_budget" in out
    return path  # fmt: skip


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("eval")
    slice_ = ["--context", "1024", "--windows", "4", "--steps", "24", "--tasks", "perplexity"]
    arms = ["--arms", "dot,manhattan,oracle", "--budgets", "64,128"]
    run("eval", str(MODEL), "--output", str(folder), *slice_, *arms, *SMALL)
    assert (folder / "report.md").read_text().count("| dot-64 |") == 1
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / "results.json").read_text())["cells"]
    return {name: cell["tasks"]["perplexity"] for name, cell in found.items()}


def mass(cell: dict) -> float:
    return statistics.fmean(statistics.fmean(heads) for heads in cell["mass"])


#: Attention mass kept, KL to dense, and the difference of NLL to dense, in nats per token.
MEASURED = {
    "dot-64": (0.800, 0.0622, 0.096),
    "dot-128": (0.874, 0.0280, 0.042),
    "manhattan-64": (0.714, 0.1277, 0.120),
    "manhattan-128": (0.817, 0.0533, 0.048),
}


@pytest.mark.parametrize("name", MEASURED)
def test_quality_is_what_it_was(cells: dict, name: str) -> None:
    cell, (kept, kl, loss) = cells[name], MEASURED[name]
    pairs = zip(cell["nll"], cells["dense"]["nll"], strict=True)
    found = mass(cell), statistics.fmean(cell["kl"]), statistics.fmean(a - b for a, b in pairs)
    print(name, found)
    assert abs(found[0] - kept) < 0.015
    assert abs(found[1] - kl) < 0.25 * kl
    assert found[2] < loss + 0.03


def test_scores_are_ordered(cells: dict) -> None:
    for budget in (64, 128):
        kept = [mass(cells[f"{name}-{budget}"]) for name in ("oracle", "dot", "manhattan")]
        assert kept == sorted(kept, reverse=True)
        assert all(cells[f"{name}-{budget}"]["layers"] == list(range(1, 30)) for name in ("dot",))


def test_a_profile_is_made_and_used(tmp_path: Path, profile: Path) -> None:
    """Centring and balancing keep a little more of this model's attention."""
    slice_ = ["--context", "1024", "--windows", "4", "--steps", "24", "--tasks", "perplexity"]
    arms = ["--arms", "dot,oracle", "--budgets", "64", "--profile", str(profile)]
    run("eval", str(MODEL), "--output", str(tmp_path), *slice_, *arms, *SMALL)
    found = json.loads((tmp_path / "results.json").read_text())["cells"]
    plain, centred = (
        mass(found[f"dot{which}-64"]["tasks"]["perplexity"]) for which in ("", "+profile")
    )
    assert plain + 0.005 < centred < mass(found["oracle-64"]["tasks"]["perplexity"])
