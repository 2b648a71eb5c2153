"""How a sparse decode row compares with dense attention: the measures of studies and of the audit of a server.

A row chooses K tokens for each query head. The *kept mass* is the sum of their weights in dense attention, of
which a learned sink takes a share. The *recall* is the share of the K tokens with the largest weights that are
among them. The *output error* is ||output - dense|| / ||dense||.

Nothing here waits for the device: lengths are tensors there, and the host gives an upper bound.
"""

from __future__ import annotations

import torch

from vllm_adamas.backends.base import Layer, Params
from vllm_adamas.backends.softmax import soft_cap, softmax
from vllm_adamas.dtypes import ELEMENTS

KEYS_AT_ONCE = 1 << 24  #: float32 key elements that are held at a time


def read_keys(layer: Layer, block_table: torch.Tensor, longest: int) -> torch.Tensor:
    """K of R contexts from their pages, float32 ``[R, Hkv, longest, D]``; anything past the end of a context.

    Args:
        block_table: int32 ``[R, blocks]``, the blocks of ``longest`` tokens at least.
    """
    params, kv_cache = layer.params, layer.kv_cache
    used = block_table[:, : -(-longest // params.layout.block_size)].long()
    key = params.layout.k(kv_cache)[used.clamp(0, len(kv_cache) - 1)]  # [R, blocks, Hkv, N, D]
    key = real_values(params, key).transpose(1, 2).flatten(2, 3)  # [R, Hkv, blocks * N, D]
    return key[:, :, :longest] * params.k_scale


def real_values(params: Params, stored: torch.Tensor) -> torch.Tensor:
    """What K and V planes hold, as float32, before the factor of fp8."""
    return (stored.view(ELEMENTS[params.fp8].values) if params.fp8 else stored).float()


def dense_weights(
    layer: Layer,
    query: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """Softmax weights of all tokens in dense attention, float32 ``[R, Hq, longest]``, 0 past a context's end.

    Args:
        query: ``[R, Hq, D]``.
        block_table: int32 ``[R, blocks]``.
        seq_lens: int32 ``[R]``, the row's own token included.
        longest: an upper bound of them.
    """
    params = layer.params
    q = query.float().unflatten(1, (params.num_kv_heads, params.group))  # [R, Hkv, G, D]
    block, width = params.layout.block_size, max(1, len(query) * params.num_kv_heads * q.shape[-1])
    step = max(1, KEYS_AT_ONCE // (width * block))  # blocks
    parts = [
        q
        @ read_keys(
            layer, block_table[:, first : first + step], min(step * block, longest - first * block)
        ).mT
        for first in range(0, -(-longest // block), step)
    ]
    logits = torch.cat(parts, -1).flatten(1, 2) * params.softmax_scale  # [R, Hq, longest]
    beyond = torch.arange(longest, device=query.device) >= seq_lens.view(-1, 1, 1)
    logits = soft_cap(logits, params.logits_soft_cap).masked_fill(beyond, -torch.inf)
    return softmax(logits, params.sinks).nan_to_num(0.0)


def chosen_weights(weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Dense weights of the chosen tokens, ``[R, Hq, K]``, 0 where there is none; their sum is the kept mass.

    Args:
        weights: ``[R, Hq, L]``.
        tokens: ``[R, sets, K]`` as ``Inspectable.select`` returns them.
    """
    tokens = per_query_head(tokens, weights.shape[1])
    return weights.gather(-1, tokens.clamp_min(0)).masked_fill(tokens < 0, 0.0)


def per_query_head(tokens: torch.Tensor, num_query_heads: int) -> torch.Tensor:
    """The set of each query head: int64 ``[R, Hq, K]`` from ``[R, sets, K]``."""
    return tokens.long().repeat_interleave(num_query_heads // tokens.shape[1], 1)


def recall(weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The recall of each query head, ``[R, Hq]``; arguments are those of :func:`chosen_weights`."""
    tokens = per_query_head(tokens, weights.shape[1])
    chosen = torch.zeros_like(weights).scatter_add_(-1, tokens.clamp_min(0), (tokens >= 0).float())
    best = weights.topk(tokens.shape[-1], -1).indices  # [R, Hq, K]
    count = (tokens >= 0).sum(-1, keepdim=True)  # [R, Hq, 1]
    inside = torch.arange(tokens.shape[-1], device=tokens.device) < count
    return (chosen.gather(-1, best) * inside).sum(-1) / count.squeeze(-1).clamp_min(1)


def output_error(output: torch.Tensor, dense: torch.Tensor, dim) -> torch.Tensor:
    """The output error over the dimensions ``dim``, in float32."""
    off = output.float() - dense.float()
    return off.norm(dim=dim) / dense.float().norm(dim=dim).clamp_min(1e-30)
