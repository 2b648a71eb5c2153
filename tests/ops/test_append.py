"""Append: K, V, codes and scales of new tokens, written to their slots and nowhere else."""

import dataclasses

import pytest
import torch
from cases import CASES, Case, as_bytes, check_append, check_slots_are_skipped
from targets import REFERENCE, Target, over_cases, over_targets, picked, target  # noqa: F401

from vllm_adamas.backends.reference import signature as sig


@over_cases()
def test_append(target: Target, case: Case) -> None:
    check_append(target.build(case), case.build(REFERENCE))


@pytest.mark.parametrize("name", ["plain", "block48", "d80", "d96", "fp32", "e4m3"])
@over_targets("cpu")
def test_append_writes_its_slots_alone(target: Target, name: str) -> None:
    """Other blocks, other slots and a neighbour's head keep all their bytes."""
    batch = target.build(CASES[name])
    again = dataclasses.replace(batch, memory=batch.memory.clone(), kv=-batch.kv)
    one = torch.full_like(again.slots, -1)
    one[20] = again.slots[20]
    target.backend.append(again.bound(target.backend), again.key, again.value, one)
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


@pytest.mark.parametrize("name", ["plain", "block48", "d96", "fp32", "e4m3"])
@over_targets("cpu")
def test_append_replaces_rejected_drafts(target: Target, name: str) -> None:
    """K, V, codes and scale of a slot are those of the last token that was written there."""
    batch = target.build(CASES[name])
    expected, layer = batch.memory.clone(), batch.bound(target.backend)
    target.backend.append(layer, 3 * batch.key.flip(0), -batch.value.flip(0), batch.slots)
    layout = batch.params.layout
    for plane in (layout.k, layout.v, layout.hi, layout.lo, layout.scale):
        assert not torch.equal(as_bytes(plane(batch.memory)), as_bytes(plane(expected)))
    target.backend.append(layer, batch.key, batch.value, batch.slots)
    assert torch.equal(as_bytes(batch.memory), as_bytes(expected))


ONE = {"cpu": {"one": Case()}, "cuda": {"one": Case()}, **picked(triton=("group2-shared",))}


@over_cases(cases=ONE)
def test_append_of_nothing_but_padding(target: Target, case: Case) -> None:
    batch = target.build(case)
    before = batch.memory.clone()
    slots = torch.full_like(batch.slots, -1)
    target.backend.append(batch.bound(target.backend), batch.key, batch.value, slots)
    assert torch.equal(as_bytes(before), as_bytes(batch.memory))


@over_cases(cases={kind: ONE[kind] for kind in ("triton", "cuda")})
def test_append_skips_slots_behind_the_cache(target: Target, case: Case) -> None:
    """The CPU kernels refuse them."""
    check_slots_are_skipped(target.backend, target.build(case))


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@over_targets("cpu", "cuda")
def test_append_rounds_to_fp8_as_torch_does(target: Target, kind: str) -> None:
    """Every bf16 value but NaN: zeros of both signs, subnormals, ties, saturation, infinities."""
    bits = torch.arange(0x7F80 + 64, dtype=torch.int32).clamp_max(0x7F80).to(torch.int16)
    both = torch.cat((bits, bits | -(2**15))).view(torch.bfloat16).view(-1, 1, 64)
    params = dataclasses.replace(
        Case(fp8=kind, heads=(1, 1), head_size=64).params, k_scale=1.0, v_scale=1.0
    )
    expected = torch.zeros(len(both) // 64 + 1, 1, 64, params.layout.token_bytes, dtype=torch.uint8)
    got = expected.to(target.device, copy=True)
    for runner, memory in ((target.backend, got), (REFERENCE, expected)):
        key, slots = both.to(memory.device), torch.arange(len(both), device=memory.device)
        runner.append(runner.bind(params, memory), key, -key, slots)
    for plane in (params.layout.k, params.layout.v):
        assert torch.equal(plane(got).cpu(), plane(expected))
