"""What is special to the CUDA kernels: long and misleading contexts, many rows, graphs, plans, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import targets
import torch
from cases import SETS, SINKS, TOLERANCE, Batch, Case, many, relative_error
from targets import FORMS, CudaTarget, attend_selected, needs_hopper, needs_other_library

from vllm_adamas.backends.base import COUNTERS
from vllm_adamas.backends.cuda.library import FOR_HOPPER, FOR_OTHERS, limits
from vllm_adamas.backends.cuda.policy import MOST_SUMMED, THREE, Form
from vllm_adamas.backends.reference.signature import sampled_tokens
from vllm_adamas.errors import AdamasError

pytestmark = needs_hopper
over_forms = pytest.mark.parametrize("form", FORMS, ids=str)
SELECTIONS = pytest.mark.parametrize("selection", SETS)
over_scores = pytest.mark.parametrize(
    "score, selection",
    [("dot", name) for name in SETS] + [("manhattan", "query_head"), ("manhattan", "kv_head")],
)


@pytest.fixture(
    scope="module",
    params=[FOR_HOPPER, pytest.param(FOR_OTHERS, marks=needs_other_library)],
)
def backend(request):
    """Hopper's kernels, and on the same GPU those for others, which take no step in one kernel."""
    from vllm_adamas.backends.cuda.backend import CudaBackend

    return CudaBackend(request.param)


def check_decode(backend, batch: Batch, form: Form) -> None:
    target = CudaTarget(backend, "cuda", {"form": form})
    target.skip_unless_fits(batch)
    targets.check_decode(target, batch)


def skip_unless_fits(backend, batch: Batch, form: Form, longest: int | None = None) -> None:
    CudaTarget(backend, "cuda", {"form": form}).skip_unless_fits(batch, longest)


def append_again(backend, batch: Batch) -> None:
    """After its keys were changed."""
    backend.append(batch.bound(backend), batch.key, batch.value, batch.slots)


MISLEADING = ("equal", "few", "huge", "zero", "drift", "late", "outliers", "sampled")
LONGEST = 9000  #: tokens of the first context of test_decode_of_any_scores


def mislead(batch: Batch, data: str) -> None:
    """Scores in few places, far above the others, or rising along the context: samples of them say little."""
    key, query = batch.key, batch.query
    query.mul_(0.1).add_(1)
    if data == "drift":
        key.mul_(0.1)
        key[100:400] += 1
    elif data == "outliers":
        key[[7, 1000, 1001, 2040]] *= 100
        query.mul_(100)
    elif (
        data == "sampled"
    ):  # the sample of combine=max has all the best tokens, and too few of them
        key.mul_(0.1)
        key[sampled_tokens(LONGEST)] += 1
    else:
        rise = torch.arange(len(key), device=key.device).to(key.dtype) / len(key)
        key.mul_(0.01).add_(rise.view(-1, 1, 1))


def misleading(backend, case: Case, data: str) -> Batch:
    """The batch of a case with one of ``MISLEADING``."""
    plain = data in ("drift", "late", "outliers", "sampled")
    batch = dataclasses.replace(case, data="normal" if plain else data).build(backend, "cuda")
    if plain:
        mislead(batch, data)
        append_again(backend, batch)
    return batch


@over_forms
@over_scores
@pytest.mark.parametrize("data", ["normal", *MISLEADING])
def test_decode_of_any_scores(backend, data: str, score: str, selection: str, form: Form) -> None:
    """Long enough for samples; every distribution of scores is exact."""
    lengths, budgets = (LONGEST, 2048, 2500, 0, 5000), (256, 64, 2400, 9, 1)
    case = Case(lengths, budgets, score=score, **SETS[selection])
    check_decode(backend, misleading(backend, case, data), form)


@over_forms
@SELECTIONS
def test_decode_of_long_contexts(backend, selection: str, form: Form) -> None:
    """Long contexts, and budgets that the lists of candidates miss."""
    batch = Case(
        (140000, 66000, 20000, 70000), (256, 300, 9000, 1024), heads=(4, 1), **SETS[selection]
    ).build(backend, "cuda")
    check_decode(backend, batch, form)


@pytest.mark.parametrize("form", [THREE, Form(8, 16)], ids=str)
@over_scores
def test_decode_of_a_million_tokens(backend, selection: str, score: str, form: Form) -> None:
    """The longest context that is served, and an odd one beside it."""
    most = limits(backend.library).max_context
    lengths, budgets = (most, most - 48_577), (256, 4096)
    case = Case(lengths, budgets, heads=(4, 1), score=score, **SETS[selection])
    check_decode(backend, case.build(backend, "cuda"), form)


@pytest.mark.parametrize(
    ("group", "head_size", "selection"),
    [
        (8, 128, "kv_head"),
        (8, 256, "query_head"),
        (16, 64, "query_head"),
        (12, 192, "kv_head"),
        (8, 128, "max"),
        (16, 256, "max"),
    ],
)
def test_large_groups_have_long_contexts(backend, group: int, head_size: int, selection) -> None:
    """What a block keeps of the context and of the heads fits its memory together."""
    case = Case(
        (limits(backend.library).max_context,), 256, (group, 1), head_size, **SETS[selection]
    )
    check_decode(backend, case.build(backend, "cuda"), form=THREE)


@over_forms
@pytest.mark.parametrize("data", ["equal", "late"])
def test_decode_of_misleading_long_contexts(backend, data: str, form: Form) -> None:
    case = Case((40000, 66000), (256, 300), (4, 1), score="manhattan", selection="kv_head")
    batch = case.build(backend, "cuda")
    if data == "late":
        mislead(batch, data)
    else:
        batch.key.copy_(batch.key[:1].expand_as(batch.key))
    append_again(backend, batch)
    check_decode(backend, batch, form)


@over_forms
@SELECTIONS
def test_decode_sinks_and_window(backend, selection: str, form: Form) -> None:
    case = Case((9000, 300, 64, 37), (256, 64, 40, 37), **SETS[selection], sinks=4, recent=32)
    check_decode(backend, case.build(backend, "cuda"), form)


@over_forms
@pytest.mark.parametrize("head_size", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("window", [0, 100])
def test_decode_dense(backend, head_size: int, window: int, form: Form) -> None:
    lengths = (5000, 1, 100, 101, 0, 16, 3000)
    case = Case(lengths, 1 << 30, (12, 4), head_size, window=window, selection="kv_head")
    batch = case.build(backend, "cuda")
    check_decode(backend, batch, form)


SOFTMAX = {
    "learned-sinks": {"learned_sinks": SINKS},
    "soft-cap": {"soft_cap": 1.5},
    "both": {"learned_sinks": SINKS, "soft_cap": 1.5},
}


@over_forms
@SELECTIONS
@pytest.mark.parametrize("softmax", SOFTMAX.values(), ids=SOFTMAX)
@pytest.mark.parametrize("fp8", [None, "e4m3"])
def test_decode_of_every_softmax(backend, fp8, softmax: dict, selection: str, form: Form) -> None:
    """Sparse rows of one round and of several, forced tokens, and dense rows that blocks share."""
    lengths, budgets = (9000, 5000, 300, 3000, 0), (256, 2000, 40, 1 << 30, 9)
    case = Case(lengths, budgets, fp8=fp8, sinks=4, recent=32, **SETS[selection], **softmax)
    check_decode(backend, case.build(backend, "cuda"), form)


@over_forms
@pytest.mark.parametrize("softmax", SOFTMAX.values(), ids=SOFTMAX)
@pytest.mark.parametrize("window", [0, 100])
def test_dense_decode_of_every_softmax(backend, window: int, softmax: dict, form: Form) -> None:
    lengths = (5000, 1, 100, 101, 0, 16, 3000)
    case = Case(lengths, 1 << 30, (12, 4), window=window, selection="kv_head", **softmax)
    check_decode(backend, case.build(backend, "cuda"), form)


@pytest.mark.parametrize("softmax", SOFTMAX.values(), ids=SOFTMAX)
def test_decode_of_every_softmax_in_small_blocks(backend, softmax: dict) -> None:
    case = dataclasses.replace(many(300, (4, 2)), **softmax)
    check_decode(backend, case.build(backend, "cuda"), THREE)


@over_forms
def test_decode_dense_and_sparse(backend, form: Form) -> None:
    lengths, budgets = (3000, 2000, 200, 9000, 1000), (256, 5000, 200, 128, 999)
    batch = Case(lengths, budgets, selection="kv_head").build(backend, "cuda")
    check_decode(backend, batch, form)


@over_forms
@pytest.mark.parametrize(
    "rows, heads, head_size, fp8",
    [
        (300, (4, 2), 64, None),
        (300, (4, 2), 128, None),
        (100, (4, 2), 128, "e4m3"),
        (100, (4, 2), 96, None),
        (512, (16, 4), 128, None),
        (4096, (2, 1), 64, None),
        (None, (1, 1), 256, None),  # the largest batch
    ],
)
def test_decode_many_rows(backend, rows, heads, head_size: int, fp8, form: Form) -> None:
    """Enough token sets for small blocks, whose rows go through shared memory."""
    most = limits(backend.library).max_rows
    rows = min(rows or most, most)
    g = torch.Generator().manual_seed(3)
    longest = 400 if rows <= 512 else 40
    lengths = tuple(torch.randint(0, longest, (rows,), generator=g).tolist())
    budgets = tuple(torch.randint(1, longest * 3 // 4, (rows,), generator=g).tolist())
    case = Case(lengths, budgets, heads, head_size, fp8=fp8, selection="kv_head")
    batch = case.build(backend, "cuda")
    check_decode(backend, batch, form)


@SELECTIONS
@pytest.mark.parametrize("data", ["normal", "equal", "late"])
def test_decode_many_rows_of_long_contexts(backend, selection: str, data: str) -> None:
    """Small blocks that select from samples, from more candidates than they keep, and from ties."""
    g = torch.Generator().manual_seed(4)
    lengths = tuple(torch.randint(4000, 9000, (40,), generator=g).tolist())
    budgets = tuple(torch.randint(1, 3000, (40,), generator=g).tolist())
    case = Case(lengths, budgets, (32, 8), **SETS[selection], data=data.replace("late", "normal"))
    batch = case.build(backend, "cuda")
    if data == "late":
        mislead(batch, data)
        append_again(backend, batch)
    check_decode(backend, batch, form=THREE)


@over_forms
def test_nan_stays_where_it_is(backend, form: Form) -> None:
    """A NaN reaches the heads that see it, and no other row or head; with one set per KV head it may choose the set."""
    selection = "query_head" if form == THREE else "kv_head"
    batch = Case((300, 64, 200), (1000, 1000, 16), selection=selection).build(backend, "cuda")
    skip_unless_fits(backend, batch, form)
    clean, _ = batch.decode(backend, form=form)
    batch.query[1, 3, 7] = torch.nan
    batch.query[2, 5] = torch.nan
    batch.key[10, 0, 0] = torch.nan  # of row 0, KV head 0: query heads 0 to 3
    append_again(backend, batch)
    output, _ = batch.decode(backend, form=form)
    seen = torch.zeros(3, 8, dtype=torch.bool, device="cuda")
    seen[0, :4] = seen[1, 3] = seen[2, 5] = True
    assert torch.equal(output[:3].isnan().all(-1), seen)
    same = ~seen
    same[2, 4:] = selection == "query_head"
    same[2, 5] = False
    assert torch.equal(output[:3][same], clean[:3][same])


# rows of one request


def drafted(batch: Batch, rows: list[int]) -> tuple[Batch, torch.Tensor]:
    """The batch with so many rows for each of its requests, and their positions.

    The last row of a request has its whole context, and each other one a token less than the next.
    """
    counts = torch.tensor(rows, device="cuda")
    positions = torch.cat([torch.arange(n, device="cuda") for n in rows])
    behind = counts.repeat_interleave(counts) - 1 - positions
    query = batch.query[: len(rows)].repeat_interleave(counts, 0)
    batch = dataclasses.replace(
        batch,
        query=query + query.std() * 0.3 * torch.randn_like(query),
        block_table=batch.block_table.repeat_interleave(counts, 0),
        seq_lens=(batch.seq_lens.repeat_interleave(counts) - behind).clamp(min=0).int(),
        budgets=batch.budgets.repeat_interleave(counts),
    )
    return batch, positions.int()


#: Sparse and dense rows, requests whose rows are of both kinds, one that fills more than a run, and padding.
REQUESTS = {"lengths": (9000, 300, 66, 2049, 40, 5000, 0), "budgets": (256, 64, 64, 100, 64, 16, 8)}
ROWS = [4, 1, 4, 3, 4, 9, 5]


@pytest.mark.parametrize("data", ["normal", "equal", "late", "huge"])
@pytest.mark.parametrize("heads", [(32, 8), (7, 1), (9, 3), (16, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("head_size", [64, 96, 128])
def test_a_shared_scan_selects_as_rows_of_their_own(
    backend, data: str, heads: tuple[int, int], head_size: int
) -> None:
    case = Case(**REQUESTS, **SETS["max"], heads=heads, head_size=head_size)
    check_shared(backend, *drafted(misleading(backend, case, data), ROWS))


def check_shared(backend, batch: Batch, positions: torch.Tensor) -> None:
    """Outputs are the same bits; and the counters, of which the last tells that no set was scored again."""
    step = {"positions": positions, "num_requests": int((positions == 0).sum()), "form": THREE}
    expected, counted = batch.decode(backend, shared=False, **step)
    output, stats = batch.decode(backend, shared=True, **step)
    assert torch.equal(output.nan_to_num(), expected.nan_to_num())
    assert stats == counted


@pytest.mark.parametrize("block_size", [16, 48, 128, 544])
@pytest.mark.parametrize("ends", [{}, {"sinks": 4, "recent": 20}], ids=["whole", "ends"])
def test_a_shared_scan_of_any_blocks(backend, block_size: int, ends: dict) -> None:
    case = Case(**REQUESTS, **SETS["max"], **ends, heads=(8, 2), block_size=block_size)
    check_shared(backend, *drafted(case.build(backend, "cuda"), ROWS))


def test_a_shared_scan_in_a_graph_replayed_with_other_requests(backend) -> None:
    """A captured step serves any division of its rows among requests."""
    case = Case((9000, 2300), (256, 64), **SETS["max"], heads=(32, 8), padding=0)
    built = case.build(backend, "cuda")
    batch, positions = drafted(built, [4, 4])
    output = torch.zeros_like(batch.query)
    stats = torch.zeros(COUNTERS, dtype=torch.int64, device="cuda")
    step = batch.step(max_seq_len=65536, overlap=True, positions=positions, num_requests=2)
    args = (batch.bound(backend), batch.query, step, output, stats)
    backend.reserve(batch.params, 8, 65536)
    backend.decode(*args, form=THREE, shared=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.decode(*args, form=THREE, shared=True)
    for rows in ([1, 7], [5, 3], [2, 2], [1, 1]):
        new, places = drafted(built, rows)
        for to, from_ in (
            (batch.query, new.query),
            (batch.block_table, new.block_table),
            (batch.seq_lens, new.seq_lens),
            (batch.budgets, new.budgets),
            (positions, places),
        ):
            to.zero_()[: sum(rows)].copy_(from_)
        output.fill_(float("nan"))
        stats.zero_()
        graph.replay()
        expected, counted = batch.decode(backend, max_seq_len=65536, form=THREE, shared=False)
        assert torch.equal(output, expected)
        assert stats.tolist() == counted


@pytest.mark.parametrize("heads, head_size", [((9, 1), 128), ((8, 2), 256)], ids=str)
def test_rows_that_are_not_scanned_together(backend, heads, head_size: int) -> None:
    """Large groups and heads, whose queries would not fit registers, and other selections than the maximum."""
    case = Case((2000,) * 4, 64, **SETS["max"], heads=heads, head_size=head_size)
    for one in (case, Case((2000,) * 4, 64, heads=(8, 2))):
        batch, positions = drafted(one.build(backend, "cuda"), [4] * 4)
        plan = backend.plan(batch.bound(backend), 16, batch.query.dtype, 2000, rows_each=4)
        assert not plan.shared
        with pytest.raises(ValueError, match="positions"):
            batch.decode(backend, positions=positions, num_requests=4, form=THREE, shared=True)


# graphs and arguments


@over_forms
@over_scores
def test_graph_replay_with_other_rows(backend, form: Form, selection: str, score: str) -> None:
    """A captured step serves every batch of its size: tables, lengths and budgets are read on the device."""
    longest = 65536  # of the rows to come
    case = Case((9000, 2300, 40), (256, 128, 64), padding=0, **SETS[selection], score=score)
    batch = case.build(backend, "cuda")
    unused = batch.block_table[:, -1:].expand(-1, longest // 64 - batch.block_table.shape[1])
    batch.block_table = torch.cat((batch.block_table, unused), 1)
    skip_unless_fits(backend, batch, form, longest)
    output = torch.zeros_like(batch.query)
    stats = torch.zeros(COUNTERS, dtype=torch.int64, device="cuda")
    step = batch.step(max_seq_len=longest, overlap=True)
    args = (batch.bound(backend), batch.query, step, output, stats)
    backend.reserve(batch.params, 3, longest)
    backend.decode(*args, form=form)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.decode(*args, form=form)
    for lengths, budgets, order in [
        ((8000, 2000, 0), (64, 3000, 8), (0, 1, 2)),
        ((1, 2300, 33), (4, 100, 32), (0, 1, 2)),
        ((40, 2300, 9000), (16, 100, 64), (2, 1, 0)),
    ]:
        batch.block_table.copy_(batch.block_table[torch.tensor(order)].clone())
        batch.seq_lens.copy_(torch.tensor(lengths))
        batch.budgets.copy_(torch.tensor(budgets))
        output.fill_(float("nan"))
        stats.zero_()
        graph.replay()
        again, counted = batch.decode(backend, max_seq_len=longest, overlap=True, form=form)
        assert torch.equal(output, again)
        assert stats.tolist() == counted
        expected, _ = attend_selected(backend, batch)
        assert relative_error(output.cpu(), expected).max() <= 2 * TOLERANCE[output.dtype]


@SELECTIONS
def test_plans_follow_the_longest_context(backend, selection: str) -> None:
    """One reservation serves the plans of all contexts; the longest ones take the three kernels."""
    params = Case(**SETS[selection], heads=(8, 2)).params
    layout = params.layout
    pages = torch.zeros(1, 2, layout.block_size, layout.token_bytes // 2, dtype=layout.dtype)
    layer = backend.bind(params, pages.cuda())
    dtype, longest = torch.bfloat16, limits(backend.library).max_context
    assert backend.plan(layer, 1, dtype, longest).form == THREE
    three = selection == "query_head" or backend.library == FOR_OTHERS
    assert (backend.plan(layer, 1, dtype, MOST_SUMMED).form == THREE) == three
    reserved = backend.workspace_bytes(params, 8, longest)
    for rows in (1, 8):
        for tokens in (1, 1000, 5000, 65536, 65537, longest * 2 // 7, longest):
            assert backend.plan(layer, rows, dtype, tokens).workspace_bytes <= reserved


def test_a_dropped_cache_is_freed(backend) -> None:
    batch = Case().build(backend, "cuda")
    batch.scan(backend)
    batch.decode(backend)
    layer = batch.bound(backend)
    held, before = batch.memory.nbytes, torch.cuda.memory_allocated()
    batch.memory = None
    assert before - torch.cuda.memory_allocated() >= held
    assert not layer.is_bound_to(batch.key)


def test_refusals(backend) -> None:
    batch = Case((64,), 1).build(backend, "cuda")
    most = limits(backend.library)
    with pytest.raises(ValueError, match=r"^cluster: "):
        batch.decode(backend, form=Form(most.max_cluster + 1, 8))
    rows = many(most.max_rows + 1).build(backend, "cuda")
    with pytest.raises(AdamasError, match=f"{most.max_rows + 1} rows"):
        rows.decode(backend)


@pytest.mark.parametrize("name", ["query", "block_table", "seq_lens", "budgets"])
def test_arguments_on_another_device(backend, name: str) -> None:
    batch = Case((64,), 1).build(backend, "cuda")
    elsewhere = dataclasses.replace(batch, **{name: getattr(batch, name).cpu()})
    layer = batch.bound(backend)
    output, stats = (
        torch.empty_like(batch.query),
        torch.zeros(COUNTERS, dtype=torch.int64, device="cuda"),
    )
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor on cuda:0, got one on cpu"):
        backend.decode(layer, elsewhere.query, elsewhere.step(), output, stats)


@pytest.mark.parametrize(("name", "shape"), [("key_mean", (2, 128)), ("sinks", (8,))])
def test_parameters_on_another_device(backend, name: str, shape: tuple[int, ...]) -> None:
    batch = Case().build(backend, "cuda")
    params = dataclasses.replace(batch.params, **{name: torch.zeros(shape)})
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor on cuda"):
        backend.bind(params, batch.kv_cache)
