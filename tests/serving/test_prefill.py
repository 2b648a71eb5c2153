"""Prefill over copies of contexts, a few requests at a time: fp8 pages on GPUs, every page on CPUs.

Where there is no GPU, plain PyTorch stands in for FlashAttention.
"""

import importlib.util
import sys
from itertools import pairwise

import pytest
import torch
from cases import SINKS, TOLERANCE, Case, exact_weights, relative_error

from vllm_adamas.backends.registry import get_backend
from vllm_adamas.backends.softmax import soft_cap as cap
from vllm_adamas.serving.dense.base import PrefillPlan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS, NEW = (300, 65, 200, 1, 129), (300, 5, 64, 1, 128)  #: contexts, and what of them is new
FIRST = 3  #: tokens of the step before the plan's
CASES = {
    "e4m3": Case(LENGTHS, fp8="e4m3"),
    "e5m2": Case(LENGTHS, fp8="e5m2", heads=(9, 3), head_size=64),
    "e4m3-fp16-window": Case(LENGTHS, fp8="e4m3", dtype=torch.float16, window=70),
    "bf16": Case(LENGTHS),
    "learned-sinks": Case(LENGTHS, heads=(9, 3), head_size=64, learned_sinks=SINKS),
    "soft-cap": Case(LENGTHS, heads=(8, 1), head_size=256, soft_cap=1.5),
    "soft-cap-sinks-window": Case(LENGTHS, window=70, soft_cap=1.5, learned_sinks=SINKS),
    "soft-cap-sinks-e4m3-window": Case(
        LENGTHS, fp8="e4m3", window=70, soft_cap=1.5, learned_sinks=SINKS
    ),
}


def exact(
    q, k, v, scale: float, window: int, soft_cap: float, sinks, causal: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last tokens of one context, or with ``causal=False`` of tokens behind it.

    Returns:
        float32 ``[q, Hq, D]``, and the log-sum-exp of the logits, ``[Hq, q]``.
    """
    new, length = len(q), len(k)
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    at = torch.arange(length, device=q.device)
    back = torch.arange(length - new, length, device=q.device)[:, None] - at  # [q, T]
    hidden = (
        (back < 0) | (back >= (window or length)) if causal else torch.zeros_like(back, dtype=bool)
    )
    logits = torch.einsum("qhd,thd->hqt", q.float(), k) * scale
    weights = exact_weights(logits, soft_cap, sinks, hidden).float()
    log_sum = cap(logits, soft_cap).masked_fill(hidden, -torch.inf).logsumexp(-1)
    return torch.einsum("hqt,thd->qhd", weights, v), log_sum


def expected_prefill(batch, query: torch.Tensor) -> torch.Tensor:
    """Of the plan's tokens, float32 ``[tokens, Hq, D]``."""
    params = batch.params
    k, v = (x.split(LENGTHS) for x in batch.stored())
    q = query[FIRST : FIRST + sum(NEW)].split(NEW)
    options = (params.softmax_scale, params.sliding_window, params.logits_soft_cap, params.sinks)
    return torch.cat([exact(*x, *options)[0] for x in zip(q, k, v, strict=True)])


def stand_in(
    *, q, k, v, out, cu_seqlens_q, softmax_scale, causal, window_size, softcap, s_aux, **batch
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A query without tokens gets NaN and an infinite log-sum-exp."""
    assert s_aux is None or s_aux.dtype == torch.bfloat16  # as FlashAttention does
    if "block_table" in batch:  # k, v: [blocks, N, Hkv, D]
        rows = zip(batch["block_table"], batch["seqused_k"], strict=True)
        context = [[x[table.long()].flatten(0, 1)[:n] for x in (k, v)] for table, n in rows]
    else:
        context = [[x[a:b] for x in (k, v)] for a, b in pairwise(batch["cu_seqlens_k"])]
    lse = torch.full((q.shape[1], len(q)), torch.inf)
    for (a, b), (one, two) in zip(pairwise(cu_seqlens_q), context, strict=True):
        assert b - a <= batch["max_seqlen_q"]
        assert len(one) <= batch["max_seqlen_k"]
        how = (softmax_scale, window_size[0] + 1, softcap, s_aux, causal)
        if len(one):
            out[a:b], lse[:, a:b] = exact(q[a:b], one, two, *how)
        else:
            out[a:b] = torch.nan
    return (out, lse) if batch["return_softmax_lse"] else None


@pytest.fixture
def flash(monkeypatch):
    """The module under test."""
    name = "vllm_adamas.serving.dense.flash"
    if DEVICE == "cuda":
        return importlib.import_module(name)
    from vllm.v1.attention.backends import fa_utils

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", stand_in, raising=False)
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def make_plan(batch) -> PrefillPlan:
    starts = torch.tensor([0, *NEW]).cumsum(0).int()
    return PrefillPlan(
        first_token=FIRST,
        num_tokens=sum(NEW),
        query_start_loc=starts.to(DEVICE),
        seq_lens=batch.seq_lens,
        block_table=batch.block_table,
        query_start_loc_cpu=starts + FIRST,
        seq_lens_cpu=batch.seq_lens.cpu(),
        max_query_len=max(NEW),
        max_seq_len=max(LENGTHS),
    )


@pytest.mark.parametrize(
    "held", [300, 301, 366, 10_000], ids=["one", "tight", "some", "all"]
)  # tokens in the scratch
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_flash_prefill(flash, case: Case, held: int) -> None:
    backend = get_backend("auto" if DEVICE == "cuda" else "reference", DEVICE)
    batch, dense = case.build(backend, DEVICE), flash.FlashAttention(DEVICE)
    params, plan = batch.params, make_plan(batch)
    if not case.fp8:  # FlashAttention gives what it masks a weight of zero; pages in use are finite
        params.layout.v(batch.kv_cache).nan_to_num_(0, 0, 0)
    size = dense.reserve(params, case.dtype, held)
    per_token = 2 * params.num_kv_heads * params.layout.head_size * 2
    assert size == (held * per_token if case.fp8 else 0)
    tokens = FIRST + sum(NEW) + case.padding
    query = torch.randn(tokens, *batch.query.shape[1:], device=DEVICE).to(case.dtype)
    output = torch.full_like(query, torch.nan)
    for _ in range(2):  # a second layer reuses what the first one prepared
        dense.prefill(backend, batch.bound(backend), plan, query, None, None, output)
    assert output[:FIRST].isnan().all()
    assert output[FIRST + sum(NEW) :].isnan().all()
    if case.fp8:
        assert sum(part.num_context_tokens for part in plan.prepared) == sum(LENGTHS)
        assert all(part.num_context_tokens <= held for part in plan.prepared)
        assert (len(plan.prepared) == 1) == (held >= sum(LENGTHS))
    error = relative_error(output[FIRST : FIRST + sum(NEW)], expected_prefill(batch, query))
    assert error.max() < 2 * TOLERANCE[case.dtype]


def test_decode_of_fp8_pages_is_left_to_the_kernels(flash) -> None:
    dense = flash.FlashAttention(DEVICE)
    assert dense.decodes(CASES["bf16"].params)
    assert not dense.decodes(CASES["e4m3"].params)


@pytest.mark.skipif(DEVICE == "cuda", reason="vLLM's CPU kernels are not there")
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("held", [300, 366, 10_000])
@pytest.mark.parametrize("name", ["bf16", "learned-sinks", "soft-cap", "soft-cap-sinks-window"])
def test_cpu_prefill(name: str, held: int, shared: bool) -> None:
    """Contexts are copied a few requests at a time, and nothing of those before is seen."""
    from vllm_adamas.serving.dense.cpu import CpuAttention

    torch.cpu._init_amx()  # permission from the kernel to use tiles, which a vLLM worker also asks for
    backend, dense = get_backend("cpu"), CpuAttention()
    batch = CASES[name].build(backend)
    params, plan = batch.params, make_plan(batch)
    dense.reserve(params, torch.bfloat16, held)
    k, v = (x.split(LENGTHS) for x in batch.stored())
    tokens = FIRST + sum(NEW) + 2
    query = torch.randn(tokens, *batch.query.shape[1:]).bfloat16()
    key, value = torch.randn(2, tokens, *batch.key.shape[1:]).bfloat16()
    for step, rows in ((key, k), (value, v)):
        new = [row[len(row) - n :] for row, n in zip(rows, NEW, strict=True)]
        step[FIRST : FIRST + sum(NEW)] = torch.cat(new).bfloat16()
    step = (None, None) if shared else (key, value)
    for _ in range(2):
        output = torch.full_like(query, torch.nan)
        dense.prefill(backend, batch.bound(backend), plan, query, *step, output)
        dense._cache.fill_(0xFF)  # NaN
    assert output[:FIRST].isnan().all()
    assert output[FIRST + sum(NEW) :].isnan().all()
    assert (len(plan.prepared) == 1) == (held >= sum(LENGTHS))
    largest = max(sum(-(-n // 64) for n in part.seq_lens.tolist()) for part in plan.prepared)
    kv_heads, head_size = params.num_kv_heads, params.layout.head_size
    assert dense._cache.numel() <= 1.25 * largest * 64 * 2 * kv_heads * head_size * 2
    error = relative_error(output[FIRST : FIRST + sum(NEW)], expected_prefill(batch, query))
    assert error.max() < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(DEVICE == "cuda", reason="vLLM's CPU kernels are not there")
def test_cpu_prefill_of_fp8_pages_reads_what_they_hold(monkeypatch) -> None:
    """vLLM's kernel truncates to fp8: it gets nothing that it would change."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends import cpu_attn

    from vllm_adamas.serving.dense.cpu import CpuAttention

    given = []

    def keep(keys, values, *args, **kwargs):
        given.append(torch.stack((keys, values)))

    monkeypatch.setattr(cpu_attn, "_get_attn_isa", lambda *args: "vec")
    monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", keep)
    for name in ("cpu_attn_get_scheduler_metadata", "cpu_attention_with_kv_cache"):
        monkeypatch.setattr(ops, name, lambda **kwargs: None)
    backend, dense = get_backend("cpu"), CpuAttention()
    batch = CASES["e4m3"].build(backend)
    query = torch.randn(FIRST + sum(NEW), *batch.query.shape[1:]).bfloat16()
    key, value = torch.randn(2, len(query), *batch.key.shape[1:]).bfloat16()
    args = (make_plan(batch), query, key, value, torch.empty_like(query))
    dense.reserve(batch.params, torch.bfloat16, 10_000)
    dense.prefill(backend, batch.bound(backend), *args)
    assert torch.equal(torch.cat(given, 1), torch.stack(batch.stored()).bfloat16())
