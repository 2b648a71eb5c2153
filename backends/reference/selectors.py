"""Other ways to choose tokens, for comparison in studies: they read the keys, not the signatures.

None of them saves memory traffic as written here; they say what a choice costs in quality.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from vllm_adamas.backends.base import Backend, Through
from vllm_adamas.backends.reference.ops import FP8

Selector = Literal["oracle", "quest", "streaming_llm"]

ROWS = 16  #: rows at a time, which bounds the memory of a step
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

    def scan(self, params, query, page, block_table, context_lens):
        rows = query.shape[0]
        longest = int(context_lens.max()) if rows else 0
        key, _ = self._context(params, page, block_table, longest)
        return self._scores(params, query, key, context_lens)

    def _scores(self, params, query, key, context_lens):
        """``[R, Hq, D], [R, Hkv, L, D] -> [R, Hq, L]``, -inf beyond a context."""
        longest = key.shape[2]
        q = query.float().unflatten(1, (params.num_kv_heads, params.group))  # [R, Hkv, G, D]
        position = torch.arange(longest, device=key.device)
        beyond = (position >= context_lens.view(-1, 1))[:, None]  # [R, 1, L]
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

    def select(self, params, scores, context_lens, budgets):
        rows, _, longest = scores.shape
        most = int(torch.minimum(budgets, context_lens).max()) if rows else 0
        ties = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :most]
        chosen = longest - 1 - ties  # [R, heads, most], most recent first among equals
        kept = torch.arange(most, device=scores.device) < budgets.view(-1, 1, 1)
        kept = kept & (chosen < context_lens.view(-1, 1, 1))
        sentinel = chosen.masked_fill(~kept, longest).sort(-1).values
        return sentinel.masked_fill(sentinel == longest, -1).to(torch.int32)

    def decode(
        self,
        params,
        query,
        page,
        block_table,
        context_lens,
        budgets,
        output,
        stats,
        *,
        max_context_len=None,
    ):
        sparse = (budgets < context_lens) & (params.sliding_window == 0)
        dense = context_lens.masked_fill(sparse, 0)
        self.inner.decode(
            params,
            query,
            page,
            block_table,
            dense,
            budgets,
            output,
            stats,
            max_context_len=max_context_len,
        )
        for rows in sparse.nonzero().flatten().split(ROWS) if bool(sparse.any()) else ():
            output[rows] = self._attend(
                params, query[rows], page, block_table[rows], context_lens[rows], budgets[rows]
            ).to(output.dtype)

    def _attend(self, params, query, page, block_table, context_lens, budgets):
        """Softmax over the chosen tokens, float32 ``[R, Hq, D]``."""
        longest = int(context_lens.max())
        key, value = self._context(params, page, block_table, longest)  # [R, Hkv, L, D]
        scores = self._scores(params, query, key, context_lens)
        tokens = self.select(params, scores, context_lens, budgets).long()  # [R, Hq, K]
        unused = tokens < 0
        at = tokens.clamp_min(0).unflatten(1, (params.num_kv_heads, params.group)).flatten(2)
        at = at.unsqueeze(-1).expand(-1, -1, -1, key.shape[-1])  # [R, Hkv, G * K, D]
        k, v = (
            x.gather(2, at).unflatten(2, (params.group, -1)).flatten(1, 2) for x in (key, value)
        )  # [R, Hq, K, D]
        logits = (k @ query.float().unsqueeze(-1)).squeeze(-1) * params.softmax_scale
        weights = logits.masked_fill(unused, -torch.inf).softmax(-1)
        return (weights.unsqueeze(2) @ v).squeeze(2)

    @staticmethod
    def _context(params, page, block_table, longest):
        """K and V of R contexts, float32 ``[R, Hkv, L, D]`` each; zero beyond a context."""
        layout = params.layout
        used = block_table[:, : -(-longest // layout.block_size)].long()
        planes = []
        for plane, scale in ((layout.k(page), params.k_scale), (layout.v(page), params.v_scale)):
            found = plane[used]  # [R, blocks, Hkv, N, D]
            if params.fp8:
                found = found.view(FP8[params.fp8])
            found = found.transpose(1, 2).flatten(2, 3)[:, :, :longest].float() * scale
            planes.append(found.nan_to_num(0.0))  # blocks beyond a context hold anything
        return planes
