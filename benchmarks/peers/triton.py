"""vLLM's Triton attention, called as its TRITON_ATTN backend calls it for decode."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peers.base import Call, Cell, Peer

BLOCK_SIZE = 16


def prepare(cell: Cell) -> dict[str, Callable[[], list[Call]]]:
    from vllm.v1.attention.backends.triton_attn import (
        MIN_LAUNCH_GRID_SIZE_2D,
        NUM_PAR_SOFTMAX_SEGMENTS,
    )
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    device = cell.key.device
    threshold = MIN_LAUNCH_GRID_SIZE_2D // cell.num_kv_heads
    partial = (threshold, cell.num_query_heads, NUM_PAR_SOFTMAX_SEGMENTS)
    segments, maxima, sums = (
        torch.empty(*partial, *tail, device=device) for tail in ((cell.head_size,), (), ())
    )
    one = torch.ones(1, device=device).expand(cell.rows, cell.num_kv_heads)
    arguments = {
        **cell.varlen_arguments(BLOCK_SIZE),
        "window_size": (-1, -1),
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": one,
        "v_descale": one,
        "seq_threshold_3D": threshold,
        "num_par_softmax_segments": NUM_PAR_SOFTMAX_SEGMENTS,
        "softmax_segm_output": segments,
        "softmax_segm_max": maxima,
        "softmax_segm_expsum": sums,
    }
    tables = cell.launch_tables(BLOCK_SIZE)
    queries = cell.queries(len(tables))
    outputs = [torch.empty_like(query) for query in queries]

    def calls() -> list[Call]:
        return [
            lambda q=q, t=t, o=o: unified_attention(q=q, out=o, block_table=t, **arguments)
            for q, t, o in zip(queries, tables, outputs, strict=True)
        ]

    return {"split": calls}


PEER = Peer("triton", "vLLM's Triton attention", "vLLM's Triton", "vllm", "vllm", prepare)
