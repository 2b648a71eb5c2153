"""The reference backend: one loop over rows."""

from __future__ import annotations

import torch

from vllm_adamas.backends.base import Backend
from vllm_adamas.backends.inspect import Inspectable
from vllm_adamas.backends.reference import signature as sig
from vllm_adamas.backends.softmax import soft_cap, softmax
from vllm_adamas.dtypes import ELEMENTS
from vllm_adamas.layout import TILE


def select_tokens(scores: torch.Tensor, budget: int, sinks: int, recent: int) -> torch.Tensor:
    """The ``budget`` best tokens of one context, ascending int64; ties go to the most recent.

    Args:
        scores: ``[L]``.
        budget: tokens to take; raised to ``sinks + recent`` and to 1.
        sinks, recent: the first and the last tokens, taken whatever their scores are.
    """
    length, budget = scores.shape[0], max(budget, sinks + recent, 1)
    if budget >= length:
        return torch.arange(length)
    middle = scores[sinks : length - recent].flip(0)  # [M], most recent first
    best = middle.sort(descending=True, stable=True).indices[: budget - sinks - recent]
    chosen = length - recent - 1 - best
    return (
        torch.cat((torch.arange(sinks), chosen, torch.arange(length - recent, length)))
        .sort()
        .values
    )


class ReferenceBackend(Backend, Inspectable):
    """Plain PyTorch on any device."""

    name = "reference"
    description = "reference (PyTorch)"

    def append(self, layer, key, value, slot_mapping):
        params, kv_cache = layer.params, layer.kv_cache
        key, value = key[: len(slot_mapping)], value[: len(slot_mapping)]
        keep = slot_mapping >= 0
        slots = slot_mapping[keep]
        block, offset = slots // params.layout.block_size, slots % params.layout.block_size
        layout = params.layout
        layout.k(kv_cache)[block, :, offset] = self._to_plane(
            params, key[keep], params.k_scale
        )  # [T, Hkv, D]
        layout.v(kv_cache)[block, :, offset] = self._to_plane(params, value[keep], params.v_scale)
        x = sig.hadamard(key[keep])  # [T, Hkv, S]
        if params.key_mean is not None:
            x = x - params.key_mean
        codes = sig.bucketize(x, params.coding)
        tile, lane = offset // TILE, offset % TILE
        layout.hi(kv_cache)[block, :, tile, :, lane] = sig.pack(codes >> 1)  # [T, Hkv, S/32]
        layout.lo(kv_cache)[block, :, tile, :, lane] = sig.pack(codes & 1)
        layout.scale(kv_cache)[block, :, offset] = sig.code_scale(x, codes)  # [T, Hkv]

    def scan(self, layer, query, block_table, seq_lens, longest=None):
        params = layer.params
        longest = _max(seq_lens) if longest is None else longest
        shape = (query.shape[0], params.num_score_heads, longest)
        scores = torch.full(shape, float("-inf"))  # [R, num_score_heads, L]
        for row, length in enumerate(_lengths(params, block_table, seq_lens)):
            if length:
                scores[row, :, :length] = self._scan_row(
                    params, query[row], layer.kv_cache, block_table[row], length
                )
        return scores

    def _scan_row(self, params, query, kv_cache, blocks, length):
        layout = params.layout
        used = blocks[: -(-length // layout.block_size)].long()
        hi = sig.unpack(sig.untile(layout.hi(kv_cache)[used]))  # [blocks, Hkv, N, S]
        lo = sig.unpack(sig.untile(layout.lo(kv_cache)[used]))
        codes = (2 * hi + lo).transpose(0, 1).flatten(1, 2)[:, :length]  # [Hkv, L, S]
        scale = layout.scale(kv_cache)[used].transpose(0, 1).flatten(1, 2)[:, :length]  # [Hkv, L]
        q = sig.hadamard(query).unflatten(0, (params.num_kv_heads, params.group))  # [Hkv, G, S]
        if params.combine == "max":
            logits = sig.logits(q, codes.unsqueeze(1), scale.unsqueeze(1), params.logit_scale)
            sample = logits[..., sig.sampled_tokens(length)]
            scores = (logits - sig.log_sum(sample)).amax(1, keepdim=True)  # [Hkv, 1, L]
        elif params.score == "dot":
            if params.selection == "kv_head":
                q = q.sum(1, keepdim=True)  # [Hkv, 1, S]; dot is linear, so queries are summed
            scores = sig.dot_score(q, codes.unsqueeze(1), scale.unsqueeze(1))  # [Hkv, G, L]
        else:
            scores = sig.manhattan_score(sig.bucketize(q, params.coding), codes.unsqueeze(1))
            if params.selection == "kv_head":
                scores = scores.sum(1, keepdim=True)  # [Hkv, 1, L]
        return scores.flatten(0, 1)  # [num_score_heads, L]

    def select(self, params, scores, seq_lens, budgets, most=None):
        rows, heads, _ = scores.shape
        most = _max(params.attended(seq_lens, budgets)) if most is None else most
        chosen = torch.full((rows, heads, most), -1, dtype=torch.int32)
        for row, (length, budget) in enumerate(
            zip(seq_lens.tolist(), budgets.tolist(), strict=True)
        ):
            for head in range(heads):
                tokens = select_tokens(
                    scores[row, head, :length], budget, params.num_sink_tokens, params.recent_window
                )
                chosen[row, head, : len(tokens)] = tokens
        return chosen

    def decode(self, layer, query, batch, output, stats, lse=None):
        params, kv_cache, block_table = layer.params, layer.kv_cache, batch.block_table
        attended = params.attended(batch.seq_lens, batch.budgets).tolist()
        lengths = _lengths(params, block_table, batch.seq_lens)
        for row, (length, budget) in enumerate(zip(lengths, attended, strict=True)):
            output[row] = 0
            if lse is not None:
                lse[row] = float("-inf")
            if length == 0:
                continue
            visible = length if params.sliding_window == 0 else min(length, params.sliding_window)
            sparse = budget < length and not params.sliding_window
            if sparse:
                scores = self._scan_row(params, query[row], kv_cache, block_table[row], length)
            for head in range(params.num_query_heads):
                kv_head = head // params.group
                if sparse:
                    score_head = head if params.selection == "query_head" else kv_head
                    tokens = select_tokens(
                        scores[score_head], budget, params.num_sink_tokens, params.recent_window
                    )
                else:
                    tokens = torch.arange(length - visible, length)
                k, v = self._tokens(params, kv_cache, block_table[row], kv_head, tokens)  # [K, D]
                logits = k @ query[row, head].float() * params.softmax_scale  # [K]
                logits = soft_cap(logits, params.logits_soft_cap)
                if lse is not None:
                    lse[row, head] = logits.logsumexp(0)
                sink = None if params.sinks is None else params.sinks[head]
                p = softmax(logits, sink)  # [K]
                output[row, head] = (p @ v).to(output.dtype)
            seen, heads = budget if sparse else visible, params.num_query_heads
            stats += torch.tensor([sparse, not sparse, length * heads, seen * heads, 0])

    def gather(self, layer, block_table, seq_lens, key, value):
        params, kv_cache, start = layer.params, layer.kv_cache, 0
        for row, length in enumerate(_lengths(params, block_table, seq_lens)):
            for head in range(params.num_kv_heads):
                k, v = self._tokens(params, kv_cache, block_table[row], head, torch.arange(length))
                key[start : start + length, head] = k.to(key.dtype)
                value[start : start + length, head] = v.to(value.dtype)
            start += length

    @staticmethod
    def _tokens(params, kv_cache, blocks, kv_head, tokens):
        """K and V of the given tokens of one context, float32 ``[K, D]`` each."""
        block, offset = (
            blocks[tokens // params.layout.block_size].long(),
            tokens % params.layout.block_size,
        )
        k = params.layout.k(kv_cache)[block, kv_head, offset]  # [K, D]
        v = params.layout.v(kv_cache)[block, kv_head, offset]
        if params.fp8:
            k, v = k.view(ELEMENTS[params.fp8].values), v.view(ELEMENTS[params.fp8].values)
        return k.float() * params.k_scale, v.float() * params.v_scale

    @staticmethod
    def _to_plane(params, x, scale):
        if not params.fp8:
            return x.to(params.layout.dtype)
        kind = ELEMENTS[params.fp8].values
        limit = torch.finfo(kind).max
        return (x.float() / scale).clamp(-limit, limit).to(kind).view(torch.uint8)


def _lengths(params, block_table: torch.Tensor, seq_lens: torch.Tensor) -> list[int]:
    lengths, held = seq_lens.tolist(), block_table.shape[1] * params.layout.block_size
    if any(not 0 <= length <= held for length in lengths):
        raise ValueError(
            f"seq_lens: a context has not 0 to {held} tokens, which the block table holds"
        )
    return lengths


def _max(lengths: torch.Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0
