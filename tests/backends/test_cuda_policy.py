"""What the CUDA backend decides and refuses on the host; no GPU is needed."""

from __future__ import annotations

import dataclasses
import json
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import SETS, Batch, Case
from common import ROOT, refused
from targets import REFERENCE

from vllm_adamas.backends.base import COUNTERS, MAX_GROUP
from vllm_adamas.backends.cuda import backend as cuda
from vllm_adamas.backends.cuda import policy
from vllm_adamas.backends.cuda.library import (
    FOR_HOPPER,
    FOR_OTHERS,
    LIBRARIES,
    Limits,
    library_of,
    limits,
    load,
)
from vllm_adamas.backends.cuda.policy import (
    BLOCKS_ALONE,
    LEAST_SHARED,
    MOST_ALONE,
    MOST_PER_WARP,
    MOST_SUMMED,
    THREE,
    Form,
    LaunchPlan,
    candidate_capacity,
    prefers_fused,
)
from vllm_adamas.budget import TokenBudget
from vllm_adamas.errors import AdamasError
from vllm_adamas.layout import PageLayout

RECORD = ROOT / "benchmarks" / "results" / "decode_gpu.json"
needs_library = pytest.mark.skipif(
    not LIBRARIES[FOR_HOPPER].exists(), reason="the CUDA library is not built"
)
needs_other_library = pytest.mark.skipif(
    not LIBRARIES[FOR_OTHERS].exists(), reason="the CUDA library for other GPUs is not built"
)


# the choice between one kernel and three


def recorded() -> list[tuple[str, dict, dict]]:
    """Where both forms ran over Gaussian keys: its name, the cell and its result.

    The policy does not see the keys, so it need not be right for all of them.
    """
    record = json.loads(RECORD.read_text())
    found = []
    for part, cells in record.items():
        for cell in cells if isinstance(cells, list) else ():
            if cell["keys"] != "gaussian":
                continue
            for name, result in cell.items():
                if isinstance(result, dict) and "fused" in result:
                    found.append((f"{part}, {name}", cell, result))
    return found


#: Cells that the policy is known to miss, and by how much: (part and result, launch, context, rows). A launch does not say
#: how long the contexts are; summed distances of short ones are up to 1.6 times faster in one kernel, and single rows of 1M
#: tokens up to 1.2 times faster in three.
MISSED = {
    ("contexts, dot max", 1048576, 262144, 1): 1.19,
    ("cells, manhattan kv_head", 131072, 32768, 32): 1.12,
    ("cells, manhattan kv_head", 32768, 32768, 32): 1.14,
}


def test_choice_of_the_fused_kernel_is_the_measured_one(recorder) -> None:
    """Of every cell where both forms ran, the policy takes the faster one, or loses little."""
    assert len(recorded()) > 20
    for name, cell, result in recorded():
        where = (name, cell["launch"], cell["context"], cell["rows"])
        form = Form(result["fused"]["cluster"], result["fused"]["warps"])
        fused = prefers_fused(
            form,
            cell["launch"],
            cell["budget"],
            maximum="max" in name,
        )
        assert result["runs"] == ("fused" if fused else "three"), where
        best = min(result["fused"]["us"], result["three"]["us"])
        assert result[result["runs"]]["us"] <= MISSED.get(where, 1.08) * best, where


def test_choice_follows_launch_and_budget(recorder) -> None:
    """The fused kernel lists up to so many tokens of a budget at once, and scans with a cluster per KV head."""
    most, longest = INVENTED.most_wanted, MOST_SUMMED

    def fused(form: Form, tokens: int, budget: int, maximum=False) -> bool:
        return prefers_fused(form, tokens, budget, maximum=maximum)

    assert fused(Form(8, 16), longest, most)
    assert not fused(Form(8, 16), longest, most + 1)
    assert not fused(Form(8, 16), longest + 1, most)
    assert not fused(THREE, 1024, 64)
    assert fused(Form(2, 8), 1024, MOST_PER_WARP * 8)
    assert not fused(Form(2, 8), 1024, MOST_PER_WARP * 8 + 1)
    assert fused(Form(2, 8), 1024, most, maximum=True)
    assert not fused(Form(2, 8), 1024, most + 1, maximum=True)
    assert fused(Form(BLOCKS_ALONE, 16), MOST_ALONE, most, maximum=True)
    assert not fused(Form(BLOCKS_ALONE, 16), MOST_ALONE + 1, most, maximum=True)
    assert fused(Form(BLOCKS_ALONE - 1, 16), INVENTED.max_context, most, maximum=True)


def test_rows_of_a_request_are_scanned_together(recorder) -> None:
    """Where that was faster; a batch that does not say whose its rows are has a scan for each."""
    backend = cuda.CudaBackend()
    layer = bound(backend, Case(heads=(2, 2), **SETS["max"]))
    short, long = LEAST_SHARED // 2, LEAST_SHARED
    for rows, requests, tokens, form, shared in [
        (48, 12, short, THREE, True),
        (48, 24, short, THREE, True),
        (48, 25, long, THREE, False),
        (30, 10, long, Form(1, 8), True),
        (30, 10, short, Form(1, 8), False),
        (30, 15, long, Form(1, 8), False),
        (15, 5, long, Form(1, 16), False),
        (48, 48, long, THREE, False),
    ]:
        assert backend.fused_form(layer, rows, torch.bfloat16, tokens) == form
        positions = torch.arange(rows, dtype=torch.int32)
        for known in (positions, None):
            decode(backend, layer, (2000,) * rows, LEAST_SHARED // 64, tokens, known, requests)
            passed = recorder.calls["decode"][-1][POSITIONS]
            assert (passed is positions) == (shared and known is not None)


#: The same of drafted steps: (context, requests, positions). Launches of 8K are as those of 32K, and those of 128K too.
MISSED_DRAFTS = {(8192, 8, 4): 1.29, (131072, 1, 4): 1.11, (131072, 1, 8): 1.14}


def test_choice_of_the_shared_scan_is_the_measured_one(recorder) -> None:
    """Of every drafted step that was measured, what ran was the fastest way, or lost little."""
    cells = json.loads(RECORD.with_name("drafts_gpu.json").read_text())["cells"]
    assert {"fused", "shared"} == {cell["runs"] for cell in cells}
    for cell in cells:
        where = (cell["context"], cell["requests"], cell["positions"])
        ways = {name: cell[name]["us"] for name in ("fused", "three", "shared") if name in cell}
        assert ways[cell["runs"]] <= MISSED_DRAFTS.get(where, 1.08) * min(ways.values()), where


# plans, with a library that computes nothing


POSITIONS, MAX_SEQ_LEN = 6, 10  #: their places among the arguments of the library's decode
INVENTED = Limits(
    max_context=1 << 20,
    max_block=96,
    max_rows=50,
    max_step=1 << 22,
    max_group=4,
    max_cluster=5,
    most_wanted=1024,
    max_groups=1 << 10,
)


class Recorder:
    """Stands for the library: keeps the arguments of every call, and runs 60 blocks of 8 warps at once, 30 of 16, in clusters of up to 5."""

    def __init__(self):
        self.calls: dict[str, list[tuple]] = {}
        self.loaded: set[str] = set()

    def load(self, library: str = FOR_HOPPER) -> Recorder:
        self.loaded.add(library)
        return self

    def __getattr__(self, name: str):
        def call(*args):
            self.calls.setdefault(name, []).append(args)
            answers = {
                "scan_shares": True,
                "max_sample_bits": 12,
                "sample_bits": 11,
                "most_sample_rank": 20,
            }
            if name == "workspace_bytes":
                return args[-2] * args[-1]
            if name == "fused_clusters":
                cluster, warps = args[-2:]
                return 480 // warps // cluster if cluster <= INVENTED.max_cluster else 0
            return answers.get(name, 0)

        return call


def on_hopper(monkeypatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    found = Recorder()
    for module in (cuda, policy):
        monkeypatch.setattr(module, "load", found.load)
        monkeypatch.setattr(module, "limits", lambda library=FOR_HOPPER: INVENTED)
    on_hopper(monkeypatch)
    return found


def decode(
    backend,
    layer,
    lengths: tuple[int, ...],
    columns: int,
    max_seq_len: int | None,
    positions: torch.Tensor | None = None,
    num_requests: int | None = None,
):
    """A step whose tensors are as long as they say, and hold nothing."""
    rows, params = len(lengths), layer.params
    query = torch.zeros(rows, params.num_query_heads, params.layout.head_size).bfloat16()
    batch = cuda.DecodeBatch(
        torch.zeros(rows, columns, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        torch.ones(rows, dtype=torch.int32),
        max_seq_len,
        positions,
        num_requests,
    )
    backend.decode(
        layer, query, batch, torch.empty_like(query), torch.zeros(COUNTERS, dtype=torch.int64)
    )


def bound(backend, case: Case) -> cuda.CudaLayer:
    layout = case.params.layout
    shape = (4, case.heads[1], layout.block_size, layout.token_bytes // layout.dtype.itemsize)
    return backend.bind(case.params, torch.zeros(shape, dtype=layout.dtype))


def test_rounded_contexts() -> None:
    steps = list(policy.rounded_contexts(1 << 20))
    assert steps[0] == policy.LEAST_CONTEXT and steps[-1] == 1 << 20
    assert steps == sorted(set(steps)) and len(steps) == 41  # four per octave, and the first one
    for tokens in (0, 1, 1024, 1025, 1281, 40960, 40961, (1 << 20) - 1, *steps):
        found = policy.rounded_context(tokens)
        assert found in steps and tokens <= found <= max(1024, tokens * 5 / 4)
        assert policy.rounded_context(found) == found


def test_growing_contexts_share_plans(recorder) -> None:
    """A step is looked at once per kind of layer and quarter of an octave; kernels get the bound as it is."""
    backend = cuda.CudaBackend()
    layers = [bound(backend, Case(heads=(8, 2))) for _ in range(3)]
    for longest in range(1025, 1281, 15):
        for layer in layers:
            decode(backend, layer, (7, longest), 100, longest)
    assert layers[0].plans is layers[2].plans and len(layers[0].plans) == 1
    assert len(recorder.calls["workspace_bytes"]) == 1
    asked = [args[MAX_SEQ_LEN] for args in recorder.calls["decode"]]
    assert asked == [n for n in range(1025, 1281, 15) for _ in layers]
    decode(backend, layers[0], (7, 1281), 100, 1281)
    assert len(layers[0].plans) == 2
    other = bound(backend, Case(heads=(8, 4)))
    decode(backend, other, (7, 1281), 100, 1281)
    assert len(layers[0].plans) == 2 and len(other.plans) == 1


def test_layers_with_other_budgets_have_other_plans(recorder) -> None:
    """1 token and the whole context, 1.0, too. The workspace of the largest holds them all."""
    backend, params = cuda.CudaBackend(), Case(heads=(2, 2)).params
    kinds = [dataclasses.replace(params, budget=TokenBudget(x)) for x in (256, 2048, 1, 1.0, 256)]
    pages = bound(backend, Case(heads=(2, 2))).kv_cache
    layers = [backend.bind(kind, pages) for kind in kinds]
    plans = [backend.plan(layer, 1, torch.bfloat16, 4096) for layer in layers]
    assert [plan.form for plan in plans] == [Form(5, 16), THREE, Form(5, 16), THREE, Form(5, 16)]
    assert layers[0].plans is layers[4].plans
    assert len({id(layer.plans) for layer in layers}) == 4


def test_the_bound_of_a_step(recorder) -> None:
    """What the batch says, but never more than its block table; the longest context without either."""
    backend = cuda.CudaBackend()
    layer = bound(backend, Case(heads=(1, 1)))
    for columns, max_seq_len, expected in (
        (4, None, 256),
        (4, 100, 100),
        (4, 5000, 256),
        (1 << 15, None, 1 << 20),
    ):
        decode(backend, layer, (3,), columns, max_seq_len)
        assert recorder.calls["decode"][-1][MAX_SEQ_LEN] == expected


def test_a_plan_takes_the_form_that_the_policy_prefers(recorder) -> None:
    """Large blocks first, in one wave: of the stand-in's 60 blocks of 8 or 30 of 16."""
    backend = cuda.CudaBackend()
    layer = bound(backend, Case(heads=(2, 2), selection="kv_head"))
    for rows, longest, form in (
        (1, 4096, Form(5, 16)),
        (1, MOST_SUMMED, Form(5, 16)),
        (1, 1 << 18, THREE),
        (7, 4096, Form(2, 16)),
        (15, 4096, Form(1, 16)),
        (16, 4096, Form(1, 8)),
        (30, 4096, Form(1, 8)),
        (31, 4096, THREE),
    ):
        assert backend.plan(layer, rows, torch.bfloat16, longest).form == form
    assert backend.plan(layer, 1, torch.bfloat16, 1 << 17).sample_bits == 11
    plan = LaunchPlan(Form(5, 16), False, 11, 4096, 4096)
    assert backend.plan(layer, 1, torch.bfloat16, 4096) == plan


def test_the_library_knows_the_softmax_of_a_layer(recorder) -> None:
    batch = Case(soft_cap=50.0, learned_sinks=(0, 1)).build(REFERENCE)
    batch.bound(cuda.CudaBackend())
    [(_, description, _, sinks)] = recorder.calls["bind"]
    assert description["logits_soft_cap"] == 50.0
    assert sinks is batch.params.sinks is not None


def test_what_the_kernels_do_not_hold(recorder) -> None:
    """The library's limits decide, whatever they are."""
    backend = cuda.CudaBackend()
    params = Case(heads=(2, 1)).params
    backend.workspace_bytes(params, 4, 1 << 20)
    refused(lambda: backend.workspace_bytes(params, 1, (1 << 20) + 1), "1048577 tokens", "triton")
    refused(lambda: backend.workspace_bytes(params, 51, 1), "51 rows", "--max-num-seqs 50")
    refused(lambda: backend.workspace_bytes(params, 5, 1 << 20), "--max-model-len", str(1 << 22))
    layer = bound(backend, Case(heads=(1, 1)))
    with pytest.raises(AdamasError, match="51 rows"):
        decode(backend, layer, (1,) * 51, 1, None)
    refused(lambda: bound(backend, Case(block_size=112)), "112 tokens", "--block-size", "triton")
    refused(lambda: bound(backend, Case(heads=(5, 1))), "5 query heads", "4")
    refused(lambda: bound(backend, Case(dtype=torch.float32)), "float32", "triton")


def test_without_the_library(monkeypatch) -> None:
    for cached in (load, limits):
        cached.cache_clear()
    for name in LIBRARIES:
        missing = Path(f"/no/libadamas_{name}.so")
        monkeypatch.setitem(LIBRARIES, name, missing)
        for ask in (limits, cuda.CudaBackend, partial(policy.check_block, 16)):
            refused(partial(ask, name), missing.name, "ADAMAS_BUILD_CUDA=1", "kernels=triton")


# other GPUs than Hopper


def test_the_library_of_a_gpu(recorder, monkeypatch) -> None:
    """Each GPU loads one library, and asks no other one for a plan."""
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)):
        on_hopper(monkeypatch, capability)
        recorder.loaded.clear()
        backend = cuda.CudaBackend()
        backend.plan(bound(backend, Case(heads=(2, 2))), 1, torch.bfloat16, 4096)
        expected = FOR_HOPPER if capability == (9, 0) else FOR_OTHERS
        assert recorder.loaded == {library_of(capability)} == {expected}


def test_the_log_names_the_code_that_runs(recorder, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert cuda.CudaBackend().description == "cuda (sm_90a, a GPU)"
    assert cuda.CudaBackend(FOR_OTHERS).description == "cuda (sm_90, a GPU)"
    on_hopper(monkeypatch, (8, 9))
    assert cuda.CudaBackend().description == "cuda (sm_89, a GPU)"


def test_gpus_that_are_too_old(recorder, monkeypatch) -> None:
    on_hopper(monkeypatch, (7, 5))
    refused(cuda.CudaBackend, "8.0", "7.5", "another attention backend")


@needs_other_library
def test_other_gpus_never_take_the_fused_kernel(monkeypatch) -> None:
    """Their library says of every form that none of its clusters runs."""
    on_hopper(monkeypatch, (8, 0))
    backend = cuda.CudaBackend()
    layer = bound(backend, Case(heads=(2, 2), selection="kv_head"))
    forms = [Form(cluster, warps) for warps in policy.WARPS for cluster in policy.CLUSTERS]
    found = {backend.fused_clusters(layer, torch.bfloat16, 4096, form) for form in forms}
    assert found == {0} and backend.fused_form(layer, 1, torch.bfloat16, 4096) == THREE


@needs_library
@needs_other_library
def test_limits_of_other_gpus_are_no_higher(recorder) -> None:
    most, fewer = (Limits(*map(int, load(name).limits().values())) for name in LIBRARIES)
    assert all(a >= b for a, b in zip(most, fewer, strict=True))
    assert fewer.max_group == MAX_GROUP


# candidates: the library says what encode aims at


@needs_library
@pytest.mark.parametrize("most_sample_bits", [9, 10, 12])
@pytest.mark.parametrize("budget", [1, 64, 2048, 100000])
def test_candidates_of_longer_contexts_are_no_fewer(budget: int, most_sample_bits: int) -> None:
    """A workspace that is reserved for the longest context serves every step."""
    lengths = [1, 1000, *policy.rounded_contexts(1 << 20), 65537, 99999]
    sizes = [candidate_capacity(n, budget, most_sample_bits) for n in sorted(lengths)]
    assert sizes == sorted(sizes) and sizes[-1] <= policy.MOST_CANDIDATES


@needs_library
@pytest.mark.parametrize("length", [8192, 1 << 16, 1 << 18, 1 << 20])
@pytest.mark.parametrize("budget", [64, 256, 1024])
def test_candidates_hold_what_encode_aims_at(length: int, budget: int) -> None:
    sample = 1 << load().sample_bits(length, 12)
    rank = load().most_sample_rank(budget, sample, length)
    most = rank + rank // 2  # the rank that find_pivot accepts
    assert (most + 5 * most**0.5) * length / sample <= candidate_capacity(length, budget, 12)


# arguments: the library checks them before it looks for a GPU


@pytest.fixture
def layer(monkeypatch, batch) -> cuda.CudaLayer:
    on_hopper(monkeypatch)
    return batch.bound(cuda.CudaBackend())


@pytest.fixture
def batch() -> Batch:
    if not LIBRARIES[FOR_HOPPER].exists():
        pytest.skip("the CUDA library is not built")
    nothing = SimpleNamespace(bind=lambda *args: None, append=lambda *args: None)
    return Case((200, 64), 16, padding=0).build(nothing)


ARGUMENTS = {
    "append": ("key", "value", "slots"),
    "scan": ("query", "block_table", "seq_lens", "scores", "work"),
    "decode": (
        "query",
        "output",
        "block_table",
        "seq_lens",
        "budgets",
        "positions",
        "stats",
        "lse",
        "work",
    ),
    "gather": ("block_table", "seq_lens", "key", "value"),
}
#: Of a decode step: max_seq_len, cluster, warps, sample_bits, capacity, overlap, stages
LAUNCH = (200, 0, 0, 10, 4096, False, cuda.ALL_STAGES)


def call(layer: cuda.CudaLayer, batch: Batch, operation: str, **changes) -> None:
    """An operation of the library with some of its tensors changed."""
    tensors = {name: getattr(batch, name, None) for name in ARGUMENTS[operation]}
    made = {
        "output": torch.empty_like(batch.query),
        "stats": torch.zeros(COUNTERS, dtype=torch.int64),
        "scores": torch.zeros(2, batch.params.num_score_heads, 200),
        "work": torch.empty(1, dtype=torch.uint8),
    }
    tensors |= {name: x for name, x in made.items() if name in tensors}
    tensors |= {name: change(tensors[name]) for name, change in changes.items()}
    numbers = LAUNCH if operation == "decode" else ()
    getattr(load(), operation)(layer.native, *tensors.values(), *numbers)


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """The same shape, one element behind an aligned address."""
    return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view_as(x)


@pytest.mark.parametrize("operation", ARGUMENTS)
def test_fitting_arguments_need_a_gpu(layer, batch, operation: str) -> None:
    """Of tensors on a CPU nothing else is wrong."""
    with pytest.raises(ValueError, match=r"^kv_cache: expected a layer .* CUDA device$"):
        call(layer, batch, operation)


@pytest.mark.parametrize("operation", ["append", "decode"])
def test_padding_may_follow(layer, batch, operation: str) -> None:
    """Rows behind those of the batch, tokens behind the slots."""
    names = {"append": ("key", "value"), "decode": ("query", "output")}[operation]
    longer = {name: lambda x: torch.cat((x, x)) for name in names}
    with pytest.raises(ValueError, match="CUDA device"):
        call(layer, batch, operation, **longer)


STEP = ("scan", "decode", "gather")


@pytest.mark.parametrize(
    ("operations", "name", "change"),
    [
        (("append",), "slots", torch.Tensor.int),
        (("append",), "slots", lambda slots: slots[None]),
        (("append",), "key", torch.Tensor.half),
        (("append", "gather"), "value", torch.Tensor.float),
        (("append",), "value", lambda value: value[:-1]),
        (("append", "gather"), "key", lambda key: key[:, :1]),
        (("scan", "decode"), "query", torch.Tensor.half),
        (("scan", "decode"), "query", lambda query: query[:1]),
        (("scan", "decode"), "query", lambda query: query[..., :64]),
        (("scan", "decode"), "query", lambda query: query.transpose(1, 2).contiguous().mT),
        (("scan", "decode"), "query", unaligned),
        (("decode",), "output", unaligned),
        (("decode",), "output", torch.Tensor.float),
        (("decode",), "output", lambda output: output[:1]),
        (("decode",), "budgets", torch.Tensor.long),
        (("decode",), "budgets", lambda budgets: budgets[:1]),
        (("decode",), "positions", lambda _: torch.zeros(2, dtype=torch.int64)),
        (("decode",), "positions", lambda _: torch.zeros(1, dtype=torch.int32)),
        (("decode",), "positions", lambda _: torch.zeros(2, dtype=torch.int32)),  # a set per head
        (("decode",), "stats", torch.Tensor.int),
        (("decode",), "stats", lambda stats: stats[:4]),
        (("decode",), "lse", lambda _: torch.zeros(2, 8, dtype=torch.float64)),
        (("decode",), "lse", lambda _: torch.zeros(2, 7)),
        (("scan",), "scores", torch.Tensor.double),
        (("scan",), "scores", lambda scores: scores[:, :2]),
        (STEP, "seq_lens", torch.Tensor.long),
        (STEP, "seq_lens", lambda lens: lens.repeat_interleave(2)[::2]),
        (STEP, "block_table", torch.Tensor.long),
        (STEP, "block_table", lambda table: table[:1]),
        (STEP, "block_table", lambda table: table.T.contiguous().T),
        (("gather",), "key", unaligned),
    ],
)
def test_arguments_that_do_not_fit(layer, batch, operations, name: str, change) -> None:
    for operation in operations:
        with pytest.raises(
            ValueError, match="^slot_mapping: " if name == "slots" else f"^{name}: "
        ):
            call(layer, batch, operation, **{name: change})


def test_a_sentence_says_what_was_given(layer, batch) -> None:
    with pytest.raises(
        ValueError, match=r"got float16 \[2, 8, 128\] with strides \[1024, 128, 1\]$"
    ):
        call(layer, batch, "decode", query=torch.Tensor.half)


def test_steps_that_the_kernels_do_not_hold(layer, batch) -> None:
    """The library looks for itself: a plan holds for more than one length."""
    most = limits()
    rows = most.max_rows + 1
    many = dataclasses.replace(
        batch,
        query=batch.query[:1].expand(rows, -1, -1),
        block_table=batch.block_table[:1].expand(rows, -1),
        seq_lens=torch.zeros(rows, dtype=torch.int32),
        budgets=torch.zeros(rows, dtype=torch.int32),
    )
    with pytest.raises(ValueError, match="more rows"):
        call(layer, many, "decode")


def test_kv_caches_that_the_kernels_do_not_read(layer, batch) -> None:
    backend, params = cuda.CudaBackend(), batch.params
    layout, pages = params.layout, batch.kv_cache
    for wrong in (pages[..., :-1], pages[:, :, :16], pages.transpose(1, 2)):
        with pytest.raises(AdamasError, match="layout"):
            backend.bind(params, wrong)
    with pytest.raises(ValueError, match=r"^kv_cache: expected \[blocks, Hkv, N, C\]"):
        backend.bind(params, pages[:, :1])
    shifted = torch.zeros(pages.numel() + 1, dtype=layout.dtype)[1:].view(pages.shape)
    with pytest.raises(ValueError, match=r"^kv_cache: .* 16 bytes$"):
        backend.bind(params, shifted)
    # Memory that nothing touches.
    memory = torch.empty((1 << 30) + (1 << 22), dtype=layout.dtype)
    strides = (1 << 30, 1 << 20, pages.shape[3], 1)
    large = memory.as_strided((2, 2, 64, pages.shape[3]), strides)
    with pytest.raises(ValueError, match="2 GiB"):
        backend.bind(params, large)


def test_key_means_that_do_not_fit(layer, batch) -> None:
    backend = cuda.CudaBackend()
    for mean in (torch.zeros(2, 64), torch.zeros(2, 128).double(), torch.zeros(128, 2).T):
        params = dataclasses.replace(batch.params, key_mean=mean)
        with pytest.raises(ValueError, match=r"^key_mean: expected contiguous float32"):
            backend.bind(params, batch.kv_cache)


def test_sinks_that_do_not_fit(layer, batch) -> None:
    heads, backend = batch.params.num_query_heads, cuda.CudaBackend()
    for sinks in (
        torch.zeros(heads + 1),
        torch.zeros(heads).double(),
        torch.zeros(heads, 1),
        torch.zeros(2 * heads)[::2],
    ):
        params = dataclasses.replace(batch.params, sinks=sinks)
        with pytest.raises(ValueError, match=r"^sinks: expected contiguous float32 \[Hq\]"):
            backend.bind(params, batch.kv_cache)


def test_a_layer_keeps_its_key_mean_and_not_its_pages(layer, batch) -> None:
    mean, pages = torch.zeros(2, 128), batch.kv_cache.clone()
    params = dataclasses.replace(batch.params, key_mean=mean)
    held = cuda.CudaBackend().bind(params, pages)
    assert held.is_bound_to(pages)
    gone = weakref.ref(pages)
    del pages
    assert gone() is None
    with pytest.raises(RuntimeError, match="bind it again"):
        held.kv_cache  # noqa: B018


@needs_library
def test_groups_that_serving_accepts_are_held() -> None:
    assert limits().max_group >= MAX_GROUP


def test_blocks_as_large_as_the_kernels_divide_by(layer) -> None:
    backend, most = cuda.CudaBackend(), limits().max_block
    for block_size, fits in ((most, True), (most + 16, False)):
        layout = PageLayout(64, block_size, torch.bfloat16)
        params = dataclasses.replace(Case(heads=(1, 1), head_size=64).params, layout=layout)
        pages = torch.empty(1, 1, block_size, layout.token_bytes // 2, dtype=torch.bfloat16)
        if fits:
            assert backend.bind(params, pages).is_bound_to(pages)
        else:
            refused(lambda p=params, x=pages: backend.bind(p, x), f"{block_size} tokens", "triton")
