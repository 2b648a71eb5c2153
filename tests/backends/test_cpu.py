"""Every operation of the CPU kernels, on every instruction set, against the reference."""

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import (
    CASES,
    SCORES,
    SPARE_BLOCKS,
    TOLERANCE,
    Case,
    as_bytes,
    check_append,
    check_select,
    check_surroundings,
    many,
    over_cases,
    over_kinds,
    relative_error,
)
from common import ROOT, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_adamas.backends.base import MOST_TOKENS, DecodeBatch
from vllm_adamas.backends.cpu.backend import CpuBackend
from vllm_adamas.backends.reference import ReferenceBackend
from vllm_adamas.backends.reference import signature as sig

REFERENCE = ReferenceBackend()
NEEDS = {
    "portable": "",
    "avx2": "avx2 fma f16c",
    "avx512": "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_bitalg avx512_vpopcntdq "
    "avx512vbmi avx512_vnni",
}


def cpu_flags() -> set[str]:
    if platform.machine() != "x86_64":
        return set()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next(line for line in lines if line.startswith("flags")).partition(":")[2].split())


@pytest.fixture(params=NEEDS)
def backend(request):
    """One instruction set; the kernels in use are a choice of the process, so it is put back."""
    missing = set(NEEDS[request.param].split()) - cpu_flags()
    if missing:
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    yield CpuBackend(request.param)
    CpuBackend("auto")


# append


@over_cases
def test_append(backend, case: Case) -> None:
    check_append(case.build(backend), case.build(REFERENCE))


@pytest.mark.parametrize("name", ["plain", "block48", "d96", "fp32", "e4m3"])
def test_append_writes_its_slots_alone(backend, name: str) -> None:
    """Other blocks, other slots and a neighbour's head keep all their bytes."""
    batch = CASES[name].build(backend)
    again = dataclasses.replace(batch, memory=batch.memory.clone(), kv=-batch.kv)
    one = torch.full_like(again.slots, -1)
    one[20] = again.slots[20]
    backend.append(again.bound(backend), again.key, again.value, one)
    layout, size = batch.params.layout, batch.params.layout.block_size
    block, offset = divmod(one[20].item(), size)
    for name in ("k", "v", "hi", "lo", "scale"):
        planes = [getattr(layout, name)(memory) for memory in (batch.memory, again.memory)]
        before, after = (
            sig.untile(plane) if name in ("hi", "lo") else plane.unsqueeze(-1) for plane in planes
        )
        changed = (as_bytes(before) != as_bytes(after)).flatten(3).any(-1)  # [blocks, Hkv + 1, N]
        changed[block, : batch.params.num_kv_heads, offset] = False
        assert not changed.any(), name
    size = layout.scale_offset + 2 * size
    assert torch.equal(layout.runs(batch.memory)[..., size:], layout.runs(again.memory)[..., size:])


def test_append_of_nothing_but_padding(backend) -> None:
    batch = Case().build(backend)
    before = batch.memory.clone()
    slots = torch.full_like(batch.slots, -1)
    backend.append(batch.bound(backend), batch.key, batch.value, slots)
    assert torch.equal(as_bytes(before), as_bytes(batch.memory))


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_append_rounds_to_fp8_as_torch_does(backend, kind: str) -> None:
    """Every bf16 value but NaN: zeros of both signs, subnormals, ties, saturation, infinities."""
    bits = torch.arange(0x7F80 + 64, dtype=torch.int32).clamp_max(0x7F80).to(torch.int16)
    both = torch.cat((bits, bits | -(2**15))).view(torch.bfloat16).view(-1, 1, 64)
    params = dataclasses.replace(
        Case(fp8=kind, heads=(1, 1), head_size=64).params, k_scale=1.0, v_scale=1.0
    )
    page = torch.zeros(len(both) // 64 + 1, 1, 64, params.layout.token_bytes, dtype=torch.uint8)
    expected = page.clone()
    for runner, memory in ((backend, page), (REFERENCE, expected)):
        runner.append(runner.bind(params, memory), both, -both, torch.arange(len(both)))
    for plane in (params.layout.k, params.layout.v):
        assert torch.equal(plane(page), plane(expected))


def test_prepare_loses_nothing(backend) -> None:
    """Layers may share an allocation, and each is prepared when it first runs: also after another."""
    params = Case().params
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


# scan


@over_cases
def test_scan(backend, case: Case) -> None:
    """Bit-identical: a score is an exact integer times the token's scale, rounded once."""
    batch = case.build(backend)
    ours, theirs = batch.scan(backend), batch.scan(REFERENCE)
    clear = ~batch.ambiguous()
    assert clear.float().mean() > 0.75
    assert ours.shape == theirs.shape
    assert torch.equal(ours[clear], theirs[clear])
    for row, length in enumerate(case.lengths):
        assert ours[row, :, :length].isfinite().all()
        assert (ours[row, :, length:] == -torch.inf).all()


@pytest.mark.parametrize("selection", ["query_head", "kv_head"])
@pytest.mark.parametrize("head_size, dim", [(64, 3), (96, 3), (96, 95), (192, 70)])
def test_scan_of_a_query_with_nan(backend, head_size: int, dim: int, selection: str) -> None:
    """It has no codes, whichever part of the head the transform spreads the NaN over."""
    case = Case(head_size=head_size, selection=selection, lengths=(300, 70))
    batch = case.build(backend)
    batch.query[0, 1, dim] = torch.nan
    ours, theirs = batch.scan(backend), batch.scan(REFERENCE)
    assert not ours[0, 0 if selection == "kv_head" else 1, :300].any()
    assert torch.equal(ours[0, :, :300].isnan(), theirs[0, :, :300].isnan())
    assert torch.equal(ours == 0, theirs == 0)


# select


@pytest.mark.parametrize("length", [1, 2, 17, 255, 1023, 1024, 1025, 5003])
@pytest.mark.parametrize("kind", SCORES)
def test_select(backend, kind: str, length: int) -> None:
    kept = [
        (1, 0, 0),
        (length // 2 + 1, 0, 0),
        (length - 1, 0, 0),
        (length, 0, 0),
        (length + 9, 0, 0),
    ]
    if length > 8:
        kept += [(8, 3, 4), (length - 1, 0, 5), (max(8, length // 10), 7, 0)]
    kept += [(0, 0, 0), (-(2**31), 2, 1), (4, 40, 1), (1, length, length)]
    scores = SCORES[kind]((3, 2, length), torch.Generator().manual_seed(length))
    lens = torch.tensor([length, length // 2 + 1, 0], dtype=torch.int32)
    for budget, sinks, recent in kept:
        check_select(backend, scores, lens, (budget, budget, budget), sinks, recent)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_select_any_scores(backend, data) -> None:
    values = st.floats(width=32, allow_nan=False, allow_infinity=False)
    few = st.sampled_from([-3.5, 0.0, -0.0, 1e-38, 7.0])  # both zeros are one score
    scores = data.draw(st.lists(data.draw(st.sampled_from([values, few])), min_size=1, max_size=90))
    budget = data.draw(st.integers(1, len(scores) + 1))
    lens = torch.tensor([len(scores)], dtype=torch.int32)
    check_select(backend, torch.tensor(scores).view(1, 1, -1), lens, (budget,), 0, 0)


# decode


@over_cases
def test_decode(backend, case: Case) -> None:
    batch = case.build(backend)
    rows = len(case.lengths)
    ours, counted = batch.decode(backend)
    theirs, expected = batch.decode(REFERENCE, torch.float32)
    assert counted == expected
    assert ours[:rows].isfinite().all()
    assert ours[rows:].isnan().all(), "padding was written"
    assert (ours[:rows][batch.seq_lens == 0] == 0).all()
    clear = ~batch.ambiguous().repeat_interleave(case.heads[0] // batch.params.num_score_heads, 1)
    assert relative_error(ours[:rows], theirs[:rows])[clear].max() <= TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    "name", ["plain", "block32", "group3", "d192", "fp16", "fp32", "e4m3", "e5m2", "long"]
)
@pytest.mark.parametrize("over", [0, 1, 1 << 30])
def test_decode_with_every_token_is_plain_attention(backend, name: str, over: int) -> None:
    """Against the appended keys and values themselves, never having seen a page."""
    case = dataclasses.replace(CASES[name], budgets=tuple(n + over for n in CASES[name].lengths))
    batch = case.build(backend)
    ours, counted = batch.decode(backend)
    q_heads, group = case.heads[0], batch.params.group
    key, value = (x.split(case.lengths) for x in batch.stored())  # R x [L, Hkv, D]
    for row, length in enumerate(case.lengths):
        if not length:
            continue
        exact = torch.nn.functional.scaled_dot_product_attention(
            batch.query[row].float().unsqueeze(1),  # [Hq, 1, D]
            key[row].transpose(0, 1).repeat_interleave(group, 0),  # [Hq, L, D]
            value[row].transpose(0, 1).repeat_interleave(group, 0),
        ).squeeze(1)
        assert relative_error(ours[row], exact).max() <= TOLERANCE[case.dtype]
    tokens = sum(case.lengths) * q_heads
    assert counted == [0, sum(n > 0 for n in case.lengths), tokens, tokens]


@pytest.mark.parametrize("score", ["dot", "manhattan"])
def test_decode_finds_the_needle(backend, score: str) -> None:
    """One key in 2000 is the query itself: a budget of 8 finds it, wherever it lies."""
    case = Case((2000,), 8, heads=(2, 2), dtype=torch.float32, score=score)
    for at in (0, 777, 1999):
        batch = case.build(backend)
        batch.key[at] = batch.query[0]
        backend.append(batch.bound(backend), batch.key, batch.value, batch.slots)
        output, _ = batch.decode(backend)
        assert relative_error(output[0], batch.value[at]).max() < 0.02


def test_counters_add_up(backend) -> None:
    batch = Case((100, 10, 0), 32, heads=(8, 2)).build(backend)
    output, stats = torch.empty_like(batch.query), torch.tensor([1, 10, 100, 1000])
    backend.decode(batch.bound(backend), batch.query, batch.step(), output, stats)
    assert stats.tolist() == [1 + 1, 10 + 1, 100 + 8 * 110, 1000 + 8 * (32 + 10)]


# gather


@over_cases
def test_gather(backend, case: Case) -> None:
    batch = case.build(backend)
    assert torch.equal(batch.gathered(backend), torch.stack(batch.stored()).to(case.dtype))


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


def test_one_thread_and_several_give_the_same_bytes(backend) -> None:
    digests = set()
    for threads in ("1", "2"):
        env = {**os.environ, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", DIGEST, backend.isa]
        done = subprocess.run(
            command, env=env, cwd=ROOT / "tests", capture_output=True, text=True, check=True
        )
        digests.add(done.stdout)
    assert len(digests) == 1


@over_kinds
def test_surroundings_change_nothing(backend, name: str) -> None:
    check_surroundings(backend, CASES[name].build(backend))


@over_kinds
def test_surroundings_change_nothing_in_the_reference(name: str) -> None:
    check_surroundings(REFERENCE, CASES[name].build(REFERENCE))


def test_a_thousand_rows(backend) -> None:
    batch = many(1030).build(backend)
    ours, counted = batch.decode(backend)
    theirs, expected = batch.decode(REFERENCE, torch.float32)
    rows, clear = len(batch.lengths), ~batch.ambiguous()
    assert counted == expected
    assert relative_error(ours[:rows], theirs[:rows])[clear].max() <= TOLERANCE[ours.dtype]
    assert torch.equal(batch.gathered(backend), torch.stack(batch.stored()).to(ours.dtype))


def test_spare_blocks_are_never_read(backend) -> None:
    """The generator's garbage reaches the tests: the unused blocks do hold NaN."""
    batch = Case().build(backend)
    spare = batch.params.layout.k(batch.kv_cache).isnan().all(-1).all(-1).all(-1).sum()
    assert spare >= SPARE_BLOCKS


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="sse9"):
        CpuBackend("sse9")


def bad_arguments():
    batch = Case((40, 5), 8).build(REFERENCE)
    query, table, lens = batch.query, batch.block_table, batch.seq_lens
    out, stats = torch.empty_like(query), torch.zeros(4, dtype=torch.int64)
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
        "stats": (stats[:3], stats.int(), stats.view(2, 2)),
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
