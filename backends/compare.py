"""How a sparse decode row compares with dense attention: the measures of studies and of the audit of a server.

A row chooses K tokens for each query head. The *kept mass* is the sum of their weights in dense attention, of
which a learned sink takes a share. The *oracle mass* is that of the K tokens with the largest weights, and the
*recall* the share of these that are among the chosen. The *output error* is ||output - dense|| / ||dense||.

Nothing here waits for the device: lengths are tensors there, and the host gives an upper bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_adamas.backends.base import COUNTERS, DecodeBatch, Layer, Params
from vllm_adamas.backends.inspect import Inspectable
from vllm_adamas.backends.softmax import soft_cap, softmax
from vllm_adamas.dtypes import ELEMENTS

KEYS_AT_ONCE = 1 << 22  #: float32 key elements that are held at a time


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


class Choice(NamedTuple):
    """What each query head chose, ``[R, Hq]`` each: kept mass, oracle mass and recall."""

    kept_mass: torch.Tensor
    oracle_mass: torch.Tensor
    recall: torch.Tensor


def judge_choice(weights: torch.Tensor, tokens: torch.Tensor) -> Choice:
    """Arguments are those of :func:`chosen_weights`."""
    kept = chosen_weights(weights, tokens).sum(-1)
    tokens = per_query_head(tokens, weights.shape[1])  # [R, Hq, K]
    here = tokens >= 0
    chosen = torch.zeros_like(weights).scatter_add_(-1, tokens.clamp_min(0), here.float())
    count = here.sum(-1, keepdim=True)  # [R, Hq, 1]
    inside = torch.arange(tokens.shape[-1], device=tokens.device) < count
    best, at = weights.topk(tokens.shape[-1], -1)  # [R, Hq, K]
    return Choice(
        kept,
        (best * inside).sum(-1),
        (chosen.gather(-1, at) * inside).sum(-1) / count.squeeze(-1).clamp_min(1),
    )


def output_error(output: torch.Tensor, dense: torch.Tensor, dim) -> torch.Tensor:
    """The output error over the dimensions ``dim``, in float32."""
    off = output.float() - dense.float()
    return off.norm(dim=dim) / dense.float().norm(dim=dim).clamp_min(1e-30)


class Comparison(NamedTuple):
    """The measures of R rows, float32 ``[R]`` each: the error of all query heads as one vector, and the means of the
    others over the heads."""

    output_error: torch.Tensor
    kept_mass: torch.Tensor
    oracle_mass: torch.Tensor
    recall: torch.Tensor


def compare_rows(
    backend: Inspectable,
    layer: Layer,
    query: torch.Tensor,
    output: torch.Tensor,
    batch: DecodeBatch,
) -> Comparison:
    """Compares the output of R sparse rows with dense attention by the same backend over the same pages.

    Args:
        query, output: ``[R, Hq, D]``, of the decode step.
        batch: its rows, with budgets up to the layer's own and with a ``max_seq_len``.
    """
    params, longest = layer.params, batch.max_seq_len
    rows = (query, batch.block_table, batch.seq_lens)
    dense = torch.empty_like(output)
    counters = torch.zeros(COUNTERS, dtype=torch.int64, device=query.device)  # nobody reads them
    backend.decode(layer, query, batch.dense, dense, counters)
    scores = backend.scan(layer, *rows, longest)
    most = min(max(params.budget.most(longest), params.least_budget), longest)
    tokens = backend.select(params, scores, batch.seq_lens, batch.budgets, most)
    choice = judge_choice(dense_weights(layer, *rows, longest), tokens)
    return Comparison(output_error(output, dense, (1, 2)), *(x.mean(-1) for x in choice))
