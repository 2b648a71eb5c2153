"""Decode: select and attend, in every form of a step that a backend has."""

import dataclasses

import pytest
import torch
from cases import (
    CASES,
    KINDS,
    TOLERANCE,
    Case,
    check_lengths_are_cut,
    check_surroundings,
    exact_weights,
    many,
    relative_error,
)
from targets import (  # noqa: F401
    Target,
    attended,
    check_decode,
    over_cases,
    over_targets,
    picked,
    target,
)

from vllm_adamas.backends.softmax import soft_cap
from vllm_adamas.budget import TokenBudget


@over_cases(forms=True)
def test_decode(target: Target, case: Case) -> None:
    batch = target.build(case)
    target.skip_unless_fits(batch)
    check_decode(target, batch)


OTHER_SOFTMAX = ("learned-sinks", "learned-sinks-extreme", "soft-cap", "soft-cap-huge")
OTHER_SOFTMAX += ("soft-cap-sinks-e4m3",)


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "block32",
        "group3",
        "d80",
        "d192",
        "d512-max",
        "fp16",
        "fp32",
        "e4m3",
        "e5m2",
        "long",
        *OTHER_SOFTMAX,
    ],
)
@pytest.mark.parametrize("over", [0, 1, 1 << 30])
@over_targets("cpu")
def test_decode_with_every_token_is_plain_attention(target: Target, name: str, over: int) -> None:
    """Against the appended keys and values themselves, never having seen a page."""
    case = dataclasses.replace(CASES[name], budgets=tuple(n + over for n in CASES[name].lengths))
    batch = target.build(case)
    ours, counted = target.decode(batch)
    params, (q_heads, _) = batch.params, case.heads
    key, value = (x.split(case.lengths) for x in batch.stored())  # R x [L, Hkv, D]
    for row, length in enumerate(case.lengths):
        if not length:
            continue
        k, v = (
            x[row].double().repeat_interleave(params.group, 1) for x in (key, value)
        )  # [L, Hq, D]
        logits = torch.einsum("hd,lhd->hl", batch.query[row].double(), k) * params.softmax_scale
        weights = exact_weights(logits, params.logits_soft_cap, params.sinks)
        exact = torch.einsum("hl,lhd->hd", weights, v)
        assert relative_error(ours[row], exact).max() <= TOLERANCE[case.dtype]
    tokens = sum(case.lengths) * q_heads
    assert counted == [0, sum(n > 0 for n in case.lengths), tokens, tokens, 0]


SUMMED = ("learned-sinks", "soft-cap-sinks", "sliding", "forced", "e4m3")
LOG_SUMS = {
    "cpu": ("plain", "group3", "d80", "fp32", "long", *SUMMED),
    "triton": ("group3-manhattan", "d80-max", "empty", *SUMMED),
    "cuda": ("plain", "mixed-kv_head", "d192", "group16", "long", *SUMMED),
}


@over_cases(forms=True, cases=picked(**LOG_SUMS))
def test_decode_returns_the_log_sum_exp(target: Target, case: Case) -> None:
    """Of the tokens that it attends to; learned sinks do not count, and the output stays the same."""
    batch = target.build(case)
    target.skip_unless_fits(batch)
    rows, heads = len(batch.lengths), batch.params.num_query_heads
    lse = torch.full((rows, heads), torch.nan, device=batch.query.device)
    ours, counted = target.decode(batch, lse=lse)
    expected = torch.full((rows, heads), -torch.inf)
    for row, head, logits, _ in attended(target.backend, batch):
        expected[row, head] = soft_cap(logits, batch.params.logits_soft_cap).logsumexp(0)
    torch.testing.assert_close(lse.cpu(), expected, rtol=1e-5, atol=1e-3)
    plain = target.decode(batch)
    assert torch.equal(ours.view(torch.uint8), plain[0].view(torch.uint8))
    assert counted == plain[1]


@over_targets("cpu", "triton", "cuda")
def test_a_log_sum_exp_of_another_shape_is_refused(target: Target) -> None:
    batch = target.build(Case((5, 3), 8, heads=(2, 1), head_size=64))
    for shape, dtype in (((2, 3), torch.float32), ((1, 2), torch.float32), ((2, 2), torch.float64)):
        with pytest.raises(ValueError, match="lse"):
            target.decode(batch, lse=torch.zeros(shape, dtype=dtype, device=batch.query.device))


@pytest.mark.parametrize("score", ["dot", "manhattan"])
@over_targets("cpu")
def test_decode_finds_the_needle(target: Target, score: str) -> None:
    """One key in 2000 is the query itself: a budget of 8 finds it, wherever it lies."""
    case = Case((2000,), 8, heads=(2, 2), dtype=torch.float32, score=score)
    for at in (0, 777, 1999):
        batch = target.build(case)
        batch.key[at] = batch.query[0]
        target.backend.append(batch.bound(target.backend), batch.key, batch.value, batch.slots)
        output, _ = target.decode(batch)
        assert relative_error(output[0], batch.value[at]).max() < 0.02


@over_targets("cpu")
def test_counters_add_up(target: Target) -> None:
    batch = target.build(Case((100, 10, 0), 32, heads=(8, 2)))
    output, stats = torch.empty_like(batch.query), torch.tensor([1, 10, 100, 1000, 5])
    target.backend.decode(batch.bound(target.backend), batch.query, batch.step(), output, stats)
    assert stats[:4].tolist() == [1 + 1, 10 + 1, 100 + 8 * 110, 1000 + 8 * (32 + 10)]
    assert stats[4] == 5 or target.may_select_again


@over_targets("cpu")
def test_decode_of_a_thousand_rows(target: Target) -> None:
    check_decode(target, target.build(many(1030)))


@over_targets("cpu", "triton", "cuda", forms=True)
def test_layers_with_budgets_of_their_own_take_turns(target: Target) -> None:
    """The layers of an engine share a backend and its workspace, and one step's rows but for the budgets."""
    batch = target.build(Case((300, 1, 65, 0), 8, heads=(2, 1), head_size=64, selection="kv_head"))
    for tokens in (8, 200, 8, 1 << 30, 60):
        layer = dataclasses.replace(
            batch,
            params=dataclasses.replace(batch.params, budget=TokenBudget(tokens)),
            budgets=batch.seq_lens.clamp(max=tokens),
        )
        target.skip_unless_fits(layer)
        check_decode(target, layer)


SURROUNDED = {"cpu": KINDS, "triton": ("group3-manhattan", "d80-max", "e4m3", "forced")}
SURROUNDED["cuda"] = (
    "plain",
    "mixed-kv_head",
    "d192",
    "e4m3",
    "forced",
    "sliding",
    "group16",
    "long",
)


@over_cases(forms=True, cases=picked(**SURROUNDED))
def test_surroundings_change_nothing(target: Target, case: Case) -> None:
    """Of scan, decode and gather."""
    batch = target.build(case)
    target.skip_unless_fits(batch)
    check_surroundings(target.backend, batch, target.decode_dtype, **target.options)


CUT = {
    f"{budget}-{window}": Case((200, 65, 300, 129, 40, 0), budget, heads=(4, 2), window=window)
    for budget in (9, 1 << 30)
    for window in (0, 100)
}


@over_cases(forms=True, cases={**picked(triton=("group2-shared", "sliding")), "cuda": CUT})
def test_lengths_are_cut(target: Target, case: Case) -> None:
    """The rows' buffers follow one another, so that what is written beyond one's end is another's."""
    batch = target.build(case)
    target.skip_unless_fits(batch)
    check_lengths_are_cut(target.backend, batch, target.decode_dtype, **target.options)
