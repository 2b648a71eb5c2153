"""The operations of every compute backend, and the parameters they share.

Shapes use R rows (one query token each), T tokens, Hq query heads, Hkv KV heads, G = Hq / Hkv,
D = head_size, S = dimensions of a signature (coded_size), N = block_size, L = the longest context
of the batch. Larger scores are better.
"""

from __future__ import annotations

import math
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

HOPPER = (9, 0)  #: the compute capability that has CUDA kernels of its own
MIN_CAPABILITY = (8, 0)  #: lowest that the GPU kernels and vLLM's FlashAttention support
MAX_GROUP = 16  #: most query heads per KV head that fit the fragments of GPU kernels
COUNTERS = 5  #: length of the counters that decode adds to
MOST_TOKENS = 1 << 30  #: bound of sinks and windows: kernels add two of them in 32 bits


@dataclass(frozen=True)
class Params:
    """Constants of one layer that its kernels need.

    Args:
        layout: layout of the layer's pages.
        num_query_heads, num_kv_heads: heads on this rank.
        softmax_scale: factor applied to q.k.
        coding: thresholds of the 2-bit codes.
        score: ``dot`` or ``manhattan``.
        selection: one token set per ``query_head`` or per ``kv_head``.
        combine: how the scores of a KV head's query heads become one, with one set per ``kv_head``:
            their ``sum``, or (with ``dot``) the ``max`` of the logits less each head's log-sum-exp.
            Scores know neither ``logits_soft_cap`` nor ``sinks``: neither changes the order of one head's
            tokens, and the maximum compares the heads by their uncapped logits.
        num_sink_tokens, recent_window: tokens always selected, inside the budget.
        sliding_window: tokens visible to a query (its own included), 0 = all. With a window every row
            is dense.
        fp8: ``e4m3`` or ``e5m2`` when the K and V planes hold fp8 bytes.
        k_scale, v_scale: factors from fp8 to real values.
        budget: the layer's configured budget, which launches are sized for; decode obeys the batch's budgets.
        key_mean: float32 ``[Hkv, S]`` on the device of the pages, the layer's mean key after the
            Hadamard transform, subtracted from keys before coding. It shifts all scores of a query
            equally, so the exact ranking does not change. None means zero.
        logits_soft_cap: cap of the scaled logits: x becomes cap * tanh(x / cap) before the softmax (Gemma 2).
            0 caps nothing.
        sinks: float32 ``[Hq]`` on the device of the pages, a learned logit of each query head that adds
            exp(sink) to the denominator of its softmax and has no value (gpt-oss). None means none. They
            are not among the ``num_sink_tokens``, which are tokens of the context.
    """

    layout: PageLayout
    num_query_heads: int
    num_kv_heads: int
    softmax_scale: float
    coding: Coding
    score: Literal["dot", "manhattan"] = "dot"
    selection: Literal["query_head", "kv_head"] = "query_head"
    combine: Literal["sum", "max"] = "sum"
    num_sink_tokens: int = 0
    recent_window: int = 0
    sliding_window: int = 0
    fp8: Literal["e4m3", "e5m2"] | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    budget: TokenBudget = AdamasConfig().budget
    key_mean: torch.Tensor | None = field(default=None, compare=False)
    logits_soft_cap: float = 0.0
    sinks: torch.Tensor | None = field(default=None, compare=False)

    def __post_init__(self):
        for name in ("num_sink_tokens", "recent_window", "sliding_window"):
            if not 0 <= getattr(self, name) < MOST_TOKENS:
                raise AdamasError(
                    f"{name}={getattr(self, name)} is not a number of tokens: give 0 to {MOST_TOKENS - 1}."
                )

    @classmethod
    def of(
        cls, config: AdamasConfig, layout: PageLayout, budget: TokenBudget | None = None, **kwargs
    ) -> Params:
        """Parameters of a layer under the user's configuration.

        Args:
            budget: of a layer with one of its own.
        """
        return cls(
            layout=layout,
            coding=config.coding(layout.head_size),
            score=config.score,
            selection=config.selection,
            combine=config.resolved().combine,
            num_sink_tokens=config.num_sink_tokens,
            recent_window=config.recent_window,
            budget=budget or config.budget,
            **kwargs,
        )

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def logit_scale(self) -> float:
        """Factor from q.k to logits in base 2."""
        return self.softmax_scale * math.log2(math.e)

    @cached_property
    def native(self) -> dict[str, int | float | bool]:
        """The layer's parameters for native code, apart from the tensors."""
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
            "logit_scale": self.logit_scale,
            "logits_soft_cap": float(self.logits_soft_cap),
            "dot": self.score == "dot",
            "per_query_head": self.selection == "query_head",
            "maximum": self.combine == "max",
            "num_sink_tokens": self.num_sink_tokens,
            "recent_window": self.recent_window,
            "sliding_window": self.sliding_window,
            "threshold": self.coding.threshold,
            "relative": self.coding.relative,
        }

    @property
    def least_budget(self) -> int:
        """Minimum budget in tokens: sinks and recent window are always kept, and at least one token."""
        return max(1, self.num_sink_tokens + self.recent_window)

    def attended(self, seq_lens: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
        """Tokens that rows without a sliding window attend to: int32 ``[R]``, from int32 ``[R]`` each.

        Budgets below :attr:`least_budget` are raised to it.
        """
        return torch.minimum(budgets.clamp_min(self.least_budget), seq_lens).clamp_min(0)

    @property
    def num_score_heads(self) -> int:
        """Token sets per row: Hq or Hkv."""
        return self.num_query_heads if self.selection == "query_head" else self.num_kv_heads


@dataclass(eq=False)
class DecodeBatch:
    """The decode rows of one step, one query token each; layers with one budget share it.

    A request that verifies drafted tokens has several rows, with one block table and ascending lengths.

    Args:
        block_table: int32 ``[R, blocks]``.
        seq_lens: int32 ``[R]``, tokens in the context, the query's own included.
        budgets: int32 ``[R]``, tokens that a sparse layer attends to.
        max_seq_len: an upper bound of ``seq_lens`` for every replay of a captured graph; longer rows
            are cut there. Default: the most tokens that the block table and the kernels hold.
        positions: int32 ``[R]``, a row's place among the rows of its request, which are consecutive;
            kernels that take rows of a request together need it.
        num_requests: requests that the rows belong to; default: each has one row.
        overlap: whether the tensors were complete before the preceding kernel started, so that
            decode may read them while that kernel runs.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    budgets: torch.Tensor
    max_seq_len: int | None = None
    positions: torch.Tensor | None = None
    num_requests: int | None = None
    overlap: bool = False

    @cached_property
    def rows_each(self) -> int:
        """Rows of a request on average, rounded down; 1 if the batch does not say whose its rows are."""
        if self.positions is None or not self.num_requests:
            return 1
        return len(self.seq_lens) // self.num_requests

    @cached_property
    def dense(self) -> DecodeBatch:
        """The same rows, each attending to its whole context."""
        return replace(self, budgets=self.seq_lens)


class Layer:
    """One attention layer bound to its KV cache by :meth:`Backend.bind`.

    It does not keep the KV cache alive, since a server drops the one it profiles with.

    Args:
        kv_cache: ``[num_blocks, Hkv, N, C]``.

    Raises:
        AdamasError: the tensor does not have the layout of the parameters.
    """

    def __init__(self, params: Params, kv_cache: torch.Tensor):
        params.layout.check(kv_cache)
        self.params = params
        self._kv_cache = weakref.ref(kv_cache)

    def is_bound_to(self, kv_cache: torch.Tensor) -> bool:
        """Whether the layer is bound to this tensor object."""
        return self._kv_cache() is kv_cache

    @property
    def kv_cache(self) -> torch.Tensor:
        """
        Raises:
            RuntimeError: the KV cache has been dropped.
        """
        found = self._kv_cache()
        if found is None:
            raise RuntimeError("the KV cache that the layer was bound to is gone: bind it again")
        return found


class Backend(ABC):
    """Operations over pages; all tensors are on one device.

    A backend belongs to one engine. It owns its workspace but no pages.

    Memory past the end of a context may hold anything, NaN included: the remaining slots of the
    context's last block, other blocks, and the remaining columns of its block table row.

    Lengths, slots and blocks that do not fit the tensors are errors of the caller. They are raised where
    the host sees them (``cpu``, ``reference``). GPU backends do not check them, since that would
    synchronise, but write nothing outside the tensors: lengths are clamped to 0 and to the longest that
    fits, and slots past the last block are skipped. Block numbers are not checked on a GPU.

    Budgets below :attr:`Params.least_budget` are raised to it.
    """

    name: str

    @property
    @abstractmethod
    def description(self) -> str:
        """Name of the backend and what it runs on, for the log."""

    @classmethod  # noqa: B027 (most backends have no limits)
    def check_server(
        cls,
        head_sizes: list[int],
        block_size: int | None,
        num_kv_heads: int,
        max_rows: int,
        max_seq_len: int,
        capability: tuple[int, int] | None = None,
    ) -> None:
        """Checks, without touching a device, that the kernels can serve the largest decode step.

        Args:
            head_sizes: of the model's layers.
            block_size: tokens per block, None if vLLM has not chosen yet.
            num_kv_heads: KV heads on a rank.
            max_rows, max_seq_len: rows and tokens of the longest context in the largest decode step.
            capability: compute capability of the GPU, if it is one.

        Raises:
            AdamasError: the kernels are not built, or the step exceeds their limits.
        """

    def prepare(self, kv_cache: torch.Tensor) -> None:  # noqa: B027 (an optional step)
        """Prepares the whole allocation that a KV cache is part of, before it is used.

        Contents are preserved.
        """

    def reserve(self, params: Params, max_rows: int, max_seq_len: int) -> int:
        """Allocates the workspace of the largest decode step; returns its size in bytes.

        Args:
            max_rows: rows of the step.
            max_seq_len: tokens of its longest context.
        """
        return 0

    def bind(self, params: Params, kv_cache: torch.Tensor) -> Layer:
        """Binds a layer's parameters to its KV cache, for the other operations.

        Args:
            kv_cache: ``[num_blocks, Hkv, N, C]``; the caller keeps it alive while it uses the layer.

        Raises:
            AdamasError: the kernels do not support the pages, the heads or the softmax.
        """
        return Layer(params, kv_cache)

    @abstractmethod
    def append(
        self, layer: Layer, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Writes K, V and signatures of T tokens (paper, section 3.1).

        Codes are computed from the unquantised key.

        Args:
            key, value: ``[T, Hkv, D]`` after RoPE; tokens beyond the last slot are ignored.
            slot_mapping: int64 ``[T]``, block * N + offset; negative slots are skipped.

        Raises:
            ValueError, IndexError: the host sees a slot past the last block.
        """

    @abstractmethod
    def decode(
        self,
        layer: Layer,
        query: torch.Tensor,
        batch: DecodeBatch,
        output: torch.Tensor,
        stats: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Attention of R query tokens over their selected tokens: scan, select, exact softmax.

        Rows whose budget reaches the context attend to every token. Rows with context 0 output 0. A sink
        enters the softmax of every row once.

        Args:
            query, output: ``[R, Hq, D]``; rows beyond those of the batch are ignored.
            stats: int64 ``[COUNTERS]`` that the kernel adds to: sparse rows; dense rows; context tokens and
                attended tokens, both summed over query heads; and token sets that the slow path selected
                again, because the fast one could not hold their candidates. Backends without a slow path
                leave the last one alone.
            lse: float32 ``[R, Hq]``, written: the natural logarithm of the sum of exp(logit) over the tokens
                that a row attends to, -inf with context 0. Learned sinks are not among them, so that outputs
                over parts of a context can be combined first.
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
        """Copies the K and V of R contexts from the pages, back to back.

        Args:
            block_table: int32 ``[R, blocks]``.
            seq_lens: int32 ``[R]``, tokens in each context.
            key, value: ``[sum(seq_lens), Hkv, D]``, written; fp8 is converted to real values. If they
                are too short, tokens past their end are dropped on a GPU and an error elsewhere.
        """
