"""What is special to the CPU kernels: instruction sets, threads, huge pages, wrong arguments; and the reference's own."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from cases import CASES, KINDS, SPARE_BLOCKS, Case, as_bytes, check_surroundings
from common import ROOT, refused
from targets import REFERENCE, Target, over_targets, target  # noqa: F401

from vllm_adamas.backends.base import COUNTERS, MOST_TOKENS, DecodeBatch
from vllm_adamas.backends.cpu.backend import CpuBackend


@over_targets("cpu")
def test_prepare_loses_nothing(target: Target) -> None:
    """Layers may share an allocation, and each is prepared when it first runs: also after another."""
    backend, params = target.backend, Case().params
    content = params.layout.token_bytes // params.layout.dtype.itemsize
    memory = torch.zeros(256, params.num_kv_heads, 64, content, dtype=params.layout.dtype)
    first, second = memory.chunk(2)  # 9 MB each: several huge pages
    key, value = torch.randn(2, 128 * 64, *first.shape[1:2], 128).to(first.dtype)
    backend.prepare(first)
    assert not memory.any()
    backend.append(backend.bind(params, first), key, value, torch.arange(len(key)))
    before = memory.clone()
    for page in (second, first, memory):
        backend.prepare(page)
        assert torch.equal(as_bytes(memory), as_bytes(before))


# threads and arguments

DIGEST = """
import hashlib, sys
from cases import CASES
from vllm_adamas.backends.cpu.backend import CpuBackend
digest, backend = hashlib.sha256(), CpuBackend(sys.argv[1])
for case in CASES.values():
    batch = case.build(backend)
    out = (batch.memory, batch.scan(backend), batch.decode(backend)[0])
    for x in out:
        digest.update(x.contiguous().view(__import__("torch").uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@over_targets("cpu")
def test_one_thread_and_several_give_the_same_bytes(target: Target) -> None:
    digests = set()
    for threads in ("1", "2"):
        env = {**os.environ, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", DIGEST, target.backend.isa]
        done = subprocess.run(
            command, env=env, cwd=ROOT / "tests", capture_output=True, text=True, check=True
        )
        digests.add(done.stdout)
    assert len(digests) == 1


@pytest.mark.parametrize("name", KINDS)
def test_surroundings_change_nothing_in_the_reference(name: str) -> None:
    check_surroundings(REFERENCE, CASES[name].build(REFERENCE))


@over_targets("cpu")
def test_spare_blocks_are_never_read(target: Target) -> None:
    """The generator's garbage reaches the tests: the unused blocks do hold NaN."""
    batch = target.build(Case())
    spare = batch.params.layout.k(batch.kv_cache).isnan().all(-1).all(-1).all(-1).sum()
    assert spare >= SPARE_BLOCKS


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="sse9"):
        CpuBackend("sse9")


def bad_arguments():
    batch = Case((40, 5), 8).build(REFERENCE)
    query, table, lens = batch.query, batch.block_table, batch.seq_lens
    out, stats = torch.empty_like(query), torch.zeros(COUNTERS, dtype=torch.int64)
    scores, budgets = torch.zeros(2, 8, 40), batch.budgets
    key, value, slots = batch.key, batch.value, batch.slots
    kv = torch.empty(45, *key.shape[1:], dtype=key.dtype)
    swapped = key.transpose(1, 2)

    def decode(**kwargs):
        given = {"query": query, "output": out, "stats": stats} | kwargs
        step = {"block_table": table, "seq_lens": lens, "budgets": budgets} | kwargs
        step = DecodeBatch(step["block_table"], step["seq_lens"], step["budgets"])
        return "decode", (given["query"], step, given["output"], given["stats"])

    yield "key", "append", (swapped, value, slots)
    yield "key", "append", (key[:3], value, slots)
    yield "key", "append", (key.int(), value, slots)
    yield "value", "append", (key, value[..., :64], slots)
    yield "value", "append", (key, value[:, :1], slots)
    yield "slot_mapping", "append", (key, value, slots.int())
    yield "slot_mapping", "append", (key, value, slots.view(1, -1))
    yield "slot_mapping", "append", (key, value, torch.full_like(slots, 10**12))
    for name, wrong in {
        "query": (query[:1], query[..., :64], query[:, :7], query[0], query.double()),
        "output": (out[:1], out[:, :4], out.transpose(1, 2), out.int()),
        "block_table": (table.long(), table[:1], table[0], table[:, :0], table + 10**8, table - 99),
        "seq_lens": (lens.long(), lens.view(1, -1), lens.float(), lens - 9000),
        "budgets": (budgets.long(), budgets[:1], budgets.view(-1, 1)),
        "stats": (stats[:4], stats.int(), stats[None]),
    }.items():
        for value_ in wrong:
            yield (name, *decode(**{name: value_}))
    yield "query", "scan", (query[:1], table, lens)
    yield "block_table", "scan", (query, table.long(), lens)
    yield "seq_lens", "scan", (query, table, lens.long())
    yield "scores", "select", (scores.double(), lens, budgets)
    yield "scores", "select", (scores[:1], lens, budgets)
    yield "scores", "select", (scores[..., :39], lens, budgets)
    yield "seq_lens", "select", (scores, lens.long(), budgets)
    yield "budgets", "select", (scores, lens, budgets.long())
    yield "budgets", "select", (scores, lens, budgets[:1])
    yield "key", "gather", (table, lens, kv[:44], kv)
    yield "value", "gather", (table, lens, kv, kv[..., :64])
    yield "value", "gather", (table, lens, kv, kv.float())
    yield "seq_lens", "gather", (table, lens * torch.tensor([1, -1]).int(), kv, kv)
    yield "block_table", "gather", (table.long(), lens, kv, kv)


@pytest.mark.parametrize(("name", "operation", "arguments"), list(bad_arguments()))
def test_wrong_arguments_are_named(name: str, operation: str, arguments: tuple) -> None:
    """Before anything is read or written: a wrong shape would otherwise be a wild pointer."""
    backend = CpuBackend()
    batch = Case((40, 5), 8).build(REFERENCE)
    layer = batch.params if operation == "select" else batch.bound(backend)
    with pytest.raises(ValueError, match=f"^{name}: "):
        getattr(backend, operation)(layer, *arguments)


def test_the_reference_sees_what_does_not_fit() -> None:
    batch = CASES["plain"].build(REFERENCE)
    slots = batch.slots.masked_fill(batch.slots == batch.slots.max(), len(batch.memory) * 64)
    with pytest.raises(IndexError):
        REFERENCE.append(batch.bound(REFERENCE), batch.key, batch.value, slots)
    for operation in (batch.scan, batch.decode, batch.gathered):
        for wrong in (-1, 10**6):
            batch.seq_lens[0] = wrong
            with pytest.raises(ValueError, match=r"^seq_lens: "):
                operation(REFERENCE)


@pytest.mark.parametrize("name", ["num_sink_tokens", "recent_window", "sliding_window"])
def test_windows_fit_the_kernels_integers(name: str) -> None:
    for wrong in (-1, MOST_TOKENS):
        refused(lambda n=wrong: dataclasses.replace(Case().params, **{name: n}), f"{name}={wrong}")
    dataclasses.replace(Case().params, **{name: MOST_TOKENS - 1})


@pytest.mark.parametrize(
    "mean", [torch.zeros(2, 64), torch.zeros(2, 128).double(), torch.zeros(128, 2).T]
)
def test_a_wrong_key_mean_is_named(mean: torch.Tensor) -> None:
    batch = Case().build(REFERENCE)
    params = dataclasses.replace(batch.params, key_mean=mean)
    with pytest.raises(ValueError, match=r"^key_mean: "):
        CpuBackend().bind(params, batch.kv_cache)


@pytest.mark.parametrize(
    "sinks", [torch.zeros(2), torch.zeros(8).double(), torch.zeros(8, 1), torch.zeros(16)[::2]]
)
def test_wrong_sinks_are_named(sinks: torch.Tensor) -> None:
    batch = Case().build(REFERENCE)
    params = dataclasses.replace(batch.params, sinks=sinks)
    with pytest.raises(ValueError, match=r"^sinks: "):
        CpuBackend().bind(params, batch.kv_cache)
