"""Other ways to choose tokens, for comparison in studies: they read the keys, not the signatures.

None of them saves memory traffic as written here; they say what a choice costs in quality.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from vllm_adamas.backends.base import Backend, Through
from vllm_adamas.dtypes import ELEMENTS

Selector = Literal["oracle", "quest", "streaming_llm"]

KEYS_AT_ONCE = 1 << 27  #: elements in float32
QUEST_PAGE = 16  #: tokens per page of Quest (arXiv 2406.10774)
STREAMING_SINKS = 4  #: first tokens that StreamingLLM keeps (arXiv 2309.17453)


class SelectorBackend(Through):
    """A backend whose decode chooses tokens by ``selector``, one set per query head.

    ``oracle``: the tokens with the largest true q.k. ``quest``: pages of 16 tokens by the upper bound
    of q.k from their channel-wise minimum and maximum. ``streaming_llm``: the first 4 and the last.
    """

    def __init__(self, inner: Backend, selector: Selector):
        super().__init__(inner)
        self.selector = selector

    @property
    def description(self) -> str:
        return f"{self.selector} (PyTorch)"

    def scan(self, params, query, page, block_table, seq_lens):
        rows = query.shape[0]
        longest = int(seq_lens.max()) if rows else 0
        q = query.float().unflatten(1, (params.num_kv_heads, params.group))  # [R, Hkv, G, D]
        position = torch.arange(longest, device=query.device)
        beyond = (position >= seq_lens.view(-1, 1))[:, None]  # [R, 1, L]
        key = (
            None
            if self.selector == "streaming_llm"
            else self._keys(params, page, block_table, longest)
        )
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

    def select(self, params, scores, seq_lens, budgets):
        longest = scores.shape[-1]
        wanted = torch.minimum(budgets, seq_lens).view(-1, 1, 1)  # [R, 1, 1]
        most = int(wanted.max()) if len(scores) else 0
        best = scores.topk(most).values  # [R, heads, most]
        last = best.gather(-1, (wanted - 1).clamp_min(0).expand(*best.shape[:2], 1).long())
        position = torch.arange(longest, device=scores.device)
        above = scores > last
        equal = (scores == last) & (position < seq_lens.view(-1, 1, 1))
        rank = equal.flip(-1).cumsum(-1).flip(-1)  # 1 is the most recent of the equal ones
        chosen = above | (equal & (rank <= wanted - above.sum(-1, keepdim=True)))
        slot = torch.where(chosen, chosen.cumsum(-1) - 1, most)
        out = torch.full((*scores.shape[:2], most + 1), -1, device=scores.device)
        return out.scatter_(-1, slot, position.expand_as(slot))[..., :most].to(torch.int32)

    def decode(
        self,
        params,
        query,
        page,
        block_table,
        seq_lens,
        budgets,
        output,
        stats,
        *,
        max_seq_len=None,
        overlap=False,
    ):
        sparse = (budgets < seq_lens) & (params.sliding_window == 0)
        dense = seq_lens.masked_fill(sparse, 0)
        self.inner.decode(
            params,
            query,
            page,
            block_table,
            dense,
            budgets,
            output,
            stats,
            max_seq_len=max_seq_len,
        )
        if not bool(sparse.any()):
            return
        elements = int(seq_lens.max()) * params.num_kv_heads * params.layout.head_size
        for rows in sparse.nonzero().flatten().split(max(1, KEYS_AT_ONCE // elements)):
            some = (page, block_table[rows], seq_lens[rows])
            tokens = self.select(
                params, self.scan(params, query[rows], *some), seq_lens[rows], budgets[rows]
            )
            found = self._attend(params, query[rows].float(), page, block_table[rows], tokens)
            output[rows] = found.to(output.dtype)

    def _attend(self, params, query, page, block_table, tokens):
        """Softmax over ``tokens`` ``[R, Hq, K]``, -1 where there is none: float32 ``[R, Hq, D]``."""
        layout = params.layout
        heads = torch.arange(params.num_query_heads, device=page.device) // params.group
        at = tokens.long().clamp_min(0)
        row = torch.arange(len(at), device=page.device)[:, None, None]
        block = block_table[row, at // layout.block_size].long()  # [R, Hq, K]
        k, v = (
            self._real(params, plane[block, heads[None, :, None], at % layout.block_size]) * scale
            for plane, scale in ((layout.k(page), params.k_scale), (layout.v(page), params.v_scale))
        )  # [R, Hq, K, D]
        logits = (k @ query.unsqueeze(-1)).squeeze(-1) * params.softmax_scale
        weights = logits.masked_fill(tokens < 0, -torch.inf).softmax(-1)
        return (weights.unsqueeze(2) @ v).squeeze(2)

    def _keys(self, params, page, block_table, longest):
        """K of R contexts, float32 ``[R, Hkv, L, D]``; finite beyond a context."""
        used = block_table[:, : -(-longest // params.layout.block_size)].long()
        key = self._real(params, params.layout.k(page)[used])  # [R, blocks, Hkv, N, D]
        key = key.transpose(1, 2).flatten(2, 3)[:, :, :longest] * params.k_scale
        return key.nan_to_num_(0.0, 0.0, 0.0)  # blocks beyond a context hold anything

    @staticmethod
    def _real(params, x):
        return (x.view(ELEMENTS[params.fp8].values) if params.fp8 else x).float()
