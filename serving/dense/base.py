"""Dense attention for requests with several query tokens and for the decode of dense layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from vllm_adamas.backends.base import Backend, DecodeBatch, Layer, Params

if TYPE_CHECKING:
    from vllm_adamas.serving.dcp import ContextShare


@dataclass
class PrefillPlan:
    """The P requests of a step that have several query tokens.

    Args:
        first_token, num_tokens: their slice of the step's tokens.
        query_start_loc: int32 ``[P + 1]``, starting at 0.
        seq_lens: int32 ``[P]``, context lengths in tokens.
        block_table: int32 ``[P, blocks]``.
        query_start_loc_cpu: int32 ``[P + 1]`` on the host, positions among all tokens of the step.
        seq_lens_cpu: int32 ``[P]`` on the host, upper bounds of ``seq_lens``.
        max_query_len, max_seq_len: upper bounds in tokens known on the host.
        prepared: what the first layer of the step computed for the others.
        context: with DCP, the earlier tokens on this rank.
    """

    first_token: int
    num_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens_cpu: torch.Tensor
    max_query_len: int
    max_seq_len: int
    prepared: Any = None
    context: SharedContext | None = None

    @property
    def tokens(self) -> slice:
        """Their slice of the step's tokens."""
        return slice(self.first_token, self.first_token + self.num_tokens)


@dataclass
class SharedContext:
    """What a rank of decode context parallelism has of the contexts of P requests, without the step's own tokens.

    Args:
        share: of the rank.
        seq_lens: int32 ``[P]``.
        seq_lens_cpu: int32 ``[P]`` on the host, upper bounds of ``seq_lens``.
        max_seq_len: an upper bound for every rank, 0 if no request has earlier tokens.
    """

    share: ContextShare
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    max_seq_len: int

    @classmethod
    def of(cls, share: ContextShare, plan: PrefillPlan) -> SharedContext:
        earlier = plan.seq_lens - plan.query_start_loc.diff()
        earlier_cpu = plan.seq_lens_cpu - plan.query_start_loc_cpu.diff()
        longest = share.most(int(earlier_cpu.max()))
        return cls(share, share.lens(earlier), share.lens(earlier_cpu), longest)


class DenseAttention(ABC):
    """Dense causal attention with vLLM's kernels."""

    def reserve(self, params: Params, dtype: torch.dtype, max_tokens: int) -> int:
        """Allocates the scratch of a layer's prefill; returns its size in bytes.

        Args:
            dtype: dtype of queries.
            max_tokens: tokens of the longest context or of the largest step, whichever is more.
        """
        return 0

    def decodes(self, params: Params) -> bool:
        """Whether :meth:`decode` supports the layer and is faster than the backend's dense rows."""
        return False

    @abstractmethod
    def prefill(
        self,
        backend: Backend,
        layer: Layer,
        plan: PrefillPlan,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Writes the plan's slice of ``output``; the step's tokens are already in the pages.

        Args:
            query, output: ``[tokens, Hq, D]`` of the whole step.
            key, value: ``[tokens, Hkv, D]``; None for layers that share another layer's cache.
        """

    def decode(
        self,
        layer: Layer,
        query: torch.Tensor,
        batch: DecodeBatch,
        query_start_loc: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Decode of R rows in a dense layer; can be captured in a CUDA graph.

        Args:
            query, output: ``[R, Hq, D]``; output is written, with zeros for rows with context 0.
            query_start_loc: int32 ``[R + 1]``, 0 to R.
        """
        raise NotImplementedError(f"{type(self).__name__} decodes nothing")


def runs_of(lens: list[int], max_tokens: int) -> list[tuple[int, int]]:
    """Splits requests into runs ``(first, last + 1)`` of at most ``max_tokens`` tokens, or of one request."""
    cuts, held = [0], 0
    for row, length in enumerate(lens):
        if held + length > max_tokens and held:
            cuts.append(row)
            held = 0
        held += length
    return list(pairwise([*cuts, len(lens)]))
