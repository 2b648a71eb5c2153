"""FlashAttention 3 of the installed vLLM, called as vLLM calls it for decode.

The cache has pages of 16 tokens, vLLM's default. vLLM either prepares the schedule of a step on the GPU
before the layers run, or leaves it to each call. In a captured graph the call is for the longest context
that the server admits; a prepared schedule is for the contexts of the step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from peers.base import Call, Cell, Peer

BLOCK_SIZE = 16
NUM_SPLITS = 32  #: vLLM's bound inside CUDA graphs


def prepare(cell: Cell) -> dict[str, Callable[[], list[Call]]]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    batch = cell.varlen_arguments(BLOCK_SIZE)
    tables = cell.launch_tables(BLOCK_SIZE)
    queries = cell.queries(len(tables))
    outputs = [torch.empty_like(query) for query in queries]
    schedule = get_scheduler_metadata(
        batch_size=cell.rows,
        max_seqlen_q=cell.positions,
        max_seqlen_k=cell.length,
        num_heads_q=cell.num_query_heads,
        num_heads_kv=cell.num_kv_heads,
        headdim=cell.head_size,
        cache_seqlens=batch["seqused_k"],
        qkv_dtype=cell.key.dtype,
        cu_seqlens_q=batch["cu_seqlens_q"],
        page_size=BLOCK_SIZE,
        causal=True,
        num_splits=NUM_SPLITS,
    )

    def calls(**extra) -> list[Call]:
        return [
            lambda q=q, t=t, o=o: flash_attn_varlen_func(
                q=q, out=o, block_table=t, fa_version=3, **batch, **extra
            )
            for q, t, o in zip(queries, tables, outputs, strict=True)
        ]

    return {
        "own schedule": calls,
        "prepared schedule": lambda: calls(scheduler_metadata=schedule, num_splits=NUM_SPLITS),
    }


PEER = Peer("fa3", "FlashAttention 3", "FA3", "vllm", "vllm", prepare)
