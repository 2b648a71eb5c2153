"""Every CUDA operation against the reference backend, and decode under CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from vllm_adamas.backends.base import Params
from vllm_adamas.backends.reference import ReferenceBackend
from vllm_adamas.backends.reference import signature as sig
from vllm_adamas.backends.reference.ops import select_tokens
from vllm_adamas.config import Coding
from vllm_adamas.layout import PageLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]


@pytest.fixture(scope="module")
def backend():
    from vllm_adamas.backends.cuda import LIBRARY, CudaBackend

    if not LIBRARY.exists():
        pytest.skip("the CUDA library is not built")
    return CudaBackend()


@dataclass
class Case:
    """One batch: contexts, their pages in shuffled blocks on the GPU, and queries."""

    lengths: tuple[int, ...]
    budgets: tuple[int, ...]
    heads: tuple[int, int] = (8, 2)
    head_size: int = 128
    block_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    score: str = "dot"
    selection: str = "query_head"
    sinks: int = 0
    recent: int = 0
    window: int = 0
    keys: str = "normal"
    seed: int = 0

    def build(self, backend):
        g = torch.Generator().manual_seed(self.seed)
        layout = PageLayout(self.head_size, self.block_size, self.dtype)
        coding = Coding(1.25, False) if self.score == "manhattan" else Coding(0.9816, True)
        q_heads, kv_heads = self.heads
        self.params = Params(
            layout=layout,
            num_query_heads=q_heads,
            num_kv_heads=kv_heads,
            softmax_scale=self.head_size**-0.5,
            coding=coding,
            score=self.score,
            selection=self.selection,
            num_sink_tokens=self.sinks,
            recent_window=self.recent,
            sliding_window=self.window,
        )
        blocks = [-(-n // self.block_size) for n in self.lengths]
        total = sum(blocks) + 3
        order = torch.randperm(total, generator=g).to(torch.int32)
        rows = len(self.lengths)
        self.block_table = torch.zeros(rows, max(1, *blocks), dtype=torch.int32)
        slots, at = [], 0
        for row, (n, used) in enumerate(zip(self.lengths, blocks, strict=True)):
            self.block_table[row, :used] = order[at : at + used]
            at += used
            t = torch.arange(n)
            slots.append(
                self.block_table[row, t // self.block_size].long() * self.block_size
                + t % self.block_size
            )
        self.slots = torch.cat(slots)
        tokens = self.slots.shape[0]
        key = torch.randn(tokens, kv_heads, self.head_size, generator=g)
        if self.keys == "equal":
            key = key[:1].expand(tokens, -1, -1).contiguous()
        elif self.keys == "few":  # massive ties
            key = key[torch.randint(0, 3, (tokens,), generator=g)]
        elif self.keys == "huge":
            key = key * torch.logspace(-30, 4, tokens).view(-1, 1, 1)
        elif self.keys == "drift":  # an unevenly spread score: the sample of encode is misled
            key = key * 0.1
            query = torch.ones(self.head_size)
            key[100:400] += query
        elif self.keys == "zero":
            key = torch.zeros_like(key)
        self.key = key.to(self.dtype)
        self.value = torch.randn(tokens, kv_heads, self.head_size, generator=g).to(self.dtype)
        query = torch.randn(rows, q_heads, self.head_size, generator=g)
        if self.keys == "drift":
            query = query * 0.1 + 1
        self.query = query.to(self.dtype)
        # Stale bytes of any kind may lie in a page.
        content = layout.token_bytes // self.dtype.itemsize
        noise = torch.randint(
            -(2**15), 2**15, (total, kv_heads, self.block_size, content), generator=g
        )
        self.page = noise.to(torch.int16).view(self.dtype).cuda()
        self.lens = torch.tensor(self.lengths, dtype=torch.int32)
        self.limits = torch.tensor(self.budgets, dtype=torch.int32)
        backend.append(
            self.params, self.key.cuda(), self.value.cuda(), self.page, self.slots.cuda()
        )
        return self

    def on_gpu(self):
        return self.query.cuda(), self.page, self.block_table.cuda(), self.lens.cuda()


SHAPES = [
    pytest.param({}, id="plain"),
    pytest.param({"selection": "kv_head"}, id="kv_head"),
    pytest.param({"score": "manhattan"}, id="manhattan"),
    pytest.param({"score": "manhattan", "selection": "kv_head"}, id="manhattan-kv_head"),
    pytest.param({"heads": (4, 4)}, id="group1"),
    pytest.param({"heads": (6, 2), "dtype": torch.float16}, id="group3-fp16"),
    pytest.param({"heads": (5, 1), "score": "manhattan", "selection": "kv_head"}, id="group5"),
    pytest.param({"heads": (6, 1), "block_size": 16}, id="group6-block16"),
    pytest.param({"heads": (7, 1), "score": "manhattan", "block_size": 48}, id="group7-block48"),
    pytest.param({"heads": (16, 2), "head_size": 64}, id="group8-d64"),
    pytest.param({"heads": (16, 1), "head_size": 64, "dtype": torch.float16}, id="group16-d64"),
    pytest.param(
        {"heads": (16, 1), "score": "manhattan", "selection": "kv_head"}, id="group16-manhattan"
    ),
    pytest.param({"head_size": 96}, id="d96"),
    pytest.param({"head_size": 96, "score": "manhattan", "block_size": 128}, id="d96-manhattan"),
    pytest.param({"head_size": 192, "block_size": 32}, id="d192"),
    pytest.param(
        {"head_size": 192, "score": "manhattan", "selection": "kv_head"}, id="d192-manhattan"
    ),
    pytest.param({"head_size": 256, "heads": (8, 1)}, id="d256"),
    pytest.param({"head_size": 256, "heads": (12, 1), "score": "manhattan"}, id="d256-group12"),
]
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 129, 0, 700)
BUDGETS = (1, 4, 8, 17, 1, 32, 64, 100, 5, 48)


@pytest.mark.parametrize("head_size", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("keys", ["normal", "huge", "zero"])
@pytest.mark.parametrize("score", ["dot", "manhattan"])
def test_append(backend, head_size, dtype, keys, score):
    case = Case((1, 40, 0, 130), (1,) * 4, (2, 2), head_size, 48, dtype, score, keys=keys)
    case.build(backend)
    page, layout = case.page.cpu(), case.params.layout
    expected = page.clone()
    ReferenceBackend().append(case.params, case.key, case.value, expected, case.slots)
    for plane in ("k", "v"):
        ours, theirs = getattr(layout, plane)(page), getattr(layout, plane)(expected)
        assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16)), plane
    # A code may differ where the transformed key sits on a threshold (another order of additions).
    x = sig.hadamard(case.key)
    t = sig.thresholds(x, case.params.coding)
    near = ((x.abs() - t).abs() <= 1e-6 * t).any(-1)  # [T, Hkv]
    block, offset = case.slots // layout.block_size, case.slots % layout.block_size
    for plane in ("hi", "lo"):
        same = sig.untile(getattr(layout, plane)(page)) == sig.untile(
            getattr(layout, plane)(expected)
        )
        assert (same.all(-1)[block, :, offset] | near).all(), plane
    ours, theirs = (layout.scale(p)[block, :, offset].float() for p in (page, expected))
    assert (((ours - theirs).abs() <= 2**-10 * theirs.abs() + 6e-8) | near).all()


def test_append_skips_negative_slots(backend):
    case = Case((64,), (1,)).build(backend)
    before = case.page.clone()
    slots = torch.full_like(case.slots, -1).cuda()
    backend.append(case.params, case.key.cuda() + 1, case.value.cuda(), case.page, slots)
    assert torch.equal(case.page.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keys", ["normal", "huge"])
def test_scan(backend, shape, keys):
    case = Case(LENGTHS, BUDGETS, keys=keys, **shape).build(backend)
    ours = backend.scan(case.params, *case.on_gpu()).cpu()
    theirs = ReferenceBackend().scan(
        case.params, case.query, case.page.cpu(), case.block_table, case.lens
    )
    assert ours.shape == theirs.shape
    # Exact, but for queries that sit on a rounding boundary: those differ by one level somewhere.
    wrong = (ours != theirs).any(-1)
    assert wrong.float().mean() <= 0.02, (
        wrong.nonzero()[:4],
        ours[wrong][:2, :8],
        theirs[wrong][:2, :8],
    )
    assert torch.isinf(ours[LENGTHS.index(0)]).all()


@pytest.mark.parametrize("length", [1, 31, 32, 33, 1000, 5000, 70000])
@pytest.mark.parametrize("values", ["normal", "ties", "equal", "signed"])
@pytest.mark.parametrize("sinks, recent", [(0, 0), (4, 32)])
def test_select(backend, length, values, sinks, recent):
    g = torch.Generator().manual_seed(length)
    shape = (3, 2, length)
    scores = torch.randn(shape, generator=g)
    if values == "ties":
        scores = torch.randint(-3, 3, shape, generator=g).float()
    elif values == "equal":
        scores = torch.full(shape, -2.0)
    elif values == "signed":
        scores = torch.where(torch.rand(shape, generator=g) < 0.5, 0.0, -0.0)
    lens = torch.tensor([length, length // 2 + 1, 0], dtype=torch.int32)
    budgets = torch.tensor([40, min(1200, length), 7], dtype=torch.int32)
    case = Case((1,), (1,), sinks=sinks, recent=recent).build(backend)
    ours = backend.select(case.params, scores.cuda(), lens.cuda(), budgets.cuda()).cpu()
    for row in range(3):
        for head in range(2):
            n = int(lens[row])
            expected = select_tokens(scores[row, head, :n], int(budgets[row]), sinks, recent)
            got = ours[row, head]
            assert torch.equal(got[got >= 0].long(), expected), (row, head)


def check_decode(backend, case, **kwargs):
    query, page, table, lens = case.on_gpu()
    output = torch.full_like(query, float("nan"))
    stats = torch.zeros(4, dtype=torch.int64, device="cuda")
    run = lambda: backend.decode(  # noqa: E731
        case.params, query, page, table, lens, case.limits.cuda(), output, stats, **kwargs
    )
    run()
    expected, counted = expected_decode(backend, case)
    got = output.float().cpu()
    assert got.isfinite().all()
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)
    limit = 2e-2 if case.dtype == torch.bfloat16 else 4e-3
    assert error.max() <= limit, (error.max(), (error > limit).nonzero()[:8])
    assert stats.tolist() == counted
    again = output.clone()
    for _ in range(3):
        output.fill_(float("nan"))
        run()
        assert torch.equal(again.view(torch.int16), output.view(torch.int16)), "not deterministic"


def expected_decode(backend, case):
    """Attention in float32 over the tokens that the reference selects from the CUDA scores."""
    params, group = case.params, case.params.group
    scores = backend.scan(params, *case.on_gpu()).cpu()
    page = case.page.cpu()
    out = torch.zeros(case.query.shape)
    stats = [0, 0, 0, 0]
    for row, (n, budget) in enumerate(zip(case.lengths, case.budgets, strict=True)):
        if n == 0:
            continue
        visible = min(n, params.sliding_window or n)
        sparse = budget < n and not params.sliding_window
        heads = params.num_query_heads
        stats[0 if sparse else 1] += 1
        stats[2] += n * heads
        stats[3] += (budget if sparse else visible) * heads
        for head in range(heads):
            tokens = torch.arange(n - visible, n)
            if sparse:
                score_head = head if params.selection == "query_head" else head // group
                tokens = select_tokens(scores[row, score_head, :n], budget, case.sinks, case.recent)
            k, v = ReferenceBackend._tokens(
                params, page, case.block_table[row], head // group, tokens
            )
            p = (k @ case.query[row, head].float() * params.softmax_scale).softmax(0)
            out[row, head] = p @ v
    return out, stats


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_shapes(backend, shape):
    check_decode(backend, Case(LENGTHS, BUDGETS, **shape).build(backend))


@pytest.mark.parametrize("selection", ["query_head", "kv_head"])
@pytest.mark.parametrize("score", ["dot", "manhattan"])
@pytest.mark.parametrize("keys", ["normal", "equal", "few", "huge", "zero", "drift"])
def test_decode_scores(backend, keys, score, selection):
    """Long enough for a sampled pivot; every distribution of scores is exact."""
    case = Case(
        (9000, 2048, 2500, 0, 5000),
        (256, 64, 2400, 9, 1),
        score=score,
        selection=selection,
        keys=keys,
    )
    check_decode(backend, case.build(backend))


@pytest.mark.parametrize("selection", ["query_head", "kv_head"])
def test_decode_sinks_and_window(backend, selection):
    case = Case((9000, 300, 64, 37), (256, 64, 40, 37), selection=selection, sinks=4, recent=32)
    check_decode(backend, case.build(backend))


@pytest.mark.parametrize("head_size", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("window", [0, 100])
def test_decode_dense(backend, head_size, window):
    lengths = (5000, 1, 100, 101, 0, 16, 3000)
    case = Case(lengths, (1 << 30,) * 7, (12, 4), head_size, window=window)
    check_decode(backend, case.build(backend))


def test_decode_dense_and_sparse(backend):
    lengths = (3000, 2000, 200, 9000, 1000)
    check_decode(backend, Case(lengths, (256, 5000, 200, 128, 999)).build(backend))


def test_decode_budget_beyond_the_candidate_list(backend):
    check_decode(backend, Case((30000, 20000), (20000, 9000), (2, 1)).build(backend))


def test_decode_long(backend):
    check_decode(backend, Case((140000, 66000), (256, 300), (4, 1)).build(backend))


def test_decode_many_rows(backend):
    g = torch.Generator().manual_seed(3)
    lengths = tuple(torch.randint(0, 400, (300,), generator=g).tolist())
    budgets = tuple(torch.randint(1, 300, (300,), generator=g).tolist())
    check_decode(backend, Case(lengths, budgets, (4, 2), 64).build(backend))


def test_gather(backend):
    case = Case((70, 0, 1, 200), (1,) * 4).build(backend)
    _, page, table, lens = case.on_gpu()
    key, value = torch.empty_like(case.key).cuda(), torch.empty_like(case.value).cuda()
    backend.gather(case.params, page, table, lens, key, value)
    assert torch.equal(key.cpu(), case.key)
    assert torch.equal(value.cpu(), case.value)


def test_graph_replay_with_other_lengths(backend):
    """A captured step serves every batch of its size: lengths and budgets are read on the device."""
    long = Case((9000, 2300, 40), (256, 128, 64)).build(backend)
    query, page, table, lens = long.on_gpu()
    budgets = long.limits.cuda()
    output = torch.zeros_like(query)
    stats = torch.zeros(4, dtype=torch.int64, device="cuda")
    args = (long.params, query, page, table, lens, budgets, output, stats)
    backend.reserve(long.params, 3, 16384)
    backend.decode(*args, max_context_len=16384)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.decode(*args, max_context_len=16384)
    for lengths, limits in [((8000, 2000, 0), (64, 3000, 8)), ((1, 2300, 33), (4, 100, 32))]:
        lens.copy_(torch.tensor(lengths))
        budgets.copy_(torch.tensor(limits))
        output.fill_(float("nan"))
        graph.replay()
        replayed = output.clone()
        backend.decode(*args)
        assert torch.equal(replayed, output)
        long.lengths, long.budgets = lengths, limits
        long.lens, long.limits = lens.cpu(), budgets.cpu()
        expected, _ = expected_decode(backend, long)
        assert torch.allclose(output.float().cpu(), expected, atol=2e-2, rtol=2e-2)


def test_refusals(backend):
    from vllm_adamas.errors import AdamasError

    case = Case((64,), (1,)).build(backend)
    query, page, table, lens = case.on_gpu()
    with pytest.raises(ValueError, match="context_lens"):
        backend.scan(case.params, query, page, table, lens.long())
    with pytest.raises(ValueError, match="query"):
        backend.scan(case.params, query.half(), page, table, lens)
    import dataclasses

    layout = PageLayout(128, 64, torch.uint8)
    fp8 = dataclasses.replace(case.params, layout=layout, fp8="e4m3")
    bytes_page = torch.zeros(2, 2, 64, layout.token_bytes, dtype=torch.uint8, device="cuda")
    with pytest.raises(AdamasError, match="fp8"):
        backend._page(fp8, bytes_page)
