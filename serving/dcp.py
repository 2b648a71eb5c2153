"""Decode context parallelism (DCP): ranks that share a KV head keep a share of every context each.

Of N ranks, rank r keeps the tokens whose position p has ``p // interleave % N == r``. The tokens of a rank keep
their order, so that its share of a context's first n tokens comes first in its pages.

Every rank decodes the query heads of all ranks over its own share, with the whole token budget, and the softmaxes
are combined exactly. A token among the best of the whole context is among the best of its share, because a share has
no token more that is better, and the sinks and the recent window of a share hold those of the context. The tokens
that a row attends to are therefore at least those that it attends to without DCP, and at most N times the budget.
With ``combine`` = ``max`` each rank estimates the log-sum-exp of its own share, so scores differ from those of the
whole context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_adamas.errors import AdamasError
from vllm_adamas.serving import compat


def longest_share(seq_len: int, size: int, interleave: int) -> int:
    """The most tokens that one of ``size`` ranks has of a context of at most ``seq_len`` tokens."""
    return -(-seq_len // (size * interleave)) * interleave


@dataclass(frozen=True)
class ContextShare:
    """The share of a rank, and what it exchanges with the others.

    Args:
        size, rank: number of ranks, N, and this one's.
        interleave: consecutive tokens on a rank.
        group: vLLM's group of the ranks.
    """

    size: int
    rank: int
    interleave: int
    group: Any

    @classmethod
    def of(cls, vllm_config) -> ContextShare | None:
        """The share of this process; None without DCP.

        Raises:
            AdamasError: the ranks cannot exchange what they attend to.
        """
        found = compat.context_group(vllm_config)
        if found is None:
            return None
        group, interleave = found
        if not compat.has_nccl(group):
            raise AdamasError(
                "the adamas backend does not support DCP without NCCL, which vLLM has not loaded: set "
                "VLLM_NCCL_SO_PATH to a libnccl.so.2 and unset VLLM_DISABLE_PYNCCL, or drop "
                "--decode-context-parallel-size."
            )
        return cls(group.world_size, group.rank_in_group, interleave, group)

    def lens(self, seq_lens: torch.Tensor) -> torch.Tensor:
        """Tokens on this rank of contexts of int32 ``[...]`` tokens, without a host sync."""
        turn = self.size * self.interleave
        rest = (seq_lens % turn - self.rank * self.interleave).clamp_(0, self.interleave)
        return rest.add_(seq_lens // turn, alpha=self.interleave)

    def most(self, seq_len: int) -> int:
        """:func:`longest_share` of these ranks."""
        return longest_share(seq_len, self.size, self.interleave)

    def gather(self, query: torch.Tensor) -> torch.Tensor:
        """The queries of all ranks: from ``[T, Hq, D]`` contiguous ``[T, N * Hq, D]``."""
        return self.group.all_gather(query.contiguous(), dim=1).contiguous()

    def combine(self, output: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the whole contexts for this rank's heads, from every rank's over its share.

        Args:
            output: contiguous ``[T, N * Hq, D]``. Heads without tokens may hold anything.
            lse: contiguous float32 ``[T, N * Hq]``, natural; infinite for heads without tokens.

        Returns:
            ``[T, Hq, D]``, 0 where no rank has tokens, and float32 ``[T, Hq]``, -inf there.
        """
        from vllm_adamas.backends.triton.combine import combine

        everyone = self.group.all_gather(lse, dim=0).view(self.size, *lse.shape)
        weighted, total = combine(output, everyone, self.rank)
        found = self.group.reduce_scatter(weighted, dim=0)  # head-major: needs no copy
        own = slice(self.rank * len(found), (self.rank + 1) * len(found))
        return found.transpose(0, 1), total[:, own]
