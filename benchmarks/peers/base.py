"""What a peer is: a dense decode kernel of others, called over the same K and V as ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Cell:
    """Decode steps of one shape over one dense cache; each call has a query and a block table of its own.

    Args:
        key, value: ``[tokens, Hkv, D]``, contiguous.
        block_tables: from a block size to int32 ``[rows, length / block size]`` for each call.
        num_query_heads: Hq.
        length: tokens of every row's context.
        rows: one query token each.
    """

    key: torch.Tensor
    value: torch.Tensor
    block_tables: Callable[[int], list[torch.Tensor]]
    num_query_heads: int
    length: int
    rows: int

    @property
    def num_kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def head_size(self) -> int:
        return self.key.shape[2]

    @property
    def softmax_scale(self) -> float:
        return self.head_size**-0.5

    def pages(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of key and value, ``[blocks, block size, Hkv, D]``."""
        key, value = (x.view(-1, block_size, *x.shape[1:]) for x in (self.key, self.value))
        return key, value

    def queries(self, calls: int) -> list[torch.Tensor]:
        """One random ``[rows, Hq, D]`` for each call."""
        shape = (self.rows, self.num_query_heads, self.head_size)
        device, dtype = self.key.device, self.key.dtype
        return [torch.randn(shape, device=device).to(dtype) for _ in range(calls)]

    def seq_lens(self) -> torch.Tensor:
        """int32 ``[rows]``."""
        return torch.full((self.rows,), self.length, dtype=torch.int32, device=self.key.device)

    def varlen_arguments(self, block_size: int) -> dict[str, Any]:
        """What functions of FlashAttention's varlen interface are told, beside query, table and output."""
        key, value = self.pages(block_size)
        return {
            "k": key,
            "v": value,
            "cu_seqlens_q": torch.arange(self.rows + 1, dtype=torch.int32, device=key.device),
            "max_seqlen_q": 1,
            "seqused_k": self.seq_lens(),
            "max_seqlen_k": self.length,
            "softmax_scale": self.softmax_scale,
            "causal": True,
        }


@dataclass(frozen=True)
class Peer:
    """A dense decode kernel of others.

    Args:
        name: its key in records.
        title: what people call it.
        heading: as the title, for the column of a table.
        module: what has to be importable.
        distribution: whose version a record names.
        prepare: from a cell to the ways in which the kernel can be called for it, by name. Each makes
            the calls, one per block table, when it is called itself: what they need may be large.
    """

    name: str
    title: str
    heading: str
    module: str
    distribution: str
    prepare: Callable[[Cell], dict[str, Callable[[], list[Call]]]]

    def available(self) -> bool:
        """Whether it is installed; it may still refuse to run here."""
        return find_spec(self.module) is not None
