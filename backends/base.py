"""The operations that every compute backend offers, and the parameters they share.

Shapes use R rows (one query token each), T tokens, Hq query heads, Hkv KV heads, G = Hq / Hkv,
D = head_size, N = block_size, L = the longest context of the batch. A score is better when larger.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
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
    def native(self) -> dict[str, int | float | bool]:
        """What native code is told of a layer, beside the KV cache and the mean key."""
        layout = self.layout
        return {
            "block_size": layout.block_size,
            "head_size": layout.head_size,
            "v_offset": layout.v_offset,
            "hi_offset": layout.hi_offset,
            "lo_offset": layout.lo_offset,
            "scale_offset": layout.scale_offset,
            "element": element_of(layout.dtype, self.fp8).code,
            "k_scale": float(self.k_scale if self.fp8 else 1),
            "v_scale": float(self.v_scale if self.fp8 else 1),
            "num_query_heads": self.num_query_heads,
            "num_kv_heads": self.num_kv_heads,
            "softmax_scale": self.softmax_scale,
            "dot": self.score == "dot",
            "per_query_head": self.selection == "query_head",
            "num_sink_tokens": self.num_sink_tokens,
            "recent_window": self.recent_window,
            "sliding_window": self.sliding_window,
            "threshold": self.coding.threshold,
            "relative": self.coding.relative,
        }

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


@dataclass(eq=False)
class DecodeBatch:
    """The decode rows of one step, one query token each; all layers of a kind share it.

    Args:
        block_table: int32 ``[R, blocks]``.
        seq_lens: int32 ``[R]``, tokens in the context, the query's own included.
        budgets: int32 ``[R]``, tokens that a sparse layer attends to.
        max_seq_len: an upper bound of ``seq_lens``, which holds for every replay of a captured graph; rows are
            read up to there. Default: what the block table and the kernels hold.
        overlap: the three tensors were complete before the device began the work that precedes this
            step's, so they may be read while that runs.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    budgets: torch.Tensor
    max_seq_len: int | None = None
    overlap: bool = False

    @cached_property
    def dense(self) -> DecodeBatch:
        """The same rows, each attending to its whole context."""
        return replace(self, budgets=self.seq_lens)


class Layer:
    """One attention layer as a backend sees it: parameters and pages. :meth:`Backend.bind` makes it.

    It does not keep the KV cache alive: a server drops the one that it profiles with.

    Args:
        kv_cache: ``[num_blocks, Hkv, N, C]``.

    Raises:
        AdamasError: the tensor has not the layout of the parameters.
    """

    def __init__(self, params: Params, kv_cache: torch.Tensor):
        params.layout.check(kv_cache)
        self.params = params
        self._kv_cache = weakref.ref(kv_cache)

    def is_bound_to(self, kv_cache: torch.Tensor) -> bool:
        """Whether this very tensor was bound."""
        return self._kv_cache() is kv_cache

    @property
    def kv_cache(self) -> torch.Tensor:
        """
        Raises:
            RuntimeError: it has been dropped.
        """
        found = self._kv_cache()
        if found is None:
            raise RuntimeError("the KV cache that the layer was bound to is gone: bind it again")
        return found


class Backend(ABC):
    """Operations over pages; every tensor is on one device.

    A backend belongs to one engine. It owns its workspace, and holds no page.

    Of a page, what belongs to no token of the batch may hold anything, NaN included: other blocks, and
    the slots behind a row's context in its last block. Of a block table, so may the columns behind it.

    Lengths, slots and blocks that do not fit the tensors are a caller's error. Where the host can see
    them (``cpu``, ``reference``) it is raised. On a GPU it is not, since looking would stop the device;
    what is written stays inside the tensors: a length counts as 0 if it is negative, and as the longest
    that fits if it is longer; slots behind the last block are skipped. Blocks are not checked there.

    A budget counts as sinks and recent window if it is less, and as one token if it is less than that.
    """

    name: str

    @property
    @abstractmethod
    def description(self) -> str:
        """Name and instruction set, for the log."""

    @classmethod  # noqa: B027 (most backends hold any)
    def check_server(
        cls, block_size: int | None, num_kv_heads: int, max_rows: int, max_seq_len: int
    ) -> None:
        """Whether the kernels are there and hold what a server may be asked for. No device is touched.

        Args:
            block_size: tokens, None if vLLM has not chosen yet.
            num_kv_heads: of a rank.
            max_rows, max_seq_len: of the largest decode step.

        Raises:
            AdamasError: they are not built, or do not hold it.
        """

    def prepare(self, kv_cache: torch.Tensor) -> None:  # noqa: B027 (an optional step)
        """Called with a KV cache before it is used, for the whole allocation that it is part of.

        What has been written there stays.
        """

    def reserve(self, params: Params, max_rows: int, max_seq_len: int) -> int:
        """Allocates what decode steps need beside their arguments; returns its size in bytes."""
        return 0

    def bind(self, params: Params, kv_cache: torch.Tensor) -> Layer:
        """What the other operations need of a layer, worked out once.

        Args:
            kv_cache: ``[num_blocks, Hkv, N, C]``; the caller keeps it while it uses the layer.

        Raises:
            AdamasError: the kernels do not read such pages, or serve such heads.
        """
        return Layer(params, kv_cache)

    @abstractmethod
    def append(
        self, layer: Layer, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Writes K, V and signatures of T tokens (paper, section 3.1; codes from the unquantised key).

        Args:
            key, value: ``[T, Hkv, D]`` after RoPE; more tokens than slots may follow.
            slot_mapping: int64 ``[T]``, block * N + offset; negative slots are skipped.

        Raises:
            ValueError, IndexError: the host sees a slot behind the last block.
        """

    @abstractmethod
    def decode(
        self,
        layer: Layer,
        query: torch.Tensor,
        batch: DecodeBatch,
        output: torch.Tensor,
        stats: torch.Tensor,
    ) -> None:
        """Attention of R query tokens over their selected tokens: scan, select, exact softmax.

        Rows whose budget reaches the context attend to every token. A row with context 0 gives 0.

        Args:
            query, output: ``[R, Hq, D]``; more rows than the batch has may follow, and are left alone.
            stats: int64 ``[4]`` counters that the kernel adds to: sparse rows, dense rows, context tokens
                and attended tokens, the last two summed over query heads.
        """

    @abstractmethod
    def gather(
        self,
        layer: Layer,
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
