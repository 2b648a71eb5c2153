"""Decode context parallelism, with ranks in one process."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from cases import TOLERANCE, Batch, Case, exact_weights, relative_error
from ranks import Group, Ranks
from targets import CudaTarget, Target, over_targets, stored_tokens, target  # noqa: F401
from test_metadata import (
    BUDGET,
    BUILD,
    RUNNERS,
    Request,
    chunk,
    decoding,
    group_of,
    in_order,
    remainder,
    usual,
)
from test_prefill import DEVICE, FIRST, LENGTHS, NEW, expected_prefill, flash, make_plan  # noqa: F401

from vllm_adamas.backends.base import COUNTERS, Backend, DecodeBatch
from vllm_adamas.backends.reference.backend import select_tokens
from vllm_adamas.backends.registry import get_backend
from vllm_adamas.serving.dense.base import SharedContext
from vllm_adamas.serving.impl import AdamasImpl
from vllm_adamas.serving.plugin import register

register()

REQUESTS = (150, 1, 90)  #: tokens of the contexts
#: Request, tokens visible to the row, budget. The first three verify drafts, the last one is padding.
ROWS = ((0, 148, 16), (0, 149, 16), (0, 150, 16), (1, 1, 16), (2, 90, 90), (2, 90, 40), (0, 0, 0))
SLACK = 3.0  #: outputs are scaled and added once more


@pytest.fixture(autouse=True)
def interpreter(monkeypatch) -> None:
    """Ranks combine what they attend to in a Triton kernel."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("interleave", [1, 4, 16])
def test_shares_are_a_context(size: int, interleave: int) -> None:
    ranks = Ranks(size, interleave)
    lens = torch.arange(200, dtype=torch.int32)
    shares = [ranks.share(rank).lens(lens) for rank in range(size)]
    assert torch.equal(sum(shares), lens)
    for rank, share in enumerate(shares):
        assert share.dtype == torch.int32
        assert share.tolist() == [len(ranks.tokens(n, rank)) for n in range(200)]
    most = [ranks.share(0).most(n) for n in range(200)]
    assert all(m >= int(max(s[n] for s in shares)) for n, m in enumerate(most))
    assert max(most) <= 200 // size + interleave


def split(backend: Backend, case: Case, whole: Batch, ranks: Ranks, rank: int) -> Batch:
    """The contexts' tokens that a rank keeps, in pages of its own."""
    kept = [ranks.tokens(n, rank) for n in case.lengths]
    own = dataclasses.replace(case, lengths=tuple(map(len, kept)))
    batch = own.build(backend, whole.kv.device)
    starts = torch.tensor([0, *case.lengths]).cumsum(0)
    tokens = torch.cat([start + at for start, at in zip(starts[:-1], kept, strict=True)])
    batch.kv[: len(tokens)] = whole.kv[tokens.to(whole.kv.device)]
    backend.append(batch.bound(backend), batch.key, batch.value, batch.slots)
    return batch


def decode(target: Target, case: Case, query: torch.Tensor, whole: Batch, ranks: Ranks):
    """``[R, Hq, D]`` of all ranks, and the sum of their counters, through :class:`AdamasImpl`."""
    request, length, budget = torch.tensor(
        ROWS, dtype=torch.int32, device=query.device
    ).T.contiguous()
    stats = torch.zeros(ranks.size, COUNTERS, dtype=torch.int64, device=query.device)
    batches = [split(target.backend, case, whole, ranks, rank) for rank in range(ranks.size)]

    def on(share) -> torch.Tensor:
        own = batches[share.rank]
        counters = SimpleNamespace(counters=lambda dense_layer: stats[share.rank])
        impl = SimpleNamespace(
            share=share,
            backend=target.backend,
            shared=SimpleNamespace(stats=counters),
            _dense=False,
            _everyone=AdamasImpl._everyone,
            _audit=lambda *kept: None,
        )
        batch = DecodeBatch(own.block_table[request.long()], share.lens(length), budget)
        params = own.params
        step = SimpleNamespace(num_decode_rows=len(ROWS), decode={params.budget: batch}, audit=None)
        mine = query.chunk(ranks.size, 1)[share.rank]
        output = torch.full_like(mine, torch.nan)
        AdamasImpl._decode(impl, own.bound(target.backend), mine, step, output)
        return output

    return torch.cat(ranks.run(on), 1), stats.sum(0).tolist()


@pytest.mark.parametrize(
    ("size", "interleave", "selection", "soft_cap"),
    [
        (2, 1, "query_head", 0),
        (2, 16, "kv_head", 1.5),
        (4, 1, "kv_head", 0),
        (2, 64, "query_head", 0),
    ],
)
@over_targets("cpu", "triton", "cuda")
def test_ranks_attend_to_what_each_of_them_selects(
    target: Target, size: int, interleave: int, selection: str, soft_cap: float
) -> None:
    """Attention over the union of the ranks' token sets, which contains the best tokens of the whole context.

    The context of one token leaves ranks without any, and interleaves of 64 leave a rank's share short.
    """
    if torch.device(target.device).type != DEVICE:
        pytest.skip("ranks combine on the GPU of this host")
    dtype = torch.float16 if isinstance(target, CudaTarget) else torch.float32
    how = {"selection": selection, "soft_cap": soft_cap, "sinks": 2, "recent": 4}
    case = Case(REQUESTS, heads=(8, 1), head_size=64, dtype=dtype, padding=0, **how)
    whole, ranks = case.build(target.backend, target.device), Ranks(size, interleave)
    g = torch.Generator().manual_seed(5)
    query = torch.randn(len(ROWS), 8, 64, generator=g).to(dtype).to(target.device)
    output, counted = decode(target, case, query, whole, ranks)
    request, length, _ = torch.tensor(ROWS, dtype=torch.int32, device=query.device).T.contiguous()
    rows = dataclasses.replace(
        whole, query=query, block_table=whole.block_table[request.long()], seq_lens=length
    )
    scores = rows.scan(target.backend).cpu()
    attended = 0
    for row, (_, n, budget) in enumerate(ROWS):
        for head in range(8):
            own = scores[row, head if selection == "query_head" else 0, :n]
            kept = [ranks.tokens(n, rank) for rank in range(size)]
            union = torch.cat([at[select_tokens(own[at], budget, 2, 4)] for at in kept])
            assert set(select_tokens(own, budget, 2, 4).tolist()) <= set(union.tolist())
            attended += len(union)
            if not n:
                assert (output[row, head] == 0).all()
                continue
            k, v = stored_tokens(rows, row, 0, union.to(query.device))
            logits = k @ query[row, head].float() * rows.params.softmax_scale
            exact = exact_weights(logits, soft_cap, None).float() @ v
            error = relative_error(output[row, head], exact)
            assert error <= SLACK * target.slack * TOLERANCE[dtype], (row, head)
    assert counted[2] == 8 * sum(n for _, n, _ in ROWS)
    assert counted[3] == attended


def test_what_a_rank_without_tokens_leaves_in_its_output_does_not_count() -> None:
    """Infinite and NaN outputs, and a log-sum-exp of either sign."""
    ranks = Ranks(2)
    value, inf = torch.tensor([2.0, 3.0], device=DEVICE), torch.inf

    def on(share) -> torch.Tensor:
        output = torch.full((3, 4, 2), torch.nan if share.rank else inf, device=DEVICE)
        lse = torch.full((3, 4), inf if share.rank else -inf, device=DEVICE)
        output[share.rank], lse[share.rank] = value, 100.0 * share.rank
        combined, total = share.combine(output, lse)
        assert total.tolist() == [[0.0] * 2, [100.0] * 2, [-inf] * 2]
        return combined

    for found in ranks.run(on):
        assert torch.equal(found, torch.stack((value, value, 0 * value))[:, None].expand(3, 2, 2))


def test_heads_are_weighted_by_what_their_ranks_have() -> None:
    """Four heads on two ranks, against the softmax over the tokens of both."""
    g = torch.Generator().manual_seed(1)
    logits, value = torch.randn(2, 3, 4, 7, generator=g), torch.randn(2, 3, 4, 7, 5, generator=g)
    logits, value = logits.to(DEVICE), value.to(DEVICE)
    outputs = (logits.softmax(-1).unsqueeze(-2) @ value).squeeze(-2)  # [N, T, H, D]
    found = Ranks(2).run(
        lambda share: share.combine(outputs[share.rank], logits[share.rank].logsumexp(-1))[0]
    )
    exact = (
        torch.cat((*logits,), -1).softmax(-1).unsqueeze(-2) @ torch.cat((*value,), -2)
    ).squeeze(-2)
    torch.testing.assert_close(torch.cat(found, 1), exact)


PREFILLED = {
    "bf16": Case(LENGTHS, heads=(8, 1), padding=0),
    "soft-cap": Case(LENGTHS, heads=(8, 1), head_size=64, soft_cap=1.5, padding=0),
    "e4m3": Case(LENGTHS, heads=(8, 1), fp8="e4m3", padding=0),
}


@pytest.mark.parametrize(("size", "interleave", "held"), [(2, 1, 80), (4, 16, 10_000)])
@pytest.mark.parametrize("case", PREFILLED.values(), ids=PREFILLED)
def test_prompts_attend_to_every_token(
    flash, case: Case, size: int, interleave: int, held: int
) -> None:
    """Prompts without, with one and with many earlier tokens; ``held`` tokens fit into the scratch."""
    backend, ranks = (
        get_backend("auto" if DEVICE == "cuda" else "reference", DEVICE),
        Ranks(size, interleave),
    )
    whole = case.build(backend, DEVICE)
    batches = [split(backend, case, whole, ranks, rank) for rank in range(size)]
    query = torch.randn(FIRST + sum(NEW), 8, case.head_size, device=DEVICE).to(case.dtype)
    new = []
    for stored in whole.stored():  # as fp8 pages hold them
        rows = zip(stored.split(LENGTHS), NEW, strict=True)
        new.append(torch.cat((stored[:FIRST], *(row[len(row) - n :] for row, n in rows))))
    key, value = (x.to(case.dtype) for x in new)

    def on(share) -> torch.Tensor:
        own = batches[share.rank]
        if not case.fp8:  # FlashAttention gives what it masks a weight of zero
            own.params.layout.v(own.kv_cache).nan_to_num_(0, 0, 0)
        dense, plan = flash.FlashAttention(DEVICE), make_plan(whole)
        dense.reserve(own.params, case.dtype, held)
        plan = dataclasses.replace(plan, block_table=own.block_table)
        plan.context = SharedContext.of(share, plan)
        mine = query.chunk(size, 1)[share.rank]
        output = torch.full_like(mine, torch.nan)
        for _ in range(2):  # a second layer reuses what the first one prepared
            dense.prefill(backend, own.bound(backend), plan, mine, key, value, output)
        assert output[:FIRST].isnan().all()
        return output[FIRST:]

    found = torch.cat(ranks.run(on), 1)
    error = relative_error(found, expected_prefill(whole, query))
    assert error.max() < SLACK * TOLERANCE[case.dtype]


def metadata_of(
    monkeypatch,
    ranks: Ranks,
    rank: int,
    runner: str,
    requests: list[Request],
    drafts: int,
    rows: int,
):
    """What a rank's builder makes of a step, and its builder."""
    found = (Group(ranks, rank), ranks.interleave)
    monkeypatch.setattr("vllm_adamas.serving.compat.context_group", lambda config: found)
    group = group_of({"token_budget": BUDGET}, drafts=drafts, ranks=ranks.size)
    return BUILD[runner](group, requests, rows), group.get_metadata_builder()


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("runner", RUNNERS)
def test_rows_have_the_budget_of_the_context_and_the_length_of_the_share(
    monkeypatch, runner: str, drafts: int
) -> None:
    ranks = Ranks(2, 4)
    some = [
        decoding(300, drafts),
        decoding(BUDGET + 20, drafts),
        decoding(50, drafts),
        remainder(641),
    ]
    requests = in_order([*some, chunk(401, 60), chunk(0, 40)], drafts)
    whole = BUILD[runner](
        group_of({"token_budget": BUDGET}, drafts=drafts), requests, len(requests)
    )
    for rank in range(2):
        step, builder = metadata_of(
            monkeypatch, ranks, rank, runner, requests, drafts, len(requests)
        )
        ours, theirs = usual(step), usual(whole)
        assert ours.seq_lens.tolist() == [len(ranks.tokens(n, rank)) for n in theirs.seq_lens]
        assert torch.equal(ours.budgets, theirs.budgets)
        assert torch.equal(ours.block_table, theirs.block_table)
        assert max(ours.seq_lens) <= ours.max_seq_len <= theirs.max_seq_len // 2 + 4
        each = SimpleNamespace(query_start_loc_cpu=torch.arange(len(theirs.seq_lens) + 1))
        budget = next(iter(step.decode))
        sparse = builder._sparse_rows(each, theirs.seq_lens, [None, None], budget)
        held = ours.seq_lens.tolist()
        assert sparse == [(row, n) for row, n in enumerate(held) if n > BUDGET]
        context = step.prefill.context
        earlier = [x.computed for x in requests if x.new > 1 + drafts]
        assert context.seq_lens.tolist() == [len(ranks.tokens(n, rank)) for n in earlier]
        assert torch.equal(context.seq_lens_cpu, context.seq_lens.cpu())
        assert context.max_seq_len == 204  # for either rank


@pytest.mark.parametrize("runner", RUNNERS)
def test_padding_has_no_tokens_and_a_step_of_new_prompts_has_no_context(
    monkeypatch, runner: str
) -> None:
    for rank in range(2):
        step, _ = metadata_of(monkeypatch, Ranks(2), rank, runner, [decoding(9), decoding(1)], 0, 4)
        assert usual(step).seq_lens.tolist() == [5 - rank, 1 - rank, 0, 0]
        step, _ = metadata_of(monkeypatch, Ranks(2), rank, runner, [chunk(0, 5), chunk(0, 9)], 0, 2)
        assert step.prefill.context.max_seq_len == 0
