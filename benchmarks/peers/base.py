"""A peer: a third-party dense decode kernel, called over the same K and V as ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

Call = Callable[[], object]


def widened(tables: list[torch.Tensor], columns: int) -> list[torch.Tensor]:
    """Block tables with more columns, which point at block 0."""
    return [torch.nn.functional.pad(table, (0, columns - table.shape[1])) for table in tables]


@dataclass(frozen=True)
class Cell:
    """Decode steps of one shape over one dense cache; each call has its own query and block table.

    Args:
        key, value: ``[tokens, Hkv, D]``, contiguous.
        block_tables: maps a block size to one int32 ``[rows, length / block size]`` per call.
        num_query_heads: Hq.
        length: tokens of every row's context.
        rows: number of rows.
        launch: tokens of the longest context that a captured graph would have to replay with.
        positions: query tokens of a row, the last tokens of its context.
    """

    key: torch.Tensor
    value: torch.Tensor
    block_tables: Callable[[int], list[torch.Tensor]]
    num_query_heads: int
    length: int
    rows: int
    launch: int
    positions: int = 1

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
        """Views of key and value as ``[blocks, block size, Hkv, D]``."""
        key, value = (x.view(-1, block_size, *x.shape[1:]) for x in (self.key, self.value))
        return key, value

    def queries(self, calls: int) -> list[torch.Tensor]:
        """One random ``[rows * positions, Hq, D]`` per call."""
        shape = (self.rows * self.positions, self.num_query_heads, self.head_size)
        device, dtype = self.key.device, self.key.dtype
        return [torch.randn(shape, device=device).to(dtype) for _ in range(calls)]

    def seq_lens(self) -> torch.Tensor:
        """Context lengths, int32 ``[rows]``."""
        return torch.full((self.rows,), self.length, dtype=torch.int32, device=self.key.device)

    def launch_tables(self, block_size: int) -> list[torch.Tensor]:
        """The block tables with the columns of the longest context."""
        return widened(self.block_tables(block_size), self.launch // block_size)

    def varlen_arguments(self, block_size: int) -> dict[str, Any]:
        """Arguments of FlashAttention's varlen interface except query, block table and output."""
        key, value = self.pages(block_size)
        return {
            "k": key,
            "v": value,
            "cu_seqlens_q": self.positions
            * torch.arange(self.rows + 1, dtype=torch.int32, device=key.device),
            "max_seqlen_q": self.positions,
            "seqused_k": self.seq_lens(),
            "max_seqlen_k": self.launch,
            "softmax_scale": self.softmax_scale,
            "causal": True,
        }


@dataclass(frozen=True)
class Peer:
    """A third-party dense decode kernel.

    Args:
        name: key in records.
        title: name in text.
        heading: name in the heading of a table column.
        module: module that must be importable.
        distribution: distribution whose version is recorded.
        prepare: returns the ways to call the kernel for a cell, by name. Each is a function that creates
            the calls, one per block table, only when it is called, because they may need much memory.
    """

    name: str
    title: str
    heading: str
    module: str
    distribution: str
    prepare: Callable[[Cell], dict[str, Callable[[], list[Call]]]]

    def available(self) -> bool:
        """Whether the kernel is installed; it may still refuse to run."""
        return find_spec(self.module) is not None
