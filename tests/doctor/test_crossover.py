"""The timing of one layer: what is timed is attention, and what is concluded follows from the times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import TOLERANCE, relative_error

from vllm_adamas.backends.cpu.backend import CpuBackend
from vllm_adamas.config import AdamasConfig
from vllm_adamas.doctor import crossover
from vllm_adamas.doctor.crossover import OneLayer, Timing, gains_from, suggested
from vllm_adamas.identity import Heads
from vllm_adamas.serving.dense.stock import CpuStock

on_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="vLLM's CPU kernels are not installed"
)


def times(context: int, stock: float, dense: float, sparse: float) -> Timing:
    return Timing(context, *([ms] * crossover.ROUNDS for ms in (stock, dense, sparse)))


def layer(longest: int) -> OneLayer:
    heads, config = Heads(4, 2, 64), AdamasConfig(token_budget=100)
    return OneLayer(CpuBackend(), CpuStock, {"sparse": config}, heads, "cpu", longest)


@on_cpu
def test_the_calls_compute_attention_of_the_same_tokens() -> None:
    one = layer(5000)
    for context in (300, 4999):  # more than are made at a time
        one.grow(context)
        outputs = {}
        for name, call in one.calls().items():
            call()
            outputs[name] = one.output.clone()
        assert (
            relative_error(outputs["stock"], outputs["dense"]).max() < 2 * TOLERANCE[torch.bfloat16]
        )
        assert relative_error(outputs["sparse"], outputs["dense"]).min() > 0.01


@on_cpu
def test_every_context_is_timed_in_turns() -> None:
    given = iter(range(1, 1000))

    def watch(call) -> float:
        call()
        return float(next(given))

    found = crossover.measure(layer(600), (300, 600), watch, seconds=float("inf"))
    assert [timing.context for timing in found] == [300, 600]
    first, second = found
    assert first.stock == [1.0 + 3 * n for n in range(crossover.ROUNDS)]
    assert first.sparse == [3.0 + 3 * n for n in range(crossover.ROUNDS)]
    assert second.dense[0] == 3 * crossover.ROUNDS + 2
    assert first.record()["stock_ms"] == 1 + 3 * (crossover.ROUNDS // 2)


@on_cpu
def test_contexts_that_would_take_too_long_are_left_out() -> None:
    found = crossover.measure(layer(600), (300, 600), lambda call: 1.0, seconds=-1)
    assert [timing.context for timing in found] == [300]


def test_a_stopwatch_tells_what_a_call_takes() -> None:
    called = []
    assert crossover.Stopwatch("cpu")(lambda: called.append(1)) >= 0
    assert called == [1]


@pytest.mark.parametrize(
    ("stock", "start"),
    [
        ((2.0, 2.0, 2.0), 1024),
        ((0.9, 2.0, 2.0), 2048),
        ((2.0, 0.9, 2.0), 4096),  # what is lost in between counts
        ((2.0, 2.0, 0.9), None),
        ((1.0, 1.0, 1.0), None),
    ],
)
def test_the_gain_starts_where_no_longer_context_loses(stock, start: int | None) -> None:
    contexts = (1024, 2048, 4096)
    timings = [times(n, ms, 1.0, 1.0) for n, ms in zip(contexts, stock, strict=True)]
    assert gains_from(timings, "stock") == start


def test_a_gain_holds_in_three_quarters_of_the_rounds() -> None:
    mixed = Timing(1024, [2.0] * 6 + [0.5] * 3, [1.0] * 9, [1.0] * 9)
    assert mixed.gain("stock")[1] == 2.0
    assert gains_from([mixed], "stock") is None
    assert gains_from([Timing(1024, [2.0] * 8 + [0.5], [1.0] * 9, [1.0] * 9)], "stock") == 1024
    assert crossover.is_noisy([mixed])
    assert not crossover.is_noisy([times(1024, 2.0, 1.0, 1.0)])


def test_min_context_is_where_dense_rows_stop_being_as_fast() -> None:
    losing, gaining = times(1024, 2.0, 1.0, 1.5), times(2048, 4.0, 2.0, 1.5)
    assert suggested({}, [losing, gaining]) == {"token_budget": 256, "min_context": 2048}
    assert suggested({}, [gaining]) == {"token_budget": 256}
    given = {"token_budget": 64, "num_sink_tokens": 4, "min_context": 5000}
    assert suggested(given, [losing, gaining]) == given
    assert suggested({"min_context": 9}, [losing, gaining])["min_context"] == 2048
    assert suggested({}, [times(1024, 1.0, 3.0, 2.0)]) is None
    for options in ({"token_budget": 256, "min_context": 2048}, given):
        AdamasConfig.parse(options)


def test_contexts_within_the_budget_are_not_sparse() -> None:
    def contexts(**options) -> list[int]:
        return crossover.sparse_contexts(AdamasConfig(**options))

    assert contexts() == list(crossover.CONTEXTS)
    assert contexts(token_budget=4096) == [8192, 16384, 32768]
    assert contexts(min_context=9999) == list(crossover.CONTEXTS)
    assert contexts(token_budget=1.0) == []


def test_the_largest_cache_is_swept(tmp_path: Path) -> None:
    for name, size in (("index0", "48K"), ("index2", "2048K"), ("index3", "30720K")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(f"{size}\n")
    assert crossover.last_level_cache(tmp_path) == 30 << 20
    assert crossover.last_level_cache(tmp_path / "index0") == 64 << 20
