"""attend: exact softmax over selected tokens or over all, split along the tokens and merged."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from vllm_adamas.backends.base import MAX_GROUP
from vllm_adamas.backends.triton.rows import budget_of, length_of

ROWS = tl.constexpr(MAX_GROUP)  #: query heads of a program, padded to a tensor core tile
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def dequantize(x, MANTISSA: tl.constexpr):
    """Converts K or V elements of a plane to a float type that represents them exactly.

    fp8 is converted with integer operations, because not every GPU has an instruction for it.

    Args:
        MANTISSA: mantissa bits of an fp8 element, None for other elements.
    """
    if MANTISSA is not None:
        bits = x.to(tl.int16)
        x = (((bits & 0x80) << 8) | ((bits & 0x7F) << (10 - MANTISSA))).to(tl.float16, bitcast=True)
        # With a shorter exponent than float16's, the bias is smaller and the largest code is NaN.
        if MANTISSA > 2:
            scale = float(1 << (16 - (1 << (6 - MANTISSA))))
            x = tl.where((bits & 0x7F) == 0x7F, float("nan"), x.to(tl.float32) * scale)
    return x


@triton.jit
def soft_cap(logit, CAP: tl.constexpr):
    """CAP * tanh(logit / CAP), with an absolute error below CAP * 4e-7."""
    small = tl.exp2(tl.abs(logit) * (-2 * LOG2_E / CAP))
    capped = CAP * (1 - small) / (1 + small)
    return tl.where(logit < 0, -capped, capped)


@triton.jit
def attend_kernel(
    query,  # [R, Hq, D]
    query_row,
    query_head,
    k,
    v,
    kv_block,
    kv_head,
    block_table,  # int32 [R, blocks]
    table_row,
    seq_lens,  # int32 [R]
    budgets,  # int32 [R]
    tokens,  # int32 [R, sets, L]
    token_row,
    token_set,
    partial,  # float32 [R, Hq, parts, PADDED]
    maximum,  # float32 [R, Hq, parts], maximum logit in units of ln 2
    total,  # float32 [R, Hq, parts]
    factor,
    longest,
    least,
    CAP: tl.constexpr,  # of the logits, in units of ln 2; 0: none
    WINDOW: tl.constexpr,  # tokens visible to a query, 0: all
    SPARSE: tl.constexpr,  # whether to attend the sparse rows or the dense ones
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    MANTISSA: tl.constexpr,
    DTYPE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program: a part of one row's tokens, for the HEADS query heads that share them."""
    row, unit = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(2)
    length, budget = length_of(seq_lens, row, longest), budget_of(budgets, row, least)
    if WINDOW > 0:
        count = tl.minimum(length, WINDOW)
    elif SPARSE:
        count = tl.where(budget < length, budget, 0)
    else:
        count = tl.where(budget < length, 0, length)
    chunk = tl.cdiv(tl.cdiv(count, parts), TOKENS) * TOKENS
    start = tl.program_id(2) * chunk
    end = tl.minimum(start + chunk, count)

    member, dim = tl.arange(0, ROWS), tl.arange(0, PADDED)
    head = unit * HEADS + member
    real = (member < HEADS)[:, None] & (dim < SIZE)[None, :]
    query += row * query_row
    q = tl.load(query + head[:, None] * query_head + dim[None, :], mask=real, other=0).to(DTYPE)
    kv = unit * HEADS // GROUP

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, PADDED), tl.float32)
    for first in range(start, end, TOKENS):
        index = first + tl.arange(0, TOKENS)
        inside = index < end
        if SPARSE:
            chosen = tokens + row * token_row + unit * token_set + index
            token = tl.load(chosen, mask=inside, other=0)
        else:
            token = length - count + index
        block = tl.load(block_table + row * table_row + token // N, mask=inside, other=0)
        first_of = block.to(tl.int64) * kv_block + kv * kv_head + token % N * SIZE
        at = first_of[:, None] + dim[None, :]
        whole = inside[:, None] & (dim < SIZE)[None, :]
        key = dequantize(tl.load(k + at, mask=whole, other=0), MANTISSA).to(DTYPE)
        value = dequantize(tl.load(v + at, mask=whole, other=0), MANTISSA).to(DTYPE)
        logit = tl.dot(q, tl.trans(key), input_precision="ieee") * factor
        if CAP > 0:
            logit = soft_cap(logit, CAP)
        logit = tl.where(inside[None, :], logit, float("-inf"))
        higher = tl.maximum(top, tl.max(logit, 1))
        p = tl.exp2(logit - higher[:, None])
        shrink = tl.exp2(top - higher)
        weight = weight * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(DTYPE), value, out * shrink[:, None], input_precision="ieee")
        top = higher

    unit = (row * (tl.num_programs(1) * HEADS) + head) * parts + tl.program_id(2)
    mine = member < tl.where(count > 0, HEADS, 0)  # other rows belong to the other launch
    tl.store(maximum + unit, top, mask=mine)
    tl.store(total + unit, weight, mask=mine)
    mine = member < tl.where(start < end, HEADS, 0)
    tl.store(partial + unit[:, None] * PADDED + dim[None, :], out, mask=mine[:, None])


@triton.jit
def merge_kernel(
    partial,
    maximum,
    total,
    output,  # [R, Hq, D]
    output_row,
    output_head,
    seq_lens,
    budgets,
    sinks,  # float32 [Hq]: logits that only add to the denominator; None: none
    stats,  # int64: sparse rows, dense rows, context tokens, attended tokens
    lse,  # float32 [R, Hq]; None: not wanted
    factor,
    longest,
    least,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One program: one row and query head."""
    row, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    length, budget = length_of(seq_lens, row, longest), budget_of(budgets, row, least)
    part, dim = tl.arange(0, PARTS), tl.arange(0, PADDED)
    unit = (row * heads + head) * PARTS + part
    top = tl.load(maximum + unit, mask=part < tl.where(length > 0, PARTS, 0), other=float("-inf"))
    used = top > float("-inf")
    best = tl.where(length > 0, tl.max(top, 0), 0.0)
    share = tl.exp2(top - best)
    weight = tl.sum(share * tl.load(total + unit, mask=used, other=0))
    if lse is not None:
        found = (best + tl.log2(tl.where(length > 0, weight, 1.0))) / LOG2_E
        tl.store(lse + row * heads + head, tl.where(length > 0, found, float("-inf")))
    if sinks is not None:
        weight += tl.exp2(
            tl.load(sinks + head) * LOG2_E - best
        )  # at most infinite, and the output 0
    at = partial + unit[:, None] * PADDED + dim[None, :]
    out = tl.sum(share[:, None] * tl.load(at, mask=used[:, None], other=0), 0)
    out *= factor / tl.where(length > 0, weight, 1.0)
    to = output + row * output_row + head * output_head + dim
    tl.store(to, out.to(output.dtype.element_ty), mask=dim < SIZE)

    if WINDOW > 0:
        budget, attended = length, tl.minimum(length, WINDOW)
    else:
        attended = tl.minimum(budget, length)
    kind = tl.where(budget < length, 0, 1)
    counter = tl.arange(0, 4)
    added = tl.where(counter == 2, length, attended).to(tl.int64) * heads
    added = tl.where(counter < 2, (counter == kind).to(tl.int64), added)
    tl.atomic_add(stats + counter, added, mask=counter < tl.where((head == 0) & (length > 0), 4, 0))
