"""The Triton kernels against the reference: compiled where there is a GPU, else interpreted.

Triton decides when it is imported (see conftest.py), so one process tests one of the two.
"""

import dataclasses
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from cases import (
    CASES,
    MIXED,
    MIXED_BUDGETS,
    SCORES,
    TOLERANCE,
    Case,
    as_bytes,
    check_append,
    check_lengths_are_cut,
    check_select,
    check_slots_are_skipped,
    check_surroundings,
    many,
    relative_error,
)
from common import ROOT, is_one_sentence

from vllm_adamas.backends.reference import ReferenceBackend
from vllm_adamas.backends.registry import get_backend
from vllm_adamas.backends.triton import TritonBackend
from vllm_adamas.backends.triton import backend as ops
from vllm_adamas.errors import AdamasError

COMPILED = torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
pytestmark = [pytest.mark.gpu] if COMPILED else []
REFERENCE = ReferenceBackend()

SMALL = (33, 1, 0, 70, 17)  #: contexts, for the interpreter's sake
SMALL_BUDGETS = (8, 1, 4, 69, 40)
#: Every dimension of the page and of the method at least once; a GPU runs CASES too.
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
    "e4m3": Case(SMALL, SMALL_BUDGETS, (3, 1), 64, fp8="e4m3", selection="kv_head"),
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
    "long": Case((2500,), (300,), (2, 1), 64, selection="kv_head"),
    "empty": Case((0, 0), 4, (2, 1), 64),
}
over_cases = pytest.mark.parametrize("name", [*SMALL_CASES, *(CASES if COMPILED else [])])


@pytest.fixture(autouse=True)
def interpreter(monkeypatch) -> None:
    """What conftest.py has said at import Triton asks again when it first runs a kernel."""
    if not COMPILED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def backend() -> TritonBackend:
    return TritonBackend()


@cache
def built(name: str):
    """A case, built by the kernels on their device and by the reference on the CPU."""
    case = SMALL_CASES.get(name) or CASES[name]
    return case, case.build(TritonBackend(), DEVICE), case.build(REFERENCE)


@over_cases
def test_append(name: str) -> None:
    check_append(*built(name)[1:])


@over_cases
def test_scan(backend, name: str) -> None:
    """Bit-identical: a score is an exact integer times the token's scale, rounded once."""
    case, batch, reference = built(name)
    # Codes on a threshold may differ, so the reference reads what the kernels wrote.
    reference = dataclasses.replace(reference, memory=batch.memory.cpu())
    ours, theirs = batch.scan(backend).cpu(), reference.scan(REFERENCE)
    clear = ~reference.ambiguous()
    assert clear.float().mean() > 0.75
    assert torch.equal(ours[clear], theirs[clear])
    for row, length in enumerate(case.lengths):
        assert ours[row, :, :length].isfinite().all()
        assert (ours[row, :, length:] == -torch.inf).all()


def check_decode(backend, case: Case, batch, reference, **kwargs) -> None:
    rows = len(case.lengths)
    for workspace in backend._workspace.buffers.values():
        workspace.fill_(0xFF)  # NaN
    # The interpreter truncates to bf16 where a GPU rounds; what the kernels compute is float32.
    ours, counted = batch.decode(backend, None if COMPILED else torch.float32, **kwargs)
    theirs, expected = dataclasses.replace(reference, memory=batch.memory.cpu()).decode(
        REFERENCE, torch.float32
    )
    assert counted == expected
    ours = ours.cpu()
    assert ours[:rows].isfinite().all()
    assert ours[rows:].isnan().all(), "padding was written"
    assert (ours[:rows][reference.seq_lens == 0] == 0).all()
    per_set = case.heads[0] // reference.params.num_score_heads
    clear = ~reference.ambiguous().repeat_interleave(per_set, 1)
    error = relative_error(ours[:rows], theirs[:rows])[clear]
    assert error.max() <= TOLERANCE[case.dtype if COMPILED else torch.float32]


@over_cases
def test_decode(backend, name: str) -> None:
    check_decode(backend, *built(name))


def test_workspaces_are_float32_whatever_the_default(backend) -> None:
    """A server builds its layers under the dtype of the model."""
    case, batch, reference = built("sinks")
    expected, fresh = batch.scan(backend), TritonBackend()
    torch.set_default_dtype(torch.float16)
    try:
        fresh.reserve(batch.params, len(case.lengths), 128)
        got = batch.scan(fresh)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    check_decode(fresh, case, batch, reference)


@over_cases
def test_gather(backend, name: str) -> None:
    case, batch, reference = built(name)
    out = torch.zeros(2, sum(case.lengths), *batch.key.shape[1:], dtype=torch.float32).to(DEVICE)
    backend.gather(batch.bound(backend), batch.block_table, batch.seq_lens, *out)
    for got, stored in zip(out.cpu(), reference.stored(), strict=True):
        assert torch.equal(got, stored)


@pytest.mark.parametrize("name", ["group3-manhattan", "e4m3", "forced"])
def test_surroundings_change_nothing(backend, name: str) -> None:
    check_surroundings(backend, built(name)[1], None if COMPILED else torch.float32)


@pytest.mark.parametrize("name", ["group2-shared", "sliding"])
def test_lengths_are_cut(backend, name: str) -> None:
    """The rows' buffers follow one another, so that what is written beyond one's end is another's."""
    check_lengths_are_cut(backend, built(name)[1], None if COMPILED else torch.float32)


def test_append_skips_slots_behind_the_cache(backend) -> None:
    check_slots_are_skipped(backend, built("group2-shared")[1])


def test_gather_of_a_thousand_rows(backend) -> None:
    """More than are added up at a time."""
    case = many(1030 if not COMPILED else 4096)
    batch = case.build(REFERENCE)
    batch = dataclasses.replace(
        batch,
        **{n: getattr(batch, n).to(DEVICE) for n in ("memory", "query", "block_table", "seq_lens")},
    )
    got = batch.gathered(backend).cpu()
    assert torch.equal(got, torch.stack(batch.stored()).to(got.dtype))


def test_rows_in_several_passes(backend, monkeypatch) -> None:
    """Scores of all rows may not fit; then a step takes more than one pass, in any grouping."""
    case, batch, reference = built("group2-shared")
    longest = batch.block_table.shape[1] * case.block_size
    for rows in (1, 2, 4):
        monkeypatch.setattr(ops, "SCORE_BYTES", 8 * case.heads[1] * longest * rows)
        assert ops.Plan(batch.params, len(SMALL), longest, torch.device(DEVICE)).rows == rows
        check_decode(TritonBackend(), case, batch, reference)
        assert torch.equal(batch.scan(TritonBackend()), batch.scan(backend))


def test_decode_of_dense_rows_alone(backend) -> None:
    """Budgets that are the lengths themselves: the layer selects nothing, the result is the same."""
    _, batch, _ = built("group2-shared")
    outputs = []
    for budgets in (batch.seq_lens, batch.seq_lens.clone()):
        outputs += [dataclasses.replace(batch, budgets=budgets).decode(backend)]
    (ours, counted), (theirs, expected) = outputs
    assert counted == expected
    assert torch.equal(as_bytes(ours), as_bytes(theirs))


def test_reserve_covers_every_step(backend) -> None:
    """Nothing is allocated after it, whatever the number of rows, and the size is what it says."""
    backend = TritonBackend()
    case, batch, reference = built("group2-shared")
    assert backend.reserve(batch.params, len(SMALL), 128) == sum(
        memory.nbytes for memory in backend._workspace.buffers.values()
    )
    before = {device: memory.data_ptr() for device, memory in backend._workspace.buffers.items()}
    for rows in range(1, len(SMALL) + 1):
        some = dataclasses.replace(
            batch,
            query=batch.query[:rows],
            block_table=batch.block_table[:rows],
            seq_lens=batch.seq_lens[:rows],
            budgets=batch.budgets[:rows],
        )
        some.decode(backend, max_seq_len=100)
    assert before == {
        device: memory.data_ptr() for device, memory in backend._workspace.buffers.items()
    }
    check_decode(backend, case, batch, reference, max_seq_len=100)


@pytest.mark.parametrize("length", [1, 3001])
@pytest.mark.parametrize("kind", SCORES)
def test_select(backend, kind: str, length: int) -> None:
    scores = SCORES[kind]((3, 2, length), torch.Generator().manual_seed(length)).to(DEVICE)
    lens = torch.tensor([length, length // 2 + 1, 0], dtype=torch.int32, device=DEVICE)
    kept = {(1, 0, 0), (length // 2 + 1, 0, 0), (length + 9, 0, 0)}
    if length > 8:
        kept |= {(length - 1, 0, 5), (max(8, length // 10), 3, 4)}
    for budget, sinks, recent in kept:
        check_select(backend, scores, lens, (budget, 2 * budget, budget), sinks, recent)
    check_select(backend, scores, lens, (0, -(2**31), 2), 2, 5)


def test_select_when_the_sample_misleads(backend) -> None:
    """All high scores lie where the sample looks, so its pivot leaves too few tokens."""
    length = 3 * ops.SAMPLES
    scores = torch.rand(1, 1, length, generator=torch.Generator().manual_seed(0))
    scores[..., :: length // ops.SAMPLES] += 10
    lens = torch.tensor([length], dtype=torch.int32, device=DEVICE)
    for budget in (ops.SAMPLES // 2, ops.SAMPLES, ops.SAMPLES + 1, length // 2):
        check_select(backend, scores.to(DEVICE), lens, (budget,), 0, 0)


def test_select_takes_both_zeros_as_one_score(backend) -> None:
    scores = torch.tensor([[[0.0, -0.0, 0.0, -0.0, -1.0]]], device=DEVICE)
    lens = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    check_select(backend, scores, lens, (2,), 0, 0)


def test_steps_repeat_bit_by_bit(backend) -> None:
    _, batch, _ = built("group1")
    first, second = (as_bytes(batch.decode(backend)[0]) for _ in range(2))
    assert torch.equal(first, second)


def wrong_arguments():
    def decode(**kwargs):
        def call(backend, batch):
            given = {name: change(batch) for name, change in kwargs.items()}
            step = dataclasses.replace(
                batch.step(), **{n: x for n, x in given.items() if hasattr(batch.step(), n)}
            )
            backend.decode(
                batch.bound(backend),
                given.get("query", batch.query),
                step,
                given.get("output", batch.query.clone()),
                given.get("stats", torch.zeros(4, dtype=torch.int64, device=DEVICE)),
            )

        return call

    yield "query", decode(query=lambda batch: batch.query[:, :1])
    yield "query", decode(query=lambda batch: batch.query.double())
    yield "output", decode(output=lambda batch: batch.query[:2])
    yield "block_table", decode(block_table=lambda batch: batch.block_table.long())
    yield "seq_lens", decode(seq_lens=lambda batch: batch.seq_lens.long())
    yield "budgets", decode(budgets=lambda batch: batch.budgets[:1])
    yield "stats", decode(stats=lambda batch: torch.zeros(3, dtype=torch.int64))

    def append(**kwargs):
        return lambda b, batch: b.append(
            batch.bound(b),
            **{
                "key": batch.key,
                "value": batch.value,
                "slot_mapping": batch.slots,
                **{name: change(batch) for name, change in kwargs.items()},
            },
        )

    yield "key", append(key=lambda batch: batch.key[:3])
    yield "key", append(key=lambda batch: batch.key.transpose(1, 2))
    yield "value", append(value=lambda batch: batch.value.float())
    yield "slot_mapping", append(slot_mapping=lambda batch: batch.slots.int())


@pytest.mark.parametrize(("name", "call"), list(wrong_arguments()))
def test_wrong_arguments_are_named(backend, name: str, call) -> None:
    """Before anything is read or written: a wrong shape would otherwise be a wild pointer."""
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(backend, built("group1")[1])


def test_large_groups_are_refused(backend) -> None:
    with pytest.raises(AdamasError, match="17 query heads per KV head") as error:
        Case((5,), 2, (17, 1), 64).build(backend, DEVICE)
    assert is_one_sentence(str(error.value))


def test_cpus_are_refused() -> None:
    with pytest.raises(AdamasError, match=r"kernels='triton'.*cpu") as error:
        get_backend("triton", "cpu")
    assert is_one_sentence(str(error.value))


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cases import Case
from vllm_adamas.backends.triton import backend as ops

class Compiled:
    \"\"\"Stands in for a kernel: compiles a launch's arguments for every target, and runs nothing.\"\"\"
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return self.launch
    def launch(self, *args, num_warps=4, **kwargs):
        values = dict(zip(self.kernel.arg_names, args)) | kwargs
        types, constants, aligned = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None:
                types[parameter.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                kind = triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).split(".")[1]]
                types[parameter.name], aligned[(i,)] = f"*{kind}", [["tt.divisibility", 16]]
            else:
                types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(self.kernel, types, constants, aligned)
        for capability in capabilities:
            target = GPUTarget("cuda", capability, 32)
            done = triton.compile(source, target=target, options={"num_warps": num_warps})
            assert done.metadata.shared <= 99 << 10, (self.kernel, done.metadata.shared)
            print(capability, self.kernel.__name__)

for name, kernel in vars(ops).copy().items():
    if isinstance(kernel, triton.JITFunction):
        setattr(ops, name, Compiled(kernel))
ops.TritonBackend.__init__ = lambda self: vars(self).update(
    _workspace=ops.Workspace(), _plans={}
)
backend = ops.TritonBackend()
for case, capabilities in (
    (Case((9, 0), 4, (8, 2), 128, selection="kv_head"), (80, 90, 100, 120)),
    (Case((9, 0), 4, (16, 1), 256, score="manhattan", fp8="e4m3", centred=True), (120,)),
):
    batch = case.build(backend)
    batch.decode(backend)
    batch.gathered(backend)
"""


def test_kernels_compile_for_every_generation(tmp_path) -> None:
    """Ampere, Hopper, Blackwell of both kinds, within the shared memory of the smallest of them."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**env, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = {"append", "encode", "scan", "select", "attend", "merge", "gather"}
    made = {tuple(line.split()) for line in done.stdout.splitlines()}
    assert made == {(c, f"{k}_kernel") for c in ("80", "90", "100", "120") for k in kernels}


if COMPILED:

    def test_a_captured_step_replays_with_other_lengths() -> None:
        """Lengths and budgets are read on the device; the workspace may not grow meanwhile."""
        backend = TritonBackend()
        case = Case(MIXED, MIXED_BUDGETS, selection="kv_head")
        batch, reference = case.build(backend, DEVICE), case.build(REFERENCE)
        output = torch.zeros_like(batch.query)
        stats = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        step = batch.step(max_seq_len=4096)
        backend.decode(batch.bound(backend), batch.query, step, output, stats)  # compiles
        with (
            pytest.raises(AdamasError, match="reserve"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            fresh = TritonBackend()
            fresh.decode(batch.bound(fresh), batch.query, step, output, stats)
        backend.reserve(batch.params, len(MIXED), 4096)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            backend.decode(batch.bound(backend), batch.query, step, output, stats)
        for lengths, budgets in (
            ((180, 1, 0, 0, 20, 100), (64, 4, 9, 9, 1 << 30, 99)),
            (MIXED, MIXED_BUDGETS),
        ):
            for now in (batch, reference):
                now.seq_lens.copy_(torch.tensor(lengths))
                now.budgets.copy_(torch.tensor(budgets))
            output.fill_(float("nan"))
            stats.zero_()
            graph.replay()
            again, counted = batch.decode(backend)
            rows = len(lengths)
            assert torch.equal(as_bytes(output[:rows]), as_bytes(again[:rows]))
            assert counted == stats.tolist()
            check_decode(backend, dataclasses.replace(case, lengths=lengths), batch, reference)
