"""How a decode step is launched, and which steps are refused.

The library provides the limits of the kernels. Every other threshold is defined here and passed to the
kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vllm_adamas.backends.cuda.library import FOR_HOPPER, limits, load
from vllm_adamas.backends.launch import LEAST_CONTEXT, rounded_context
from vllm_adamas.errors import AdamasError

HEAD_SIZES = (64, 96, 128, 192, 256)  #: as in csrc/sm90/layer.cu
LEAST_CANDIDATES, MOST_CANDIDATES = 4096, 32768  #: per token set
WARPS = (16, 8)  #: of a block of the fused kernel; a multiprocessor runs one of 16 or two of 8
CLUSTERS = (16, *range(8, 0, -1))  #: blocks; 9 to 15 exchange more than they gain over 8
#: Tokens of a budget per warp of a block; pivots are loose for more (post_pivot of csrc/sm90/decode_fused/list.cuh), unless
#: the sample of combine=max suggests the first one.
MOST_PER_WARP = 64
#: Tokens of a launch for the fused kernel: without combine=max, where the three kernels are faster in longer contexts of real
#: keys; and with it in clusters of so many blocks, those of single rows, which leave half of the GPU idle.
MOST_SUMMED, MOST_ALONE, BLOCKS_ALONE = 1 << 17, 1 << 19, 8
#: Tokens of a launch that scans the rows of a request together although the fused kernel takes the step.
LEAST_SHARED = 1 << 15


class Form(NamedTuple):
    """How a decode step runs: in the fused kernel, or in three kernels (:data:`THREE`).

    Args:
        cluster: blocks per (row, KV head).
        warps: of a block, one of ``WARPS``.
    """

    cluster: int
    warps: int

    def __str__(self) -> str:
        return f"{self.cluster}x{self.warps}" if self.cluster else "three"


THREE = Form(0, 0)


@dataclass(frozen=True)
class LaunchPlan:
    """The launch of a decode step.

    Args:
        form: one kernel or three.
        shared: whether scan takes the rows of a request together.
        sample_bits: log2 of the tokens of a context that encode samples.
        capacity: candidates per token set.
        workspace_bytes: size of the workspace.
    """

    form: Form
    shared: bool
    sample_bits: int
    capacity: int
    workspace_bytes: int


def rounded_contexts(max_seq_len: int) -> Iterator[int]:
    """Every value of :func:`rounded_context` up to that of ``max_seq_len``, ascending."""
    tokens, last = LEAST_CONTEXT, rounded_context(max_seq_len)
    while tokens <= last:
        yield tokens
        tokens = rounded_context(tokens + 1)


def prefers_fused(form: Form, max_seq_len: int, budget: int, *, maximum: bool) -> bool:
    """Whether the fused kernel in ``form`` beats the three kernels. Only Hopper has it.

    Args:
        max_seq_len: longest context of the launch, in tokens.
        budget: tokens per set.
        maximum: whether scores are maxima over query heads.
    """
    if form == THREE:
        return False
    most_wanted, longest = limits().most_wanted, limits().max_context
    if not maximum:
        most_wanted, longest = min(most_wanted, MOST_PER_WARP * form.warps), MOST_SUMMED
    elif form.cluster >= BLOCKS_ALONE:
        longest = MOST_ALONE
    return max_seq_len <= longest and budget <= most_wanted


def prefers_shared(form: Form, max_seq_len: int, rows_each: int) -> bool:
    """Whether a scan that takes the rows of a request together is faster than one for each row, in whichever form.

    Args:
        form: of the fused kernel, or ``THREE`` if it does not take the step.
        max_seq_len: longest context of the launch, in tokens.
        rows_each: rows of a request, as in :class:`~vllm_adamas.backends.base.DecodeBatch`.
    """
    if form == THREE:
        return rows_each >= 2
    full = form == Form(1, min(WARPS))  # every multiprocessor has a row and KV head or two
    return full and max_seq_len >= LEAST_SHARED and rows_each >= 3


def fused_form(groups: int, clusters_at_once: Callable[[Form], int]) -> Form:
    """The form of the fused kernel that runs in one wave; ``THREE`` if none does.

    Blocks of 16 warps come first: they exchange less than twice as many blocks of 8.

    Args:
        groups: rows * KV heads.
        clusters_at_once: maps a form to the clusters that the device runs at once.
    """
    forms = (Form(cluster, warps) for warps in WARPS for cluster in CLUSTERS)
    return next((form for form in forms if clusters_at_once(form) >= groups), THREE)


def candidate_capacity(
    max_seq_len: int, budget: int, most_sample_bits: int, library: str = FOR_HOPPER
) -> int:
    """Candidates that a token set may keep before its scores are computed again.

    The pivot ranks between `rank` and 1.5 `rank` in the sample (sample_rank and find_pivot of
    csrc/sm90), so about 1.5 `rank` times the stride tokens reach it, for the highest `rank` that encode
    may aim at. The capacity adds six standard deviations. It never decreases with the context, so a
    workspace for the longest context serves every step.
    """
    wanted, native = LEAST_CANDIDATES, load(library)
    for tokens in rounded_contexts(max_seq_len):
        sample = 1 << native.sample_bits(tokens, most_sample_bits)
        rank = native.most_sample_rank(budget, sample, tokens)
        most = rank + rank // 2
        wanted = max(wanted, int(tokens / sample * (most + 6 * math.sqrt(1.5 * most))))
    return min(MOST_CANDIDATES, -(-wanted // 1024) * 1024)


def check_context(tokens: int, library: str = FOR_HOPPER) -> None:
    """
    Raises:
        AdamasError: the context exceeds the limit of the kernels, or the library is not built.
    """
    most = limits(library).max_context
    if tokens > most:
        raise AdamasError(
            f"contexts of {tokens} tokens are longer than the {most} that the CUDA kernels hold: "
            f"pass --max-model-len {most}, or choose kernels=triton."
        )


def check_head_size(size: int) -> None:
    """
    Raises:
        AdamasError: the library has no kernels for it.
    """
    if size not in HEAD_SIZES:
        raise AdamasError(
            f"head_size {size} has no CUDA kernels, which exist for {', '.join(map(str, HEAD_SIZES))}: choose "
            "kernels=triton."
        )


def check_block(tokens: int, library: str = FOR_HOPPER) -> None:
    """
    Raises:
        AdamasError: the block exceeds the limit of the kernels, or the library is not built.
    """
    most = limits(library).max_block
    if tokens > most:
        raise AdamasError(
            f"blocks of {tokens} tokens are larger than the {most} that the CUDA kernels divide by: "
            f"pass a --block-size of at most {most}, or choose kernels=triton."
        )


def check_step(rows: int, kv_heads: int, max_seq_len: int, library: str = FOR_HOPPER) -> None:
    """
    Raises:
        AdamasError: the decode step exceeds a limit of the kernels, or the library is not built.
    """
    most = limits(library)
    if rows > most.max_rows:
        raise AdamasError(
            f"decode steps of {rows} rows are larger than the {most.max_rows} that the CUDA kernels hold: "
            f"pass --max-num-seqs {most.max_rows}, or choose kernels=triton."
        )
    check_context(max_seq_len, library)
    if rows * kv_heads * max_seq_len > most.max_step:
        raise AdamasError(
            f"{rows} rows of {max_seq_len} tokens and {kv_heads} KV heads are more than the "
            f"{most.max_step} tokens that the CUDA kernels count in a decode step: pass a smaller "
            "--max-num-seqs or --max-model-len, or choose kernels=triton."
        )
