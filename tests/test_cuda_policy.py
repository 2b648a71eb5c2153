"""What the CUDA backend decides on the host; no GPU is needed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from cases import Case

from vllm_adamas.backends.cuda import MAX_CANDIDATES, SAMPLES, candidate_capacity, prefers_fused

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "decode_gpu.json"


def recorded() -> list[tuple[str, int, dict, dict]]:
    """Where both forms ran: its name, token sets of a KV head, the cell and its result."""
    record = json.loads(RECORD.read_text())
    heads = record["setting"]
    found = []
    for part, cells in record.items():
        if not isinstance(cells, list):
            continue
        group = 1 if part == "mha" else heads["query_heads"] // heads["kv_heads"]
        for cell in cells:
            for name, result in cell.items():
                if isinstance(result, dict) and "fused" in result:
                    sets = group if name.endswith("query_head") else 1
                    found.append((f"{part}, {name}", sets, cell, result))
    return found


def test_choice_of_the_fused_kernel_is_the_measured_one() -> None:
    """Of every cell where both forms ran, the policy takes the faster one, or loses little."""
    assert len(recorded()) > 20
    for name, sets, cell, result in recorded():
        cluster = result["fused"]["cluster"]
        fused = prefers_fused(cluster, cell["context"], sets, cell["budget"])
        assert result["runs"] == ("fused" if fused else "three"), (name, cell["context"])
        best = min(result["fused"]["us"], result["three"]["us"])
        assert result[result["runs"]]["us"] <= 1.08 * best, (name, cell["context"], cell["rows"])


@pytest.mark.parametrize("budget, fused", [(256, True), (512, False), (0.01, True), (0.5, False)])
def test_choice_follows_the_budget(budget: int | float, fused: bool) -> None:
    """The fused kernel lists every score when there are more tokens to select than groups of them."""
    params = dataclasses.replace(Case().params, token_budget=budget)
    assert prefers_fused(3, 8192, 1, params.budget(8192)) == fused


@pytest.mark.parametrize("budget", [1, 64, 2048, 100000])
def test_candidates_of_longer_contexts_are_no_fewer(budget: int) -> None:
    """A workspace that is reserved for the longest context serves every step."""
    lengths = [1, 1000, *(n + i for n, _ in SAMPLES for i in (0, 1)), 100000]
    sizes = [candidate_capacity(n, budget) for n in sorted(lengths)]
    assert sizes == sorted(sizes) and sizes[-1] <= MAX_CANDIDATES


@pytest.mark.parametrize("length, sample", SAMPLES)
@pytest.mark.parametrize("budget", [64, 256, 1024])
def test_candidates_hold_what_encode_aims_at(length: int, sample: int, budget: int) -> None:
    expected = budget * sample / length
    rank = int(expected + 6 * math.sqrt(1.5 * expected) + 3)
    most = rank + rank // 2  # that find_pivot accepts
    assert (most + 5 * math.sqrt(most)) * length / sample <= candidate_capacity(length, budget)
