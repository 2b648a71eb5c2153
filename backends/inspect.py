"""The stages of a decode step as separate operations, for studies, tests and the audit of a server."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from vllm_adamas.backends.base import Layer, Params


class Inspectable(ABC):
    """A backend whose scores and selected tokens can be inspected."""

    @abstractmethod
    def scan(
        self,
        layer: Layer,
        query: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        longest: int | None = None,
    ) -> torch.Tensor:
        """Scores of every context token from the signatures alone (paper, section 3.2).

        Args:
            query: ``[R, Hq, D]``.
            block_table: int32 ``[R, blocks]``.
            seq_lens: int32 ``[R]``, the row's own token included.
            longest: an upper bound of them. Without it a GPU backend waits for the device to find the longest.

        Returns:
            float32 ``[R, num_score_heads, L]`` with L the longest context or its bound; -inf past the end of a
            row's context.
        """

    def select(
        self,
        params: Params,
        scores: torch.Tensor,
        seq_lens: torch.Tensor,
        budgets: torch.Tensor,
        most: int | None = None,
    ) -> torch.Tensor:
        """The exact top-k tokens of each row and score head; ties go to the most recent token.

        Args:
            scores: as :meth:`scan` returns them, without NaN.
            seq_lens: int32 ``[R]``, the row's own token included.
            budgets: int32 ``[R]``, tokens to keep; a budget that reaches the context keeps all of it.
            most: an upper bound of the tokens that a row keeps, at most L. Without it a GPU backend waits for
                the device to find the most.

        Returns:
            int32 ``[R, num_score_heads, K]``, ascending, padded with -1. K is the most tokens that any
            row keeps (:meth:`Params.attended`), or its bound.
        """
        return select_tokens(params, scores, seq_lens, budgets, most)


def select_tokens(
    params: Params,
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    budgets: torch.Tensor,
    most: int | None = None,
) -> torch.Tensor:
    """:meth:`Inspectable.select` in plain PyTorch, on any device."""
    rows, _, longest = scores.shape
    position = torch.arange(longest, device=scores.device)
    lens = seq_lens.clamp(0, longest).view(-1, 1, 1)
    kept = params.attended(lens, budgets.view(-1, 1, 1))  # [R, 1, 1]
    if most is None:
        most = int(kept.max()) if rows else 0
    forced = (position < params.num_sink_tokens) | (position >= lens - params.recent_window)
    # Order: forced tokens, then the others by score, ties by recency. Past the end of a context: -inf.
    order = scores.masked_fill(forced, torch.inf).masked_fill(position >= lens, -torch.inf)
    inside = (position < lens).expand_as(scores)
    by_score = order.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    index = longest - 1 - by_score  # [R, heads, L] best first
    # Tokens of the context whose score is -inf precede positions past its end.
    inside_first = (~inside.gather(-1, index)).sort(dim=-1, stable=True).indices
    index = index.gather(-1, inside_first)[..., :most]
    rank = torch.arange(most, device=scores.device)
    index = index.masked_fill(rank >= kept, longest).sort(-1).values
    return index.masked_fill(index == longest, -1).to(torch.int32)
