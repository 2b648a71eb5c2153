"""combine: weights attention over one part of a context, so that the parts' sum is attention over all of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 16  #: of a token and a head each, in a program


@triton.jit(do_not_specialize=["rank", "num_tokens"])
def combine_kernel(
    output,  # [T, H, D]
    lse,  # float32 [N, T, H]
    rank,
    num_tokens,
    weighted,  # [H, T, D]
    total,  # float32 [T, H]
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows, part = num_tokens * HEADS, tl.arange(0, PARTS_PADDED)[:, None]
    live = row < rows
    lse += part.to(tl.int64) * rows + row  # [parts, ROWS]
    each = tl.load(lse, (part < PARTS) & live, other=float("-inf"))
    each = tl.where(each == float("inf"), float("-inf"), each)
    best = tl.max(each, 0)
    best = tl.where(best == float("-inf"), 0.0, best)
    whole = best + tl.log(tl.sum(tl.exp(each - best), 0))
    tl.store(total + row, whole, live)
    own = tl.max(tl.where(part == rank, each, float("-inf")), 0)
    weight = tl.where(own == float("-inf"), 0.0, tl.exp(own - whole))[:, None]
    channel = tl.arange(0, SIZE_PADDED)
    here = live[:, None] & (channel < HEAD_SIZE)
    output += row.to(tl.int64)[:, None] * HEAD_SIZE + channel
    value = tl.load(output, here, other=0.0).to(tl.float32)
    value = tl.where(weight > 0, value * weight, 0.0)
    to = (row % HEADS).to(tl.int64) * num_tokens + row // HEADS
    weighted_at = weighted + to[:, None] * HEAD_SIZE + channel
    tl.store(weighted_at, value.to(weighted.dtype.element_ty), here)


def combine(
    output: torch.Tensor, lse: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What one of N parts adds to attention over the whole contexts.

    Args:
        output: contiguous ``[T, H, D]``, attention over the part. Heads without tokens may hold anything.
        lse: contiguous float32 ``[N, T, H]`` of all parts, natural; infinite for heads without tokens.
        rank: of the part among them.

    Returns:
        contiguous ``[H, T, D]``, 0 for heads without tokens, and float32 ``[T, H]``, the log-sum-exp of the whole
        contexts, -inf if no part has tokens.
    """
    tokens, heads, size = output.shape
    weighted, total = output.new_empty(heads, tokens, size), torch.empty_like(lse[0])
    combine_kernel[triton.cdiv(tokens * heads, ROWS),](
        output,
        lse,
        rank,
        tokens,
        weighted,
        total,
        PARTS=len(lse),
        HEADS=heads,
        HEAD_SIZE=size,
        ROWS=ROWS,
        PARTS_PADDED=triton.next_power_of_2(len(lse)),
        SIZE_PADDED=triton.next_power_of_2(size),
    )
    return weighted, total
