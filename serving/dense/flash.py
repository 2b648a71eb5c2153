"""Dense attention on NVIDIA GPUs: vLLM's FlashAttention over strided views of the page.

FlashAttention takes fp8 K and V only with fp8 queries, and rounds the softmax to fp8 as well. Contexts
in fp8 pages are therefore copied out as real values, layer by layer, and prefill computes in the dtype
of the queries. Only stored values are rounded, and e5m2 and older GPUs are supported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.nn.functional import pad
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from vllm_adamas.serving.dense.base import DenseAttention, PrefillPlan, runs_of


@dataclass
class Part:
    """Requests of a plan whose contexts fit into the scratch together.

    Args:
        tokens: their slice of the plan's tokens.
        block_table, seq_lens: their rows of the plan's tensors.
        num_context_tokens: upper bound of the sum of ``seq_lens``.
        batch: arguments of FlashAttention that describe the batch.
    """

    tokens: slice
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    num_context_tokens: int
    batch: dict


def parts(plan: PrefillPlan, max_tokens: int) -> list[Part]:
    """Splits a plan into parts of at most ``max_tokens`` context tokens, without a sync."""
    starts, lens = plan.query_start_loc_cpu.tolist(), plan.seq_lens_cpu.tolist()
    found = []
    for first, last in runs_of(lens, max_tokens):
        seq_lens = plan.seq_lens[first:last]
        query_starts = plan.query_start_loc[first : last + 1]
        batch = {
            "cu_seqlens_q": query_starts - query_starts[0],
            "cu_seqlens_k": pad(seq_lens.cumsum(0, dtype=torch.int32), (1, 0)),
            "max_seqlen_q": max(b - a for a, b in pairwise(starts[first : last + 1])),
            "max_seqlen_k": max(1, *lens[first:last]),  # with DCP a rank may have none
        }
        found.append(
            Part(
                slice(starts[first] - starts[0], starts[last] - starts[0]),
                plan.block_table[first:last],
                seq_lens,
                max(1, sum(lens[first:last])),
                batch,
            )
        )
    return found


class FlashAttention(DenseAttention):
    """vLLM's FlashAttention, which reads K and V planes in place with their page and token strides.

    In decode the kernel computes its schedule on the device, so a captured graph replays with any
    lengths. A schedule prepared once per step, as in vLLM's own backend, saves at most 1.5 µs per layer
    (`benchmarks/results/decode_gpu.json`), less than preparing it costs for the few dense layers of a
    model.
    """

    def __init__(self, device: str = "cuda"):
        self._scratch = torch.zeros(0, dtype=torch.uint8, device=device)

    def reserve(self, params, dtype, max_tokens):
        """Allocates the K and V of one layer for the longest context if pages are fp8."""
        if not params.fp8:
            return 0
        size = max_tokens * _row_bytes(params, dtype)
        if self._scratch.numel() < size:
            # Zeros, because the kernel multiplies masked values by zero weights. No graph uses it.
            self._scratch = self._scratch.new_zeros(size)
        return size

    def prefill(self, backend, layer, plan, query, key, value, output):
        query, output = query[plan.tokens], output[plan.tokens]
        if plan.context is None:
            self._attend_pages(backend, layer, plan, query, output)
            return
        context, share = plan.context, plan.context.share
        new = {
            "k": key[plan.tokens],
            "v": value[plan.tokens],
            "q": query,
            "cu_seqlens_q": plan.query_start_loc,
            "cu_seqlens_k": plan.query_start_loc,
            "max_seqlen_q": plan.max_query_len,
            "max_seqlen_k": plan.max_query_len,
        }
        if not context.max_seq_len:  # for every rank, as what they exchange has to be
            _attend(layer.params, out=output, **new)
            return
        everyone = share.gather(query)
        found = torch.empty_like(everyone)
        lse = self._attend_pages(backend, layer, plan, everyone, found)
        before, lse = share.combine(found, lse.t().contiguous())
        before = before.contiguous()
        after = torch.empty_like(before)
        lse_after = _attend(layer.params, wants_lse=True, out=after, **new)
        merge_attn_states(output, before, lse.t().contiguous(), after, lse_after)

    def _attend_pages(self, backend, layer, plan, query, output) -> torch.Tensor | None:
        """Attention to the plan's contexts in the pages; with DCP to what the rank has of the earlier tokens.

        Args:
            query, output: ``[T, heads, D]`` of the plan's tokens.

        Returns:
            with DCP float32 ``[heads, T]``, the log-sum-exp of the logits.
        """
        params, lens = layer.params, plan.context or plan
        how = {"causal": lens is plan, "wants_lse": lens is not plan}  # all see the earlier tokens
        if not params.fp8:
            return _attend(
                params,
                *_views(layer),
                **how,
                q=query,
                out=output,
                cu_seqlens_q=plan.query_start_loc,
                max_seqlen_q=plan.max_query_len,
                seqused_k=lens.seq_lens,
                max_seqlen_k=lens.max_seq_len,
                block_table=plan.block_table,
            )
        rows = self._scratch.view(query.dtype)
        heads, size = params.num_kv_heads, params.layout.head_size
        if plan.prepared is None:
            own = replace(plan, seq_lens=lens.seq_lens, seq_lens_cpu=lens.seq_lens_cpu)
            plan.prepared = parts(own, self._scratch.numel() // _row_bytes(params, query.dtype))
        found = []
        for part in plan.prepared:
            shape = (2, part.num_context_tokens, heads, size)
            k, v = rows[: torch.Size(shape).numel()].view(shape)
            backend.gather(layer, part.block_table, part.seq_lens, k, v)
            q, out = query[part.tokens], output[part.tokens]
            found.append(_attend(params, k, v, **how, q=q, out=out, **part.batch))
        return None if lens is plan else torch.cat(found, 1)

    def decodes(self, params):
        return not params.fp8

    def decode(self, layer, query, batch, query_start_loc, output):
        _attend(
            layer.params,
            *_views(layer),
            q=query,
            out=output,
            cu_seqlens_q=query_start_loc,
            max_seqlen_q=1,
            seqused_k=batch.seq_lens,
            max_seqlen_k=batch.max_seq_len,
            block_table=batch.block_table,
        )


def _row_bytes(params, dtype) -> int:
    """Bytes of K and V of one token."""
    return 2 * params.num_kv_heads * params.layout.head_size * dtype.itemsize


def _views(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """The K and V planes as ``[num_blocks, N, Hkv, D]``."""
    layout, kv_cache = layer.params.layout, layer.kv_cache
    return layout.k(kv_cache).transpose(1, 2), layout.v(kv_cache).transpose(1, 2)


def _attend(params, k, v, causal=True, wants_lse=False, **batch) -> torch.Tensor | None:
    """Writes the output; returns float32 ``[heads, T]`` if the log-sum-exp of the logits is wanted.

    It is infinite for a query without tokens, whose output may be anything.
    """
    sinks = params.sinks
    found = flash_attn_varlen_func(
        k=k,
        v=v,
        softmax_scale=params.softmax_scale,
        causal=causal,
        window_size=[params.sliding_window - 1, 0] if params.sliding_window else [-1, -1],
        softcap=params.logits_soft_cap,
        s_aux=None if sinks is None else sinks.bfloat16(),  # the only type that it takes
        fa_version=get_flash_attn_version(head_size=params.layout.head_size),
        return_softmax_lse=wants_lse,
        **batch,
    )
    return found[1] if wants_lse else None
