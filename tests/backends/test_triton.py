"""What is special to the Triton kernels: compiled where there is a GPU, else interpreted.

Triton decides when it is imported (see conftest.py), so one process tests one of the two.
"""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from cases import MIXED, MIXED_BUDGETS, Case, as_bytes, check_select, many
from common import ROOT, is_one_sentence
from targets import (
    COMPILED,
    REFERENCE,
    SMALL,
    TRITON_CASES,
    TritonTarget,
    check_decode,
    needs_triton,
)

from vllm_adamas.backends.base import COUNTERS
from vllm_adamas.backends.registry import get_backend
from vllm_adamas.backends.triton import TritonBackend
from vllm_adamas.backends.triton import backend as ops
from vllm_adamas.errors import AdamasError

DEVICE = "cuda" if COMPILED else "cpu"
pytestmark = needs_triton


@pytest.fixture(autouse=True)
def interpreter(monkeypatch) -> None:
    """What conftest.py has said at import Triton asks again when it first runs a kernel."""
    if not COMPILED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def built(name: str):
    """A case, and its batch as the kernels have appended it."""
    case = TRITON_CASES[name]
    return case, TritonTarget(TritonBackend(), DEVICE).build(case)


@pytest.fixture(scope="module")
def backend() -> TritonBackend:
    return TritonBackend()


def test_workspaces_are_float32_whatever_the_default(backend) -> None:
    """A server builds its layers under the dtype of the model."""
    case, batch = built("sinks")
    expected, fresh = batch.scan(backend), TritonBackend()
    torch.set_default_dtype(torch.float16)
    try:
        fresh.reserve(batch.params, len(case.lengths), 128)
        got = batch.scan(fresh)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    check_decode(TritonTarget(fresh, DEVICE), batch)


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
    case, batch = built("group2-shared")
    longest = batch.block_table.shape[1] * case.block_size
    for rows in (1, 2, 4):
        monkeypatch.setattr(ops, "SCORE_BYTES", 8 * case.heads[1] * longest * rows)
        assert ops.Plan(batch.params, len(SMALL), longest, torch.device(DEVICE)).rows == rows
        check_decode(TritonTarget(TritonBackend(), DEVICE), batch)
        assert torch.equal(batch.scan(TritonBackend()), batch.scan(backend))


def test_decode_of_dense_rows_alone(backend) -> None:
    """Budgets that are the lengths themselves: the layer selects nothing, the result is the same."""
    _, batch = built("group2-shared")
    outputs = []
    for budgets in (batch.seq_lens, batch.seq_lens.clone()):
        outputs += [dataclasses.replace(batch, budgets=budgets).decode(backend)]
    (ours, counted), (theirs, expected) = outputs
    assert counted == expected
    assert torch.equal(as_bytes(ours), as_bytes(theirs))


def test_reserve_covers_every_step(backend) -> None:
    """Nothing is allocated after it, whatever the number of rows, and the size is what it says."""
    backend = TritonBackend()
    _, batch = built("group2-shared")
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
    check_decode(TritonTarget(backend, DEVICE), batch, max_seq_len=100)


def test_select_when_the_sample_misleads(backend) -> None:
    """All high scores lie where the sample looks, so its pivot leaves too few tokens."""
    length = 3 * ops.SAMPLES
    scores = torch.rand(1, 1, length, generator=torch.Generator().manual_seed(0))
    scores[..., :: length // ops.SAMPLES] += 10
    lens = torch.tensor([length], dtype=torch.int32, device=DEVICE)
    for budget in (ops.SAMPLES // 2, ops.SAMPLES, ops.SAMPLES + 1, length // 2):
        check_select(backend, scores.to(DEVICE), lens, (budget,), 0, 0)


def test_steps_repeat_bit_by_bit(backend) -> None:
    _, batch = built("group1")
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
                given.get("stats", torch.zeros(COUNTERS, dtype=torch.int64, device=DEVICE)),
            )

        return call

    yield "query", decode(query=lambda batch: batch.query[:, :1])
    yield "query", decode(query=lambda batch: batch.query.double())
    yield "output", decode(output=lambda batch: batch.query[:2])
    yield "block_table", decode(block_table=lambda batch: batch.block_table.long())
    yield "seq_lens", decode(seq_lens=lambda batch: batch.seq_lens.long())
    yield "budgets", decode(budgets=lambda batch: batch.budgets[:1])
    yield "stats", decode(stats=lambda batch: torch.zeros(4, dtype=torch.int64))

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


@pytest.mark.parametrize("sinks", [torch.zeros(2), torch.zeros(4).double()])
def test_wrong_sinks_are_named(backend, sinks: torch.Tensor) -> None:
    _, batch = built("group2-shared")
    params = dataclasses.replace(batch.params, sinks=sinks.to(DEVICE))
    with pytest.raises(ValueError, match=r"^sinks: "):
        backend.bind(params, batch.kv_cache)


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
from vllm_adamas.backends.triton import backend as ops, combine

class Compiled:
    \"\"\"Stands in for a kernel: compiles a launch's arguments for every target, and runs nothing.\"\"\"
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return self.launch
    def launch(self, *args, num_warps=4, enable_fp_fusion=True, **kwargs):
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
            options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
            done = triton.compile(source, target=target, options=options)
            assert enable_fp_fusion or "fma" not in done.asm["ptx"], self.kernel
            assert done.metadata.shared <= 99 << 10, (self.kernel, done.metadata.shared)
            print(capability, self.kernel.__name__)

for module in (ops, combine):
    for name, kernel in vars(module).copy().items():
        if isinstance(kernel, triton.JITFunction):
            setattr(module, name, Compiled(kernel))
ops.TritonBackend.__init__ = lambda self: vars(self).update(
    _workspace=ops.Workspace(), _plans={}
)
backend = ops.TritonBackend()
softmax = {"soft_cap": 50.0, "learned_sinks": (0.0, 1.0)}
for case, capabilities in (
    (Case((9, 0), 4, (8, 2), 128, selection="kv_head", combine="max"), (80, 90, 100, 120)),
    (Case((9, 0), 4, (8, 2), 128, selection="kv_head", **softmax), (80,)),
    (Case((9, 0), 4, (16, 1), 256, score="manhattan", fp8="e4m3", centred=True, **softmax), (120,)),
    (Case((9, 0), 4, (8, 1), 512, selection="kv_head", combine="max"), (120,)),
):
    batch = case.build(backend)
    batch.decode(backend)
    batch.gathered(backend)
capabilities = (80, 90, 100, 120)
combine.combine(torch.zeros(5, 8, 96).half(), torch.zeros(3, 5, 8), 1)
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
    kernels = {
        "append",
        "encode",
        "sample",
        "scan",
        "select",
        "attend",
        "merge",
        "gather",
        "combine",
    }
    made = {tuple(line.split()) for line in done.stdout.splitlines()}
    assert made == {(c, f"{k}_kernel") for c in ("80", "90", "100", "120") for k in kernels}


if COMPILED:

    def test_a_captured_step_replays_with_other_lengths() -> None:
        """Lengths and budgets are read on the device; the workspace may not grow meanwhile."""
        backend = TritonBackend()
        case = Case(MIXED, MIXED_BUDGETS, selection="kv_head")
        batch = case.build(backend, DEVICE)
        output = torch.zeros_like(batch.query)
        stats = torch.zeros(COUNTERS, dtype=torch.int64, device=DEVICE)
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
            batch.seq_lens.copy_(torch.tensor(lengths))
            batch.budgets.copy_(torch.tensor(budgets))
            output.fill_(float("nan"))
            stats.zero_()
            graph.replay()
            again, counted = batch.decode(backend)
            rows = len(lengths)
            assert torch.equal(as_bytes(output[:rows]), as_bytes(again[:rows]))
            assert counted == stats.tolist()
            check_decode(TritonTarget(backend, DEVICE), batch)
