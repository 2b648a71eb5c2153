"""Every CUDA operation against the reference, by the three kernels and by the fused one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import (
    CASES,
    TOLERANCE,
    Batch,
    Case,
    check_append,
    check_lengths_are_cut,
    check_slots_are_skipped,
    check_surroundings,
    many,
    relative_error,
)

from vllm_adamas.backends.cuda.library import LIBRARY, limits
from vllm_adamas.backends.reference import ReferenceBackend
from vllm_adamas.backends.reference.backend import select_tokens
from vllm_adamas.dtypes import ELEMENTS
from vllm_adamas.errors import AdamasError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
    pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library is not built"),
]
REFERENCE = ReferenceBackend()
#: Queries in fp8 pages' cases are bf16 or fp16, and the kernels have no float32.
GPU_CASES = {
    name: case if case.dtype != torch.float32 else dataclasses.replace(case, dtype=torch.bfloat16)
    for name, case in CASES.items()
    if case.dtype != torch.float32 or case.fp8
} | {
    "block16": Case((1, 15, 16, 17, 700, 0), 30, heads=(6, 1), block_size=16),
    "block144": Case((1, 143, 145, 700), 30, block_size=144),
    "group7": Case(heads=(7, 1), score="manhattan"),
    "group12": Case(heads=(12, 1), head_size=256, score="manhattan"),
    "group16": Case(heads=(16, 1), head_size=64, dtype=torch.float16),
    "group16-kv_head": Case(heads=(16, 1), score="manhattan", selection="kv_head"),
    "group16-e4m3": Case(heads=(16, 1), selection="kv_head", fp8="e4m3"),
    "group9": Case(heads=(9, 1)),
    "group10-d256": Case(heads=(10, 1), head_size=256),
    "group13-manhattan": Case(heads=(13, 1), score="manhattan"),
    "group15-d96": Case(heads=(15, 1), head_size=96, dtype=torch.float16),
    "e4m3-d192": Case(fp8="e4m3", head_size=192, heads=(4, 1)),
    "e5m2-d256": Case(fp8="e5m2", head_size=256, heads=(4, 1), score="manhattan"),
    "sinks-group12": Case((300, 65, 40, 0), 40, (12, 1), sinks=4, recent=8, score="manhattan"),
}
over_cases = pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES)
#: Sizes of the fused kernel's clusters; 0 is the three kernels.
CLUSTERS = (0, 1, 3, 16)
over_clusters = pytest.mark.parametrize("cluster", CLUSTERS)
SELECTIONS = pytest.mark.parametrize("selection", ["query_head", "kv_head"])


@pytest.fixture(scope="module")
def backend():
    from vllm_adamas.backends.cuda.backend import CudaBackend

    return CudaBackend()


def skip_unless_fits(backend, batch: Batch, cluster: int, longest: int | None = None) -> None:
    longest = longest or batch.block_table.shape[1] * batch.params.layout.block_size
    layer, dtype = batch.bound(backend), batch.query.dtype
    if cluster and not backend.fused_clusters(layer, dtype, longest, cluster):
        pytest.skip("the fused kernel does not take this shape")


def append_again(backend, batch: Batch) -> None:
    """After its keys were changed."""
    backend.append(batch.bound(backend), batch.key, batch.value, batch.slots)


def on_cpu(batch: Batch) -> Batch:
    """The same pages and rows, for the reference."""
    params = batch.params
    if params.key_mean is not None:
        params = dataclasses.replace(params, key_mean=params.key_mean.cpu())
    moved = {
        field.name: getattr(batch, field.name).cpu()
        for field in dataclasses.fields(batch)
        if field.name != "params"
    }
    return Batch(params=params, **moved)


# append


@over_cases
def test_append(backend, case: Case) -> None:
    check_append(case.build(backend, "cuda"), case.build(REFERENCE))


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_append_rounds_to_fp8_as_torch_does(backend, kind: str) -> None:
    """Every bf16 value but NaN: zeros of both signs, subnormals, ties, saturation, infinities."""
    bits = torch.arange(0x7F80 + 64, dtype=torch.int32).clamp_max(0x7F80).to(torch.int16)
    both = torch.cat((bits, bits | -(2**15))).view(torch.bfloat16).view(-1, 1, 64)
    params = dataclasses.replace(
        Case(fp8=kind, heads=(1, 1), head_size=64).params, k_scale=1.0, v_scale=1.0
    )
    page = torch.zeros(len(both) // 64 + 1, 1, 64, params.layout.token_bytes, dtype=torch.uint8)
    ours, slots = page.cuda(), torch.arange(len(both))
    backend.append(backend.bind(params, ours), both.cuda(), -both.cuda(), slots.cuda())
    REFERENCE.append(REFERENCE.bind(params, page), both, -both, slots)
    for plane in (params.layout.k, params.layout.v):
        assert torch.equal(plane(ours).cpu(), plane(page))


def test_append_of_nothing_but_padding(backend) -> None:
    batch = Case().build(backend, "cuda")
    before = batch.memory.clone()
    slots = torch.full_like(batch.slots, -1)
    backend.append(batch.bound(backend), batch.key, batch.value, slots)
    assert torch.equal(before.view(torch.uint8), batch.memory.view(torch.uint8))


def test_append_skips_slots_behind_the_cache(backend) -> None:
    check_slots_are_skipped(backend, Case().build(backend, "cuda"))


# scan


@over_cases
def test_scan(backend, case: Case) -> None:
    """Bit-identical: a score is an exact integer times the token's scale, rounded once."""
    batch = case.build(backend, "cuda")
    ours, host = batch.scan(backend).cpu(), on_cpu(batch)
    clear = ~host.ambiguous()
    assert clear.float().mean() > 0.75
    assert torch.equal(ours[clear], host.scan(REFERENCE)[clear])


# decode


def check_decode(backend, batch: Batch, cluster: int, **kwargs) -> None:
    """Exact attention over the tokens that the reference selects from the CUDA scores."""
    for workspace in backend._workspace.buffers.values():
        workspace.fill_(0xFF)
    ours, counted = batch.decode(backend, cluster=cluster, **kwargs)
    rows = len(batch.lengths)
    assert ours[rows:].isnan().all(), "padding was written"
    expected, stats = expected_decode(backend, batch)
    got = ours[:rows].cpu()
    assert got.isfinite().all()
    error = relative_error(got, expected)
    limit = 1.5 * TOLERANCE[ours.dtype]  # weights are rounded to the dtype of the values
    assert error.max() <= limit, (error.max(), (error > limit).nonzero()[:8])
    assert counted == stats
    for _ in range(3):
        again, _ = batch.decode(backend, cluster=cluster, overlap=True, **kwargs)
        assert torch.equal(again.view(torch.int16), ours.view(torch.int16)), "not deterministic"


def expected_decode(backend, batch: Batch) -> tuple[torch.Tensor, list[int]]:
    """Float32, on the GPU where the batch is; sorting is stable, so ties go as they should."""
    params, stats = batch.params, [0, 0, 0, 0]
    scores = batch.scan(backend)
    lengths, heads = batch.lengths, params.num_query_heads
    out = torch.zeros(len(lengths), heads, params.layout.head_size)
    budgets = params.attended(batch.seq_lens, batch.budgets).tolist()
    for row, (n, budget) in enumerate(zip(lengths, budgets, strict=True)):
        if n == 0:
            continue
        visible = min(n, params.sliding_window or n)
        sparse = budget < n and not params.sliding_window
        stats[0 if sparse else 1] += 1
        stats[2] += n * heads
        stats[3] += (budget if sparse else visible) * heads
        for head in range(heads):
            tokens = torch.arange(n - visible, n)
            kv_head = head // params.group
            if sparse:
                score_head = head if params.selection == "query_head" else kv_head
                tokens = select_tokens(
                    scores[row, score_head, :n].cpu(),
                    budget,
                    params.num_sink_tokens,
                    params.recent_window,
                )
            k, v = stored_tokens(batch, row, kv_head, tokens.cuda())
            p = (k @ batch.query[row, head].float() * params.softmax_scale).softmax(0)
            out[row, head] = (p @ v).cpu()
    return out, stats


def stored_tokens(
    batch: Batch, row: int, kv_head: int, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of some tokens of a row, float32 ``[tokens, D]``."""
    params, layout = batch.params, batch.params.layout
    block = batch.block_table[row, tokens // layout.block_size].long()
    found = []
    for plane, scale in ((layout.k, params.k_scale), (layout.v, params.v_scale)):
        x = plane(batch.kv_cache)[block, kv_head, tokens % layout.block_size]
        found.append(
            x.view(ELEMENTS[params.fp8].values).float() * scale if params.fp8 else x.float()
        )
    return found[0], found[1]


@over_clusters
@over_cases
def test_decode(backend, case: Case, cluster: int) -> None:
    batch = case.build(backend, "cuda")
    skip_unless_fits(backend, batch, cluster)
    check_decode(backend, batch, cluster)


MISLEADING = ("equal", "few", "huge", "zero", "drift", "late")


def mislead(batch: Batch, data: str) -> None:
    """Scores in few places, or rising along the context: samples of them say little."""
    key, query = batch.key, batch.query
    query.mul_(0.1).add_(1)
    if data == "drift":
        key.mul_(0.1)
        key[100:400] += 1
    else:
        rise = torch.arange(len(key), device=key.device).to(key.dtype) / len(key)
        key.mul_(0.01).add_(rise.view(-1, 1, 1))


@over_clusters
@SELECTIONS
@pytest.mark.parametrize("score", ["dot", "manhattan"])
@pytest.mark.parametrize("data", ["normal", *MISLEADING])
def test_decode_of_any_scores(backend, data: str, score: str, selection: str, cluster: int) -> None:
    """Long enough for samples; every distribution of scores is exact."""
    plain = data in ("drift", "late")
    case = Case(
        (9000, 2048, 2500, 0, 5000),
        (256, 64, 2400, 9, 1),
        score=score,
        selection=selection,
        data="normal" if plain else data,
    )
    batch = case.build(backend, "cuda")
    if plain:
        mislead(batch, data)
        append_again(backend, batch)
    check_decode(backend, batch, cluster)


@over_clusters
@SELECTIONS
def test_decode_of_long_contexts(backend, selection: str, cluster: int) -> None:
    """Long contexts, and budgets that the lists of candidates miss."""
    batch = Case(
        (140000, 66000, 20000, 70000), (256, 300, 9000, 1024), heads=(4, 1), selection=selection
    ).build(backend, "cuda")
    skip_unless_fits(backend, batch, cluster)
    check_decode(backend, batch, cluster)


@SELECTIONS
@pytest.mark.parametrize("score", ["dot", "manhattan"])
def test_decode_of_a_million_tokens(backend, selection: str, score: str) -> None:
    """The longest context that is served, and an odd one beside it."""
    lengths, budgets = (limits().max_context, 999_999), (256, 4096)
    case = Case(lengths, budgets, heads=(4, 1), score=score, selection=selection)
    check_decode(backend, case.build(backend, "cuda"), cluster=0)


@pytest.mark.parametrize(
    ("group", "head_size", "selection"),
    [(8, 128, "kv_head"), (8, 256, "query_head"), (16, 64, "query_head"), (12, 192, "kv_head")],
)
def test_large_groups_have_long_contexts(backend, group: int, head_size: int, selection) -> None:
    """What a block keeps of the context and of the heads fits its memory together."""
    case = Case((limits().max_context,), 256, (group, 1), head_size, selection=selection)
    check_decode(backend, case.build(backend, "cuda"), cluster=0)


@over_clusters
@pytest.mark.parametrize("data", ["equal", "late"])
def test_decode_of_misleading_long_contexts(backend, data: str, cluster: int) -> None:
    batch = Case((40000, 66000), (256, 300), heads=(4, 1), score="manhattan").build(backend, "cuda")
    if data == "late":
        mislead(batch, data)
    else:
        batch.key.copy_(batch.key[:1].expand_as(batch.key))
    append_again(backend, batch)
    skip_unless_fits(backend, batch, cluster)
    check_decode(backend, batch, cluster)


@over_clusters
@SELECTIONS
def test_decode_sinks_and_window(backend, selection: str, cluster: int) -> None:
    case = Case((9000, 300, 64, 37), (256, 64, 40, 37), selection=selection, sinks=4, recent=32)
    check_decode(backend, case.build(backend, "cuda"), cluster)


@over_clusters
@pytest.mark.parametrize("head_size", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("window", [0, 100])
def test_decode_dense(backend, head_size: int, window: int, cluster: int) -> None:
    lengths = (5000, 1, 100, 101, 0, 16, 3000)
    batch = Case(lengths, 1 << 30, (12, 4), head_size, window=window).build(backend, "cuda")
    skip_unless_fits(backend, batch, cluster)
    check_decode(backend, batch, cluster)


@over_clusters
def test_decode_dense_and_sparse(backend, cluster: int) -> None:
    batch = Case((3000, 2000, 200, 9000, 1000), (256, 5000, 200, 128, 999)).build(backend, "cuda")
    check_decode(backend, batch, cluster)


@over_clusters
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
def test_decode_many_rows(backend, rows, heads, head_size: int, fp8, cluster: int) -> None:
    """Enough token sets for small blocks, whose rows go through shared memory."""
    rows = rows or limits().max_rows
    g = torch.Generator().manual_seed(3)
    longest = 400 if rows <= 512 else 40
    lengths = tuple(torch.randint(0, longest, (rows,), generator=g).tolist())
    budgets = tuple(torch.randint(1, longest * 3 // 4, (rows,), generator=g).tolist())
    batch = Case(lengths, budgets, heads, head_size, fp8=fp8).build(backend, "cuda")
    skip_unless_fits(backend, batch, cluster)
    check_decode(backend, batch, cluster)


@SELECTIONS
@pytest.mark.parametrize("data", ["normal", "equal", "late"])
def test_decode_many_rows_of_long_contexts(backend, selection: str, data: str) -> None:
    """Small blocks that select from samples, from more candidates than they keep, and from ties."""
    g = torch.Generator().manual_seed(4)
    lengths = tuple(torch.randint(4000, 9000, (40,), generator=g).tolist())
    budgets = tuple(torch.randint(1, 3000, (40,), generator=g).tolist())
    case = Case(lengths, budgets, (32, 8), selection=selection, data=data.replace("late", "normal"))
    batch = case.build(backend, "cuda")
    if data == "late":
        mislead(batch, data)
        append_again(backend, batch)
    check_decode(backend, batch, cluster=0)


@over_clusters
def test_nan_stays_where_it_is(backend, cluster: int) -> None:
    """A NaN reaches the heads that see it, and no other row or head."""
    batch = Case((300, 64, 200), (1000, 1000, 16)).build(backend, "cuda")
    clean, _ = batch.decode(backend, cluster=cluster)
    batch.query[1, 3, 7] = torch.nan
    batch.query[2, 5] = torch.nan
    batch.key[10, 0, 0] = torch.nan  # of row 0, KV head 0: query heads 0 to 3
    append_again(backend, batch)
    output, _ = batch.decode(backend, cluster=cluster)
    seen = torch.zeros(3, 8, dtype=torch.bool, device="cuda")
    seen[0, :4] = seen[1, 3] = seen[2, 5] = True
    assert torch.equal(output[:3].isnan().all(-1), seen)
    assert torch.equal(output[:3][~seen], clean[:3][~seen])


# gather


@over_cases
def test_gather(backend, case: Case) -> None:
    batch = case.build(backend, "cuda")
    assert torch.equal(batch.gathered(backend), torch.stack(batch.stored()).to(case.dtype))


# what the tensors do not hold


KINDS = ("plain", "mixed-kv_head", "d192", "e4m3", "forced", "sliding", "group16", "long")


@over_clusters
@pytest.mark.parametrize("name", KINDS)
def test_surroundings_change_nothing(backend, name: str, cluster: int) -> None:
    batch = GPU_CASES[name].build(backend, "cuda")
    skip_unless_fits(backend, batch, cluster)
    check_surroundings(backend, batch, cluster=cluster)


@over_clusters
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("budget", [9, 1 << 30])
def test_lengths_are_cut(backend, budget: int, window: int, cluster: int) -> None:
    case = Case((200, 65, 300, 129, 40, 0), budget, heads=(4, 2), window=window)
    batch = case.build(backend, "cuda")
    skip_unless_fits(backend, batch, cluster)
    check_lengths_are_cut(backend, batch, cluster=cluster)


@pytest.mark.parametrize("fp8", [None, "e4m3"])
def test_gather_of_many_rows(backend, fp8: str | None) -> None:
    case = dataclasses.replace(many(4096), fp8=fp8)
    batch = case.build(backend, "cuda")
    assert torch.equal(batch.gathered(backend), torch.stack(batch.stored()).to(case.dtype))


# graphs and arguments


@over_clusters
@SELECTIONS
@pytest.mark.parametrize("score", ["dot", "manhattan"])
def test_graph_replay_with_other_rows(backend, cluster: int, selection: str, score: str) -> None:
    """A captured step serves every batch of its size: tables, lengths and budgets are read on the device."""
    longest = 65536  # of the rows to come
    case = Case((9000, 2300, 40), (256, 128, 64), padding=0, selection=selection, score=score)
    batch = case.build(backend, "cuda")
    unused = batch.block_table[:, -1:].expand(-1, longest // 64 - batch.block_table.shape[1])
    batch.block_table = torch.cat((batch.block_table, unused), 1)
    skip_unless_fits(backend, batch, cluster, longest)
    output = torch.zeros_like(batch.query)
    stats = torch.zeros(4, dtype=torch.int64, device="cuda")
    step = batch.step(max_seq_len=longest, overlap=True)
    args = (batch.bound(backend), batch.query, step, output, stats)
    backend.reserve(batch.params, 3, longest)
    backend.decode(*args, cluster=cluster)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.decode(*args, cluster=cluster)
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
        again, counted = batch.decode(backend, max_seq_len=longest, overlap=True, cluster=cluster)
        assert torch.equal(output, again)
        assert stats.tolist() == counted
        expected, _ = expected_decode(backend, batch)
        assert relative_error(output.cpu(), expected).max() <= 2 * TOLERANCE[output.dtype]


@SELECTIONS
def test_plans_follow_the_longest_context(backend, selection: str) -> None:
    """One kernel for short contexts of few rows, three for long ones; one reservation serves them all."""
    params = Case(selection=selection, heads=(8, 2)).params
    layout = params.layout
    pages = torch.zeros(1, 2, layout.block_size, layout.token_bytes // 2, dtype=layout.dtype)
    layer = backend.bind(params, pages.cuda())
    dtype, longest = torch.bfloat16, limits().max_context
    assert backend.plan(layer, 1, dtype, 4096).cluster > 0
    assert backend.plan(layer, 1, dtype, longest).cluster == 0
    reserved = backend.workspace_bytes(params, 8, longest)
    for rows in (1, 8):
        for tokens in (1, 1000, 5000, 65536, 65537, 300_000, longest):
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
    with pytest.raises(ValueError, match=r"^cluster: "):
        batch.decode(backend, cluster=limits().max_cluster + 1)
    rows = many(limits().max_rows + 1).build(backend, "cuda")
    with pytest.raises(AdamasError, match=f"{limits().max_rows + 1} rows"):
        rows.decode(backend)


@pytest.mark.parametrize("name", ["query", "block_table", "seq_lens", "budgets"])
def test_arguments_on_another_device(backend, name: str) -> None:
    batch = Case((64,), 1).build(backend, "cuda")
    elsewhere = dataclasses.replace(batch, **{name: getattr(batch, name).cpu()})
    layer = batch.bound(backend)
    output, stats = torch.empty_like(batch.query), torch.zeros(4, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor on cuda:0, got one on cpu"):
        backend.decode(layer, elsewhere.query, elsewhere.step(), output, stats)


def test_a_key_mean_on_another_device(backend) -> None:
    batch = Case().build(backend, "cuda")
    params = dataclasses.replace(batch.params, key_mean=torch.zeros(2, 128))
    with pytest.raises(ValueError, match=r"^key_mean: expected a tensor on cuda"):
        backend.bind(params, batch.kv_cache)
