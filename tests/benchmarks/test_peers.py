"""How peers are called, on stand-ins for their packages and a cache on the CPU."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peers import PEERS
from peers.base import Cell

TOKENS, LENGTH, LAUNCH, ROWS, CALLS = 1024, 128, 512, 2, 3
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 64


@pytest.fixture
def cell() -> Cell:
    key, value = torch.randn(2, TOKENS, KV_HEADS, HEAD_SIZE).half()

    def block_tables(block_size: int) -> list[torch.Tensor]:
        blocks = torch.arange(TOKENS // block_size, dtype=torch.int32)
        return [blocks.roll(-i)[: ROWS * LENGTH // block_size].view(ROWS, -1) for i in range(CALLS)]

    return Cell(key, value, block_tables, HEADS, LENGTH, ROWS, LAUNCH)


@pytest.fixture
def calls(monkeypatch) -> list[SimpleNamespace]:
    """What every stand-in was called with, in the same words."""
    found: list[SimpleNamespace] = []

    def module(name: str, **members) -> None:
        made = ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)

    def varlen(q, k, v, out, block_table, seqused_k, max_seqlen_k, **rest) -> None:
        assert rest["causal"]
        assert rest["softmax_scale"] == HEAD_SIZE**-0.5
        assert seqused_k.tolist() == [LENGTH] * ROWS
        assert max_seqlen_k == LAUNCH
        assert block_table.shape == (ROWS, LAUNCH // k.shape[1])
        assert rest["cu_seqlens_q"].tolist() == list(range(ROWS + 1))
        found.append(SimpleNamespace(query=q, key=k, value=v, table=block_table))

    def schedule(max_seqlen_k, **rest) -> None:
        assert max_seqlen_k == LENGTH  # of the step, which replays

    class Wrapper:
        def __init__(self, workspace, layout, **kwargs):
            assert layout == "NHD"

        def reset_workspace_buffer(self, workspace, plan_memory):
            assert workspace.numel() > plan_memory.numel()

        def plan(self, starts, indices, last, heads, kv_heads, head_size, block_size, **kwargs):
            assert (heads, kv_heads, head_size) == (HEADS, KV_HEADS, HEAD_SIZE)
            assert starts.tolist() == [i * LENGTH // block_size for i in range(ROWS + 1)]
            assert last.tolist() == [block_size] * ROWS
            self.table = indices.view(ROWS, -1)

        def run(self, query, pages, out):
            key, value = pages
            found.append(SimpleNamespace(query=query, key=key, value=value, table=self.table))

    module(
        "vllm.vllm_flash_attn",
        flash_attn_varlen_func=varlen,
        get_scheduler_metadata=schedule,
    )
    module(
        "vllm.v1.attention.backends.triton_attn",
        MIN_LAUNCH_GRID_SIZE_2D=128,
        NUM_PAR_SOFTMAX_SEGMENTS=16,
    )
    module("vllm.v1.attention.ops.triton_unified_attention", unified_attention=varlen)
    module("flashinfer", BatchDecodeWithPagedKVCacheWrapper=Wrapper)

    def dense_decode(query, key, value, table, scale):
        assert scale == HEAD_SIZE**-0.5
        found.append(SimpleNamespace(query=query, key=key, value=value, table=table))

    def attention_bias(lengths, table, block_size):
        assert lengths == [LENGTH] * ROWS
        return table

    monkeypatch.setattr("peers.xformers.dense_decode", dense_decode)
    monkeypatch.setattr("peers.xformers.attention_bias", attention_bias)
    return found


WAYS = {
    "fa3": ["own schedule", "prepared schedule"],
    "triton": ["split"],
    "flashinfer": [
        "tensor cores, general plan",
        "tensor cores, exact plan",
        "CUDA cores, general plan",
        "CUDA cores, exact plan",
    ],
    "xformers": ["split-K"],
}


@pytest.mark.parametrize("name", PEERS)
def test_every_call_reads_the_cache_through_a_table_of_its_own(cell, calls, name: str) -> None:
    ways = PEERS[name].prepare(cell)
    assert list(ways) == WAYS[name]
    for make in ways.values():
        calls.clear()
        for call in make():
            call()
        assert len(calls) == CALLS
        block_size = calls[0].key.shape[1]
        for one, table in zip(calls, cell.block_tables(block_size), strict=True):
            assert torch.equal(one.table[:, : table.shape[1]], table)
            assert one.query.shape == (ROWS, HEADS, HEAD_SIZE)
            assert one.query.dtype == cell.key.dtype
            for stored, given in ((cell.key, one.key), (cell.value, one.value)):
                assert given.shape == (TOKENS // block_size, block_size, KV_HEADS, HEAD_SIZE)
                assert given.data_ptr() == stored.data_ptr()
        assert len({id(one.query) for one in calls}) == CALLS


def test_peers_are_named_once() -> None:
    assert list(PEERS) == list(WAYS)
    for one in ("title", "heading"):
        assert len({getattr(peer, one) for peer in PEERS.values()}) == len(PEERS)


def test_a_peer_that_is_not_installed_is_not_available(monkeypatch) -> None:
    monkeypatch.setattr("peers.base.find_spec", lambda name: None)
    assert not any(peer.available() for peer in PEERS.values())
