"""What the tests of operations run on: every backend of the host, and the cases that each of them takes."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from cases import (
    CASES,
    MIXED,
    MIXED_BUDGETS,
    SINKS,
    TOLERANCE,
    Batch,
    Case,
    exact_weights,
    relative_error,
)
from hopper import ON_HOPPER

from vllm_adamas.backends.base import Backend
from vllm_adamas.backends.cuda.backend import CudaBackend
from vllm_adamas.backends.cuda.library import FOR_HOPPER, FOR_OTHERS, LIBRARIES, limits
from vllm_adamas.backends.cuda.policy import HEAD_SIZES, THREE, Form
from vllm_adamas.backends.reference import ReferenceBackend
from vllm_adamas.backends.reference.backend import select_tokens
from vllm_adamas.dtypes import ELEMENTS

REFERENCE = ReferenceBackend()
COMPILED = torch.cuda.is_available()  #: Triton's kernels; without a GPU they are interpreted

#: What /proc/cpuinfo must list for each instruction set of the CPU kernels.
ISAS = {
    "portable": "",
    "avx2": "avx2 fma f16c",
    "avx512": "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_bitalg avx512_vpopcntdq "
    "avx512vbmi avx512_vnni",
}
#: Forms of a CUDA step.
FORMS = (THREE, Form(1, 8), Form(3, 8), Form(1, 16), Form(16, 16))
#: Start of the CUDA workspace that is zero between steps (kTickets of csrc/sm90/params.h).
TRUSTED_BYTES = 4096

SMALL = (33, 1, 0, 70, 17)  #: contexts, for the sake of Triton's interpreter
SMALL_BUDGETS = (8, 1, 4, 69, 40)
#: Every dimension of the page and of the method at least once; on a GPU Triton runs CASES too.
SMALL_CASES = {
    "group1": Case(SMALL, SMALL_BUDGETS, (2, 2), 64),
    "group2-shared": Case(SMALL, SMALL_BUDGETS, (4, 2), 128, selection="kv_head"),
    "group3-manhattan": Case(SMALL, SMALL_BUDGETS, (6, 2), 96, 32, score="manhattan"),
    "group5-shared": Case(SMALL, 8, (5, 1), 96, 48, torch.float16, selection="kv_head"),
    "group6-manhattan": Case(
        SMALL, 8, (6, 1), 192, 16, score="manhattan", selection="kv_head", centred=True, seed=2
    ),
    "group7": Case(SMALL, 8, (7, 1), 64, 128, torch.float32),
    "group16": Case(SMALL, SMALL_BUDGETS, (16, 1), 256, 16),
    "group16-manhattan": Case(SMALL, 8, (16, 1), 64, 16, score="manhattan", selection="kv_head"),
    "d80-max": Case(
        SMALL, SMALL_BUDGETS, (4, 2), 80, 16, selection="kv_head", combine="max", centred=True
    ),
    "d112-manhattan": Case(SMALL, 8, (2, 1), 112, 32, torch.float16, score="manhattan"),
    "d512": Case(SMALL, SMALL_BUDGETS, (4, 1), 512, 16, selection="kv_head"),
    "e4m3": Case(SMALL, SMALL_BUDGETS, (3, 1), 64, fp8="e4m3", selection="kv_head"),
    "e4m3-d80": Case(SMALL, 8, (2, 1), 80, 32, fp8="e4m3"),
    "e5m2": Case(SMALL, SMALL_BUDGETS, (2, 1), 96, 32, torch.float16, fp8="e5m2"),
    "huge-e4m3": Case(SMALL, 8, (2, 1), 64, fp8="e4m3", data="huge"),  # saturates
    "few": Case(SMALL, 20, (4, 2), 64, data="few", selection="kv_head"),
    "zero": Case(SMALL, 20, (2, 1), 64, data="zero"),
    "tiny": Case(SMALL, 8, (2, 1), 64, 32, torch.float16, data="tiny", score="manhattan"),
    "sinks": Case((90, 65, 40, 0), 40, (2, 1), 64, sinks=4, recent=8),
    "sliding": Case((90, 1, 39, 40, 41, 0), 16, (4, 2), 64, window=40),
    "forced": Case((90, 12, 13, 5, 40, 0), (8, 5, 0, 3, -5, 1), (2, 1), 64, sinks=4, recent=8),
    "little-budget": Case(SMALL, (0, -(2**31), 1, -1, 2**31 - 1), (4, 2), 64, selection="kv_head"),
    "centred": Case(SMALL, 8, (4, 1), 128, centred=True, selection="kv_head"),
    "group3-max": Case(SMALL, SMALL_BUDGETS, (6, 2), 64, selection="kv_head", combine="max"),
    "group16-max": Case(SMALL, 8, (16, 1), 96, 16, selection="kv_head", combine="max", seed=3),
    "few-max": Case(SMALL, 20, (2, 2), 64, data="few", selection="kv_head", combine="max"),
    "long-max": Case((1100, 1024), 300, (2, 1), 64, selection="kv_head", combine="max"),
    "long": Case((2500,), (300,), (2, 1), 64, selection="kv_head"),
    "empty": Case((0, 0), 4, (2, 1), 64),
    "learned-sinks": Case(SMALL, SMALL_BUDGETS, (6, 2), 64, learned_sinks=SINKS),
    "learned-sinks-group8-d256": Case(
        SMALL, SMALL_BUDGETS, (8, 1), 256, selection="kv_head", learned_sinks=SINKS
    ),
    "learned-sinks-extreme": Case(SMALL, 8, (4, 2), 64, learned_sinks=(-1e4, 1e4)),
    "soft-cap": Case(SMALL, SMALL_BUDGETS, (6, 2), 64, dtype=torch.float32, soft_cap=1.5),
    "soft-cap-group8-d256": Case(
        SMALL, 8, (8, 1), 256, selection="kv_head", combine="max", soft_cap=1.5
    ),
    "soft-cap-huge": Case(SMALL, 8, (2, 1), 64, data="huge", soft_cap=50.0),
    "soft-cap-sinks": Case(
        SMALL, SMALL_BUDGETS, (8, 1), 64, selection="kv_head", soft_cap=1.5, learned_sinks=SINKS
    ),
    "soft-cap-sinks-e4m3": Case(
        SMALL, SMALL_BUDGETS, (3, 1), 256, fp8="e4m3", soft_cap=1.5, learned_sinks=SINKS
    ),
    "soft-cap-sinks-sliding": Case(
        (90, 1, 39, 41, 0), 16, (4, 2), 64, window=40, soft_cap=1.5, learned_sinks=SINKS
    ),
}
#: Names that stand in both lists mean the small case.
TRITON_CASES = {**(CASES if COMPILED else {}), **SMALL_CASES}

#: Queries in fp8 pages' cases are bf16 or fp16, and the kernels have no float32 and fewer head sizes.
CUDA_CASES = {
    name: case if case.dtype != torch.float32 else dataclasses.replace(case, dtype=torch.bfloat16)
    for name, case in CASES.items()
    if (case.dtype != torch.float32 or case.fp8) and case.head_size in HEAD_SIZES
} | {
    "block16": Case((1, 15, 16, 17, 700, 0), 30, heads=(6, 1), block_size=16),
    "block144": Case((1, 143, 145, 700), 30, block_size=144),
    "group7": Case(heads=(7, 1), score="manhattan"),
    "group12": Case(heads=(12, 1), head_size=256, score="manhattan"),
    "group16": Case(heads=(16, 1), head_size=64, dtype=torch.float16),
    "group16-kv_head": Case(heads=(16, 1), score="manhattan", selection="kv_head"),
    "group16-e4m3": Case(heads=(16, 1), selection="kv_head", fp8="e4m3"),
    "group9": Case(heads=(9, 1)),
    "group5-max": Case(
        (5, 400, 200), (4, 100, 7), heads=(5, 1), selection="kv_head", combine="max"
    ),
    "group12-max": Case(heads=(12, 1), head_size=64, selection="kv_head", combine="max"),
    "group16-d256-max": Case(
        heads=(16, 1), head_size=256, fp8="e4m3", selection="kv_head", combine="max"
    ),
    "block144-max": Case(
        (1, 143, 145, 700), 30, block_size=144, selection="kv_head", combine="max"
    ),
    "group10-d256": Case(heads=(10, 1), head_size=256),
    "group13-manhattan": Case(heads=(13, 1), score="manhattan"),
    "group15-d96": Case(heads=(15, 1), head_size=96, dtype=torch.float16),
    "e4m3-d192": Case(fp8="e4m3", head_size=192, heads=(4, 1)),
    "e5m2-d256": Case(fp8="e5m2", head_size=256, heads=(4, 1), score="manhattan"),
    "soft-cap-sinks-group16": Case(
        MIXED, MIXED_BUDGETS, (16, 1), selection="kv_head", soft_cap=1.5, learned_sinks=SINKS
    ),
    "soft-cap-sinks-d96": Case(
        MIXED, MIXED_BUDGETS, (9, 3), 96, dtype=torch.float16, soft_cap=1.5, learned_sinks=SINKS
    ),
    "sinks-group12": Case((300, 65, 40, 0), 40, (12, 1), sinks=4, recent=8, score="manhattan"),
}
TAKES = {"cpu": CASES, "triton": TRITON_CASES, "cuda": CUDA_CASES}

needs_hopper = [
    *ON_HOPPER,
    pytest.mark.skipif(not LIBRARIES[FOR_HOPPER].exists(), reason="the CUDA library is not built"),
]
#: The library for other GPUs, which has code for Hopper so that it is tested.
needs_other_library = pytest.mark.skipif(
    not LIBRARIES[FOR_OTHERS].exists(), reason="the CUDA library for other GPUs is not built"
)
needs_triton = [pytest.mark.gpu] if COMPILED else []


def cpu_flags() -> set[str]:
    if platform.machine() != "x86_64":
        return set()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next(line for line in lines if line.startswith("flags")).partition(":")[2].split())


def on_cpu(batch: Batch) -> Batch:
    """The same pages and rows, for the reference."""
    tensors = {name: getattr(batch.params, name) for name in ("key_mean", "sinks")}
    tensors = {name: x.cpu() for name, x in tensors.items() if x is not None}
    params = dataclasses.replace(batch.params, **tensors)
    moved = {
        field.name: getattr(batch, field.name).cpu()
        for field in dataclasses.fields(batch)
        if field.name != "params"
    }
    return Batch(params=params, **moved)


@dataclass
class Target:
    """A backend as the tests run it. This one stands for the CPU kernels of an instruction set.

    Args:
        device: where its tensors are.
        options: of its ``decode``.
    """

    backend: Backend
    device: str = "cpu"
    options: dict = field(default_factory=dict)

    decode_dtype = None  #: of the output; None is that of the queries
    gather_dtype = None  #: of K and V; None is that of the queries
    slack = 1.0  #: factor of the tolerance
    may_select_again = False  #: whether there is a slow path for scores that mislead the fast one
    repeats = 0  #: of a step, whose bits must be the same

    def build(self, case: Case) -> Batch:
        return case.build(self.backend, self.device)

    def skip_unless_fits(self, batch: Batch) -> None:
        """Skips the test of a shape that a form of the step does not take."""

    def poison_workspace(self) -> None:
        """Fills with NaN what a step may not rely on."""

    def decode(self, batch: Batch, **kwargs) -> tuple[torch.Tensor, list[int]]:
        return batch.decode(self.backend, self.decode_dtype, **self.options, **kwargs)

    def expected_decode(self, batch: Batch) -> tuple[torch.Tensor, list[int], torch.Tensor]:
        """Output float32 ``[R, Hq, D]`` and counters of the reference on the same pages.

        Returns:
            Last, heads to compare, bool ``[R, Hq]``: those whose query code does not depend on the
            order of additions.
        """
        host = on_cpu(batch)
        output, stats = host.decode(REFERENCE, torch.float32)
        rows, params = len(host.lengths), host.params
        per_set = params.num_query_heads // params.num_score_heads
        return output[:rows], stats, ~host.ambiguous().repeat_interleave(per_set, 1)


class _KeepsWorkspace(Target):
    def poison_workspace(self) -> None:
        for memory in self.backend._workspace.buffers.values():
            memory[TRUSTED_BYTES:].fill_(0xFF)


class TritonTarget(_KeepsWorkspace):
    # The interpreter truncates to bf16 where a GPU rounds; what the kernels compute is float32.
    decode_dtype = None if COMPILED else torch.float32
    gather_dtype = torch.float32

    def build(self, case: Case) -> Batch:
        return _built_by_triton(case)


@cache
def _built_by_triton(case: Case) -> Batch:
    """Interpreted appends are slow, and no test changes what it is given."""
    from vllm_adamas.backends.triton import TritonBackend

    return case.build(TritonBackend(), "cuda" if COMPILED else "cpu")


class CudaTarget(_KeepsWorkspace):
    slack = 1.5  # weights are rounded to the dtype of the values
    may_select_again = True
    repeats = 3

    def skip_unless_fits(self, batch: Batch, longest: int | None = None) -> None:
        longest = longest or batch.block_table.shape[1] * batch.params.layout.block_size
        layer, dtype = batch.bound(self.backend), batch.query.dtype
        form, groups = (
            self.options.get("form", THREE),
            len(batch.lengths) * layer.params.num_kv_heads,
        )
        if form != THREE and (
            groups > limits(self.backend.library).max_groups
            or not self.backend.fused_clusters(layer, dtype, longest, form)
        ):
            pytest.skip("the fused kernel does not take this step")

    def expected_decode(self, batch: Batch) -> tuple[torch.Tensor, list[int], torch.Tensor]:
        """Exact attention over the tokens that the reference selects from the CUDA scores."""
        output, stats = attend_selected(self.backend, batch)
        return output, stats, torch.ones(output.shape[:2], dtype=torch.bool)


def attend_selected(backend: Backend, batch: Batch) -> tuple[torch.Tensor, list[int]]:
    """Float32, on the GPU where the batch is; sorting is stable, so ties go as they should."""
    params, stats = batch.params, [0, 0, 0, 0]
    lengths, heads = batch.lengths, params.num_query_heads
    out = torch.zeros(len(lengths), heads, params.layout.head_size)
    budgets = params.attended(batch.seq_lens, batch.budgets).tolist()
    for n, budget in zip(lengths, budgets, strict=True):
        if n == 0:
            continue
        visible = min(n, params.sliding_window or n)
        sparse = budget < n and not params.sliding_window
        stats[0 if sparse else 1] += 1
        stats[2] += n * heads
        stats[3] += (budget if sparse else visible) * heads
    for row, head, logits, v in attended(backend, batch):
        sink = None if params.sinks is None else params.sinks[head]
        out[row, head] = (exact_weights(logits, params.logits_soft_cap, sink).float() @ v).cpu()
    return out, stats


def attended(
    backend: Backend, batch: Batch
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Row, query head, and of the tokens that it attends to the logits before any cap, float32 ``[K]``, and V
    ``[K, D]``; rows with context 0 are left out."""
    params = batch.params
    scores = batch.scan(backend)
    budgets = params.attended(batch.seq_lens, batch.budgets).tolist()
    for row, (n, budget) in enumerate(zip(batch.lengths, budgets, strict=True)):
        if n == 0:
            continue
        visible = min(n, params.sliding_window or n)
        sparse = budget < n and not params.sliding_window
        for head in range(params.num_query_heads):
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
            k, v = stored_tokens(batch, row, kv_head, tokens.to(scores.device))
            yield row, head, k @ batch.query[row, head].float() * params.softmax_scale, v


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


def check_decode(target: Target, batch: Batch, **kwargs) -> None:
    """Output and counters against what is expected, padding untouched, workspaces never trusted."""
    target.poison_workspace()
    ours, counted = target.decode(batch, **kwargs)
    rows = len(batch.lengths)
    assert ours[rows:].isnan().all(), "padding was written"
    expected, stats, clear = target.expected_decode(batch)
    assert counted[:4] == stats[:4]
    assert counted[4] == 0 or target.may_select_again
    got = ours[:rows].cpu()
    assert got.isfinite().all()
    assert (got[batch.seq_lens.cpu() == 0] == 0).all()
    error, limit = relative_error(got, expected), target.slack * TOLERANCE[ours.dtype]
    assert error[clear].max() <= limit, (error.max(), (error > limit).nonzero()[:8])
    for _ in range(target.repeats):
        again, _ = target.decode(batch, overlap=True, **kwargs)
        assert torch.equal(again.view(torch.int16), ours.view(torch.int16)), "not deterministic"


# Which targets a test runs on: names, of which the fixture makes targets.


@pytest.fixture
def target(request, monkeypatch) -> Iterator[Target]:
    """The target of the test's parameter: see :func:`over_targets` and :func:`over_cases`."""
    name, form = request.param
    if name in LIBRARIES:
        yield CudaTarget(_cuda(name), "cuda", {} if form is None else {"form": form})
    elif name == "triton":
        # What conftest.py has said at import Triton asks again when it first runs a kernel.
        if not COMPILED:
            monkeypatch.setenv("TRITON_INTERPRET", "1")
        yield TritonTarget(_triton(), "cuda" if COMPILED else "cpu")
    else:
        from vllm_adamas.backends.cpu.backend import CpuBackend

        missing = set(ISAS[name].split()) - cpu_flags()
        if missing:
            pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
        # The kernels in use are a choice of the process, so it is put back.
        yield Target(CpuBackend(name))
        CpuBackend("auto")


@cache
def _triton() -> Backend:
    from vllm_adamas.backends.triton import TritonBackend

    return TritonBackend()


@cache
def _cuda(library: str) -> Backend:
    return CudaBackend(library)


def _targets(kind: str, forms: bool) -> list:
    """Parameters of the fixture; ids are ``avx2``, ``triton``, ``cuda``, ``cuda-three`` or ``cuda-3x8``, and ``sm80``."""
    if kind == "cpu":
        return [pytest.param((name, None), id=name) for name in ISAS]
    if kind == "triton":
        return [pytest.param(("triton", None), id="triton", marks=needs_triton)]
    named = {f"cuda-{form}": form for form in FORMS} if forms else {"cuda": None}
    return [
        *(pytest.param((FOR_HOPPER, x), id=name, marks=needs_hopper) for name, x in named.items()),
        pytest.param((FOR_OTHERS, None), id="sm80", marks=[*needs_hopper, needs_other_library]),
    ]


def over_targets(*kinds: str, forms: bool = False) -> pytest.MarkDecorator:
    """A test of ``target``.

    Args:
        kinds: among ``cpu``, ``triton`` and ``cuda``.
        forms: by every form of a step that the backend has.
    """
    found = [one for kind in kinds for one in _targets(kind, forms)]
    return pytest.mark.parametrize("target", found, indirect=True)


def over_cases(
    forms: bool = False, cases: dict[str, dict[str, Case]] | None = None
) -> pytest.MarkDecorator:
    """A test of ``target`` and ``case``: every backend over the cases that it takes.

    Args:
        cases: by the backend's kind and the case's name; left out, all of them.
    """
    found = [
        pytest.param(*one.values, case, id=f"{one.id}-{name}", marks=one.marks)
        for kind, named in (cases or TAKES).items()
        for one in _targets(kind, forms)
        for name, case in named.items()
    ]
    return pytest.mark.parametrize(("target", "case"), found, indirect=["target"])


def picked(**names: Iterable[str]) -> dict[str, dict[str, Case]]:
    """Cases of each kind of backend by their names, for :func:`over_cases`."""
    return {kind: {name: TAKES[kind][name] for name in some} for kind, some in names.items()}
