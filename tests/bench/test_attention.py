"""The timing of a layer for `vllm-adamas bench`: whose attention, over which tokens, in which order."""

from __future__ import annotations

import pytest
import torch
from cases import TOLERANCE, relative_error

from vllm_adamas.backends.cpu.backend import CpuBackend
from vllm_adamas.bench import attention
from vllm_adamas.bench.attention import ROUNDS, WARM_UP, Cells
from vllm_adamas.config import AdamasConfig
from vllm_adamas.doctor.crossover import OneLayer
from vllm_adamas.identity import Heads
from vllm_adamas.serving.dense.stock import CpuStock

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="vLLM's CPU kernels are not installed"
)
OPTIONS = {"adamas 64": {"token_budget": 64}, "adamas 128": {"token_budget": 128}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_and_copies_have_tokens_of_their_own(dtype: torch.dtype) -> None:
    configs = {name: AdamasConfig(**options) for name, options in OPTIONS.items()}
    layer = OneLayer(
        CpuBackend(), CpuStock, configs, Heads(4, 2, 64), "cpu", 400,
        rows=3, copies=2, launch=1000, dtype=dtype,
    )  # fmt: skip
    layer.grow(397)
    outputs: dict[str, list] = {}
    for copy in range(2):
        for name, call in layer.calls(copy).items():
            call()
            outputs.setdefault(name, []).append(layer.output.clone())
    stock, dense, few, more = (torch.cat(outputs[name]) for name in ("stock", "dense", *OPTIONS))
    assert stock.shape == (6, 4, 64)
    assert len(stock.flatten(1).unique(dim=0)) == 6
    assert relative_error(stock, dense).max() < 2 * TOLERANCE[dtype]
    errors = [relative_error(some, dense).mean() for some in (few, more)]
    assert errors[0] > errors[1] > 0.01, "a larger budget errs less"


def test_calls_take_turns_and_the_first_rounds_do_not_count(monkeypatch) -> None:
    cells = Cells([4, 2, 64], "bfloat16", 1000, OPTIONS)
    given = iter(range(1000))

    def watch(call) -> float:
        call()
        return float(next(given))

    cells.watch = watch
    found = cells.measure(200, 2, ["adamas 64", "adamas 128"])
    assert found["copies"] == 1
    times = found["us"]
    assert list(times) == ["stock", "adamas 64", "adamas 128"]
    assert [len(some) for some in times.values()] == [ROUNDS] * 3
    for number, row in enumerate(zip(*times.values(), strict=True), WARM_UP):
        first = 3000 * number
        forward = [first, first + 1000, first + 2000]
        assert sorted(row) == forward
        assert list(row) == forward[:: 1 if number % 2 else -1]


def test_what_does_not_fit_into_memory_is_told(monkeypatch) -> None:
    cells = Cells([4, 2, 64], "bfloat16", 1000, OPTIONS)
    size = cells._bytes(200, 2)
    assert size >= 2 * 200 * 2 * (2 * 64 * 2) * 2, "the pages and the stock cache"
    monkeypatch.setattr(attention.host, "available_memory", lambda: size)
    assert "GiB are free" in cells.measure(200, 2, ["adamas 64"])["left out"]


def test_the_cells_name_what_they_compare() -> None:
    told = Cells([4, 2, 64], "bfloat16", 1000, OPTIONS).told()
    assert told["attention"] == "CPU_ATTN"
    assert told["kernels"].startswith("cpu (")
    assert told["threads"] == torch.get_num_threads()
