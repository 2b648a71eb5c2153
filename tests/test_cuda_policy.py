"""What the CUDA backend decides and refuses on the host; no GPU is needed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from cases import Batch, Case
from common import refused

from vllm_adamas.backends.cuda import backend as cuda
from vllm_adamas.backends.cuda.backend import (
    MAX_BLOCK,
    MAX_CANDIDATES,
    MAX_CONTEXT,
    MAX_ROWS,
    MAX_STEP,
    SAMPLES,
    candidate_capacity,
    prefers_fused,
)
from vllm_adamas.backends.reference import ReferenceBackend
from vllm_adamas.budget import TokenBudget
from vllm_adamas.errors import AdamasError
from vllm_adamas.layout import PageLayout

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


#: The cell that the policy is known to miss, and by how much: (part and result, context, rows, budget)
MISSED = {("budgets, dot query_head", 32768, 1, 1024): 1.09}


def test_choice_of_the_fused_kernel_is_the_measured_one() -> None:
    """Of every cell where both forms ran, the policy takes the faster one, or loses little."""
    assert len(recorded()) > 20
    for name, sets, cell, result in recorded():
        where = (name, cell["context"], cell["rows"], cell["budget"])
        cluster = result["fused"]["cluster"]
        fused = prefers_fused(cluster, cell["context"], sets, cell["budget"])
        assert result["runs"] == ("fused" if fused else "three"), where
        best = min(result["fused"]["us"], result["three"]["us"])
        assert result[result["runs"]]["us"] <= MISSED.get(where, 1.08) * best, where


@pytest.mark.parametrize("budget, fused", [(256, True), (512, False), (0.01, True), (0.5, False)])
def test_choice_follows_the_budget(budget: int | float, fused: bool) -> None:
    """The fused kernel lists every score when there are more tokens to select than groups of them."""
    params = dataclasses.replace(Case().params, budget=TokenBudget(budget))
    assert prefers_fused(3, 8192, 1, params.budget.most(8192)) == fused


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


class Recorder:
    """Stands for the library: says what was called and computes nothing."""

    def __init__(self):
        self.called: list[str] = []

    def __getattr__(self, name: str):
        return lambda *args: self.called.append(name) or 0


@pytest.fixture
def backend(monkeypatch) -> cuda.CudaBackend:
    monkeypatch.setattr(cuda, "_library", Recorder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return cuda.CudaBackend()


@pytest.fixture
def batch() -> Batch:
    return Case((200, 64), 16, padding=0).build(ReferenceBackend())


def call(backend, batch: Batch, operation: str, **changes) -> None:
    """An operation with some of its tensors changed."""
    names = {
        "append": ("key", "value", "page", "slots"),
        "scan": ("query", "page", "block_table", "seq_lens"),
        "decode": ("query", "page", "block_table", "seq_lens", "budgets", "output", "stats"),
        "gather": ("page", "block_table", "seq_lens", "key", "value"),
    }[operation]
    tensors = {name: getattr(batch, name, None) for name in names}
    tensors |= {"output": torch.empty_like(batch.query), "stats": torch.zeros(4, dtype=torch.int64)}
    tensors |= {name: change(tensors[name]) for name, change in changes.items()}
    getattr(backend, operation)(batch.params, *(tensors[name] for name in names))


OPERATIONS = ("append", "scan", "decode", "gather")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fitting_arguments_reach_the_kernel(backend, batch, operation: str) -> None:
    call(backend, batch, operation)
    assert operation in backend._lib.called


@pytest.mark.parametrize(
    ("operations", "name", "change"),
    [
        (("append",), "slots", torch.Tensor.int),
        (("append",), "key", torch.Tensor.half),
        (("scan", "decode"), "query", torch.Tensor.half),
        (("decode",), "output", torch.Tensor.float),
        (("decode",), "budgets", torch.Tensor.long),
        (("decode",), "stats", torch.Tensor.int),
        (("scan", "decode", "gather"), "seq_lens", torch.Tensor.long),
        (("scan", "decode", "gather"), "block_table", torch.Tensor.long),
        (("scan", "decode", "gather"), "block_table", lambda table: table[:1]),
        (("append",), "value", lambda value: value.to("meta")),
        (("scan", "decode", "gather"), "block_table", lambda table: table.to("meta")),
        (("decode",), "budgets", lambda budgets: budgets.to("meta")),
        (("gather",), "key", lambda key: torch.empty(key.numel() + 1).bfloat16()[1:].view_as(key)),
    ],
)
def test_arguments_that_do_not_fit(backend, batch, operations, name: str, change) -> None:
    for operation in operations:
        with pytest.raises(ValueError, match="slot_mapping" if name == "slots" else name):
            call(backend, batch, operation, **{name: change})
        assert operation not in backend._lib.called


def test_scores_of_select_hold_the_contexts(backend, batch) -> None:
    lens, budgets = batch.seq_lens, batch.budgets
    scores = torch.zeros(2, 8, 200)
    backend.select(batch.params, scores, lens, budgets)
    for wrong in ((scores[..., :199], lens, budgets), (scores, lens.long(), budgets)):
        with pytest.raises(ValueError, match="seq_lens"):
            backend.select(batch.params, *wrong)
    with pytest.raises(ValueError, match="budgets"):
        backend.select(batch.params, scores, lens, budgets.long())


def test_contexts_are_not_longer_than_the_kernels_bitmap(backend, batch) -> None:
    backend.workspace_bytes(batch.params, 1, MAX_CONTEXT)
    for longest in (MAX_CONTEXT + 1, 2 * MAX_CONTEXT):
        with pytest.raises(AdamasError, match=f"{longest} tokens"):
            backend.workspace_bytes(batch.params, 1, longest)


def test_steps_are_not_larger_than_what_the_kernels_count(backend, batch) -> None:
    backend.workspace_bytes(batch.params, MAX_ROWS, MAX_CONTEXT)
    refused(lambda: backend.workspace_bytes(batch.params, MAX_ROWS + 1, 1), "--max-num-seqs 8192")
    most = MAX_STEP // MAX_ROWS // MAX_CONTEXT
    cuda.check_step(MAX_ROWS, most, MAX_CONTEXT)
    refused(
        lambda: cuda.check_step(MAX_ROWS, most + 1, MAX_CONTEXT), "--max-model-len", str(MAX_ROWS)
    )


def test_blocks_are_not_larger_than_what_the_kernels_divide_by(backend) -> None:
    for block_size, fits in ((MAX_BLOCK, True), (MAX_BLOCK + 16, False)):
        layout = PageLayout(64, block_size, torch.bfloat16)
        params = dataclasses.replace(Case(heads=(1, 1), head_size=64).params, layout=layout)
        if fits:
            assert backend._numbers(params)[0] == block_size
        else:
            refused(lambda p=params: backend._numbers(p), f"{block_size} tokens", "triton")


def test_lengths_beyond_the_block_table_are_not_asked_for(backend, batch) -> None:
    """A scan has as many scores as the block table has tokens; what is longer is cut on the device."""
    lens = torch.full_like(batch.seq_lens, 10**6)
    scores = backend.scan(batch.params, batch.query, batch.page, batch.block_table, lens)
    assert scores.shape[2] == batch.block_table.shape[1] * 64
