"""Other ways to select tokens, for comparison in studies; they read the keys, not the signatures.

These implementations save no memory traffic: they show the quality that a selection reaches.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch

from vllm_adamas.backends.base import Backend
from vllm_adamas.backends.compare import read_keys, real_values
from vllm_adamas.backends.inspect import select_tokens
from vllm_adamas.backends.softmax import soft_cap, softmax
from vllm_adamas.evaluate.delegate import DelegatingBackend

Selector = Literal["oracle", "quest", "streaming_llm"]

KEYS_AT_ONCE = 1 << 27  #: float32 key elements that are held at a time
QUEST_PAGE = 16  #: tokens per page of Quest (arXiv 2406.10774)
STREAMING_SINKS = 4  #: first tokens that StreamingLLM keeps (arXiv 2309.17453)


class SelectorBackend(DelegatingBackend):
    """A backend whose decode selects tokens with ``selector``, one set per query head.

    ``oracle``: the tokens with the largest exact q.k. ``quest``: pages of 16 tokens with the largest
    upper bound of q.k from their channel-wise minimum and maximum. ``streaming_llm``: the first 4
    tokens and the most recent ones.
    """

    def __init__(self, inner: Backend, selector: Selector):
        super().__init__(inner)
        self.selector = selector

    @property
    def description(self) -> str:
        return f"{self.selector} (PyTorch)"

    def scan(self, layer, query, block_table, seq_lens, longest=None):
        params = layer.params
        rows = query.shape[0]
        if longest is None:
            longest = int(seq_lens.max()) if rows else 0
        q = query.float().unflatten(1, (params.num_kv_heads, params.group))  # [R, Hkv, G, D]
        position = torch.arange(longest, device=query.device)
        beyond = (position >= seq_lens.view(-1, 1))[:, None]  # [R, 1, L]
        if self.selector != "streaming_llm":  # pages hold anything past a context's end
            key = read_keys(layer, block_table, longest).nan_to_num_(0.0, 0.0, 0.0)
        if self.selector == "oracle":
            scores = (q @ key.transpose(-1, -2)).flatten(1, 2)
        elif self.selector == "quest":
            pages = math.ceil(longest / QUEST_PAGE)
            rest = (0, 0, 0, pages * QUEST_PAGE - longest)
            outside = torch.nn.functional.pad(beyond, rest[2:], value=True)[..., None]
            tiles = torch.nn.functional.pad(key, rest)
            low, high = (
                tiles.masked_fill(outside, far).unflatten(2, (pages, QUEST_PAGE))
                for far in (torch.inf, -torch.inf)
            )
            low, high = low.amin(3), high.amax(3)  # [R, Hkv, pages, D]; infinite without tokens
            low, high = (x.nan_to_num(0.0, 0.0, 0.0) for x in (low, high))
            bound = q.clamp(min=0) @ high.transpose(-1, -2) + q.clamp(max=0) @ low.transpose(-1, -2)
            scores = bound.repeat_interleave(QUEST_PAGE, -1)[..., :longest].flatten(1, 2)
        else:
            recency = torch.where(position < STREAMING_SINKS, torch.inf, position.float())
            scores = recency.expand(len(query), params.num_query_heads, longest)
        return scores.masked_fill(beyond, -torch.inf)

    def select(self, params, scores, seq_lens, budgets, most=None):
        return select_tokens(params, scores, seq_lens, budgets, most)

    def decode(self, layer, query, batch, output, stats):
        params, query = layer.params, query[: len(batch.seq_lens)]
        sparse = (batch.budgets < batch.seq_lens) & (params.sliding_window == 0)
        dense = replace(batch, seq_lens=batch.seq_lens.masked_fill(sparse, 0))
        self.inner.decode(layer, query, dense, output, stats)
        if not bool(sparse.any()):
            return
        elements = int(batch.seq_lens.max()) * params.num_kv_heads * params.layout.head_size
        for rows in sparse.nonzero().flatten().split(max(1, KEYS_AT_ONCE // elements)):
            table, lens, budgets = (
                batch.block_table[rows],
                batch.seq_lens[rows],
                batch.budgets[rows],
            )
            tokens = self.select(params, self.scan(layer, query[rows], table, lens), lens, budgets)
            found = self._attend(layer, query[rows].float(), table, tokens)
            output[rows] = found.to(output.dtype)

    def _attend(self, layer, query, block_table, tokens):
        """Softmax over ``tokens`` ``[R, Hq, K]``, -1 where there is none: float32 ``[R, Hq, D]``."""
        params, kv_cache = layer.params, layer.kv_cache
        layout = params.layout
        heads = torch.arange(params.num_query_heads, device=query.device) // params.group
        at = tokens.long().clamp_min(0)
        row = torch.arange(len(at), device=query.device)[:, None, None]
        block = block_table[row, at // layout.block_size].long()  # [R, Hq, K]
        k, v = (
            real_values(params, plane[block, heads[None, :, None], at % layout.block_size]) * scale
            for plane, scale in (
                (layout.k(kv_cache), params.k_scale),
                (layout.v(kv_cache), params.v_scale),
            )
        )  # [R, Hq, K, D]
        logits = (k @ query.unsqueeze(-1)).squeeze(-1) * params.softmax_scale
        logits = soft_cap(logits, params.logits_soft_cap).masked_fill(tokens < 0, -torch.inf)
        weights = softmax(logits, params.sinks)  # [R, Hq, K]
        return (weights.unsqueeze(2) @ v).squeeze(2)
