"""The operations that every compute backend offers, and the parameters they share.

Shapes use R rows (one query token each), T tokens, Hq query heads, Hkv KV heads, G = Hq / Hkv,
D = head_size, N = block_size, L = the longest context of the batch. A score is better when larger.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from vllm_adamas.budget import TokenBudget
from vllm_adamas.config import AdamasConfig, Coding
from vllm_adamas.dtypes import element_of
from vllm_adamas.errors import AdamasError
from vllm_adamas.layout import PageLayout

HOPPER = (9, 0)  #: the compute capability that the CUDA library has code for
MIN_CAPABILITY = (8, 0)  #: of the Triton kernels, and of vLLM's FlashAttention
MAX_GROUP = 16  #: query heads per KV head that fit the fragments of GPU kernels
MOST_TOKENS = 1 << 30  #: of sinks, of windows: kernels add two of them in 32 bits


@dataclass(frozen=True)
class Params:
    """What the kernels of one layer need to know, filled once when the layer is built.

    Args:
        layout: the page.
        num_query_heads, num_kv_heads: heads of this rank.
        softmax_scale: factor on q.k.
        coding: thresholds of the 2-bit codes.
        score: ``dot`` or ``manhattan``.
        selection: one token set per ``query_head`` or per ``kv_head``.
        num_sink_tokens, recent_window: tokens always selected, inside the budget.
        sliding_window: tokens visible to a query (its own included), 0 = all. Such rows are dense.
        fp8: ``e4m3`` or ``e5m2`` when the K and V planes hold fp8 bytes.
        k_scale, v_scale: factors from fp8 to real values.
        budget: as configured: what launches are sized for, while decode obeys the budgets that it is given.
        key_mean: float32 ``[Hkv, D]`` on the device of the pages, the layer's mean key after the
            Hadamard transform; keys are coded less this mean. It moves all scores of a query alike,
            so it never changes the true ranking. None is zero.
    """

    layout: PageLayout
    num_query_heads: int
    num_kv_heads: int
    softmax_scale: float
    coding: Coding
    score: Literal["dot", "manhattan"] = "dot"
    selection: Literal["query_head", "kv_head"] = "query_head"
    num_sink_tokens: int = 0
    recent_window: int = 0
    sliding_window: int = 0
    fp8: Literal["e4m3", "e5m2"] | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    budget: TokenBudget = AdamasConfig().budget
    key_mean: torch.Tensor | None = field(default=None, compare=False)

    def __post_init__(self):
        for name in ("num_sink_tokens", "recent_window", "sliding_window"):
            if not 0 <= getattr(self, name) < MOST_TOKENS:
                raise AdamasError(
                    f"{name}={getattr(self, name)} is not a number of tokens: give 0 to {MOST_TOKENS - 1}."
                )

    @classmethod
    def of(cls, config: AdamasConfig, layout: PageLayout, **kwargs) -> Params:
        """Parameters of a layer under the user's configuration."""
        return cls(
            layout=layout,
            coding=config.coding(layout.head_size),
            score=config.score,
            selection=config.selection,
            num_sink_tokens=config.num_sink_tokens,
            recent_window=config.recent_window,
            budget=config.budget,
            **kwargs,
        )

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_query_heads // self.num_kv_heads

    @cached_property
    def numbers(self) -> tuple[int | float, ...]:
        """What native code is told of a page beside the tensor itself, which it reads in each call."""
        layout = self.layout
        return (
            layout.block_size,
            layout.head_size,
            layout.v_offset,
            layout.hi_offset,
            layout.lo_offset,
            layout.scale_offset,
            element_of(layout.dtype, self.fp8).code,
            self.k_scale if self.fp8 else 1.0,
            self.v_scale if self.fp8 else 1.0,
        )

    @property
    def least_budget(self) -> int:
        """Sinks and recent window are kept whatever a row's budget is, and one token at least."""
        return max(1, self.num_sink_tokens + self.recent_window)

    def attended(self, seq_lens: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
        """Tokens that rows attend to without a sliding window: int32 ``[R]``, from int32 ``[R]`` each.

        Budgets count as :attr:`least_budget` at least.
        """
        return torch.minimum(budgets.clamp_min(self.least_budget), seq_lens).clamp_min(0)

    @property
    def num_score_heads(self) -> int:
        """Token sets per row: Hq or Hkv."""
        return self.num_query_heads if self.selection == "query_head" else self.num_kv_heads


class Backend(ABC):
    """Operations over pages ``[num_blocks, Hkv, N, C]``; every tensor is on one device.

    A backend belongs to one engine. It owns its workspace, and holds no page beyond a call.

    Of a page, what belongs to no token of the batch may hold anything, NaN included: other blocks, and
    the slots behind a row's context in its last block. Of a block table, so may the columns behind it.

    Lengths, slots and blocks that do not fit the tensors are a caller's error. Where the host can see
    them (``cpu``, ``reference``) it is raised. On a GPU it is not, since looking would stop the device;
    what is written stays inside the tensors: a length counts as 0 if it is negative, and as the longest
    that fits if it is longer; slots behind the last block are skipped. Blocks are not checked there.

    A budget counts as sinks and recent window if it is less, and as one token if it is less than that.

    ``stats`` arguments are int64[4] counters that the kernel itself adds to: sparse rows, dense
    rows, context tokens and attended tokens, the last two summed over query heads.
    """

    name: str

    @property
    @abstractmethod
    def description(self) -> str:
        """Name and instruction set, for the log."""

    def prepare(self, cache: torch.Tensor) -> None:  # noqa: B027 (an optional step)
        """Called with a KV cache before it is used, for the whole allocation that it is part of.

        What has been written there stays.
        """

    def reserve(self, params: Params, max_rows: int, max_seq_len: int) -> int:
        """Allocates what decode steps need beside their arguments; returns its size in bytes."""
        return 0

    @abstractmethod
    def append(
        self,
        params: Params,
        key: torch.Tensor,
        value: torch.Tensor,
        page: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes K, V and signatures of T tokens (paper, section 3.1; codes from the unquantised key).

        Args:
            key, value: ``[T, Hkv, D]`` after RoPE.
            slot_mapping: int64 ``[T]``, block * N + offset; negative slots are skipped.

        Raises:
            ValueError, IndexError: the host sees a slot behind the last block.
        """

    @abstractmethod
    def scan(
        self,
        params: Params,
        query: torch.Tensor,
        page: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
    ) -> torch.Tensor:
        """Scores of every context token from the signatures alone (paper, section 3.2).

        Args:
            query: ``[R, Hq, D]``.
            block_table: int32 ``[R, blocks]``.
            seq_lens: int32 ``[R]``, the row's own token included.

        Returns:
            float32 ``[R, num_score_heads, L]``; beyond a row's context the value is -inf.
        """

    @abstractmethod
    def select(
        self,
        params: Params,
        scores: torch.Tensor,
        seq_lens: torch.Tensor,
        budgets: torch.Tensor,
    ) -> torch.Tensor:
        """The exact top-k tokens of each row and score head; ties go to the most recent token.

        Args:
            scores: as :meth:`scan` returns.
            budgets: int32 ``[R]``, tokens to keep; at or above the context everything is kept.

        Returns:
            int32 ``[R, num_score_heads, K]``, ascending, padded with -1; K is what the row that keeps
            the most keeps (:meth:`Params.attended`).
        """

    @abstractmethod
    def decode(
        self,
        params: Params,
        query: torch.Tensor,
        page: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        budgets: torch.Tensor,
        output: torch.Tensor,
        stats: torch.Tensor,
        *,
        max_seq_len: int | None = None,
        overlap: bool = False,
    ) -> None:
        """Attention of R query tokens over their selected tokens: scan, select, exact softmax.

        Rows whose budget reaches the context attend to every token. A row with context 0 gives 0.

        Args:
            query: ``[R, Hq, D]``; more rows than contexts may follow, here and in ``output``.
            budgets: int32 ``[R]``.
            output: ``[R, Hq, D]``, written.
            max_seq_len: an upper bound of ``seq_lens`` that holds for every replay of a
                captured graph, and up to which rows are read; devices that launch from the lengths
                themselves ignore it.
            overlap: ``block_table``, ``seq_lens`` and ``budgets`` were complete before the device
                began what is queued right in front of this call, so they may be read while it ends.
        """

    @abstractmethod
    def gather(
        self,
        params: Params,
        page: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        """Copies the K and V of R contexts, back to back, out of the pages.

        Args:
            key, value: ``[sum(seq_lens), Hkv, D]``, written; fp8 planes arrive as real values. What
                is beyond their end is left out on a GPU, and an error elsewhere.
        """


class Through(Backend):
    """A backend seen through something that changes or records one operation; the rest passes."""

    def __init__(self, inner: Backend):
        self.inner = inner
        self.name = inner.name

    @property
    def description(self) -> str:
        return self.inner.description

    def prepare(self, cache):
        self.inner.prepare(cache)

    def reserve(self, params, max_rows, max_seq_len):
        return self.inner.reserve(params, max_rows, max_seq_len)

    def append(self, params, key, value, page, slot_mapping):
        self.inner.append(params, key, value, page, slot_mapping)

    def scan(self, params, query, page, block_table, seq_lens):
        return self.inner.scan(params, query, page, block_table, seq_lens)

    def select(self, params, scores, seq_lens, budgets):
        return self.inner.select(params, scores, seq_lens, budgets)

    def decode(self, params, *args, **kwargs):
        self.inner.decode(params, *args, **kwargs)

    def gather(self, params, page, block_table, seq_lens, key, value):
        self.inner.gather(params, page, block_table, seq_lens, key, value)
