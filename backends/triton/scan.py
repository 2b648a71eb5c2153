"""scan: the score of every context token, from signatures alone.

Both scores are one product of matrices: each query becomes weights for two or three planes of bits,
and a bias. With code c = 2 * hi + lo of a key,

    dot:        sum q * (2c - 3)  =  4q . hi + 2q . lo - 3 sum q            times the token's scale
    manhattan:  -sum |a - c|      =  sum over t = 1..3 of (2[a >= t] - 1) . [c >= t]  -  sum a

Bits and weights are exact in float16 and the sums are integers below 2^24, so scores are exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_adamas.backends.triton.signature import (
    TILE,
    WORD,
    bucketize,
    hadamard,
    signature_offset,
    unpack,
)

SETS = tl.constexpr(16)  #: token sets of a KV head, padded to what a tensor core multiplies
QUERY_MAX = tl.constexpr(7)  #: a 4-bit query
ROUND = tl.constexpr(12582912.0)  #: 1.5 * 2^23: adding it leaves no bits for a fraction


@triton.jit
def _quantize(q):
    """Symmetric 4-bit query, integers in float32 [SETS, PADDED]; halves round to even."""
    step = tl.max(tl.abs(q), 1) / QUERY_MAX
    usable = (step > 0) & (step < float("inf"))
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, step, 1.0)), 0.0)
    inverse = tl.where(inverse < float("inf"), inverse, 0.0)
    x = (q * inverse[:, None] + ROUND) - ROUND
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -QUERY_MAX), QUERY_MAX)


@triton.jit
def _sum_of_group(x, real):
    """[SETS, PADDED]: the sum over the query heads in the first row, zeros below."""
    total = tl.sum(tl.where(real, x, 0.0), 0)[None, :]
    return tl.where((tl.arange(0, SETS) == 0)[:, None], total, 0.0)


@triton.jit
def encode_kernel(
    query,  # [R, Hq, D]
    weights,  # float16 [R, Hkv, 3, SETS, PADDED]
    bias,  # float32 [R, Hkv, SETS]
    query_row,
    query_head,
    threshold,
    DOT: tl.constexpr,
    SHARED: tl.constexpr,
    RELATIVE: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the query heads of one row and KV head."""
    row, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    member, dim = tl.arange(0, SETS), tl.arange(0, PADDED)
    real = (member < GROUP)[:, None] & (dim < SIZE)[None, :]
    at = row * query_row + (head * GROUP + member)[:, None] * query_head + dim[None, :]
    q = tl.load(query + at, mask=real, other=0).to(tl.float32)
    q = hadamard(q, SETS, PADDED, BLOCK)

    unit = row * heads + head
    to = weights + unit * (3 * SETS * PADDED) + member[:, None] * PADDED + dim[None, :]
    if DOT:
        if SHARED:
            q = _sum_of_group(q, real)
        q = _quantize(q)
        tl.store(to, (4 * q).to(tl.float16))
        tl.store(to + SETS * PADDED, (2 * q).to(tl.float16))
        offset = -3.0 * tl.sum(q, 1)
    else:
        a = bucketize(q, threshold, RELATIVE, SIZE)
        for t in tl.static_range(3):
            weight = tl.where(a > t, 1.0, -1.0)
            if SHARED:
                weight = _sum_of_group(weight, real)
            tl.store(to + t * (SETS * PADDED), weight.to(tl.float16))
        a = a.to(tl.float32)
        if SHARED:
            a = _sum_of_group(a, real)
        offset = -tl.sum(tl.where(real, a, 0.0), 1)
    tl.store(bias + unit * SETS + member, offset)


@triton.jit
def scan_kernel(
    weights,
    bias,
    hi,
    lo,
    scale,
    sig_block,
    sig_head,
    scale_block,
    scale_head,
    block_table,  # int32 [R, blocks]
    table_row,
    context_lens,  # int32 [R]
    budgets,  # int32 [R]; rows whose budget reaches the context are left out. None: all are in
    scores,  # float32 [R, sets, L]
    score_row,
    score_set,
    DOT: tl.constexpr,
    NUM_SETS: tl.constexpr,
    N: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program: a part of one row's context, for one KV head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(context_lens + row)
    chunk = tl.cdiv(tl.cdiv(length, tl.num_programs(2)), TOKENS) * TOKENS
    start = tl.program_id(2) * chunk
    end = tl.minimum(start + chunk, length)
    if budgets is not None:
        end = tl.where(tl.load(budgets + row) < length, end, start)

    member, dim, word = tl.arange(0, SETS), tl.arange(0, PADDED), tl.arange(0, PADDED // WORD)
    unit = row * tl.num_programs(1) + head
    weights += unit * (3 * SETS * PADDED) + member[:, None] * PADDED + dim[None, :]
    weight0, weight1 = tl.load(weights), tl.load(weights + SETS * PADDED)
    if not DOT:
        weight2 = tl.load(weights + 2 * SETS * PADDED)
    offset = tl.load(bias + unit * SETS + member)[:, None]
    to = scores + row * score_row + (head * NUM_SETS + member)[:, None] * score_set

    for first in range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        inside = token < end
        block = tl.load(block_table + row * table_row + token // N, mask=inside, other=0)
        block = block.to(tl.int64)
        first_of = block * sig_block + head * sig_head + signature_offset(token % N, SIZE)
        at = first_of[None, :] + (word * TILE)[:, None]
        whole = inside[None, :] & (word < SIZE // WORD)[:, None]
        high = tl.load(hi + at, mask=whole, other=0)
        low = tl.load(lo + at, mask=whole, other=0)
        if DOT:
            total = tl.dot(weight0, unpack(high, PADDED, TOKENS))
            total = tl.dot(weight1, unpack(low, PADDED, TOKENS), total)
            fit = scale + block * scale_block + head * scale_head + token % N
            score = (total + offset) * tl.load(fit, mask=inside, other=0)[None, :]
        else:
            total = tl.dot(weight0, unpack(high | low, PADDED, TOKENS))
            total = tl.dot(weight1, unpack(high, PADDED, TOKENS), total)
            total = tl.dot(weight2, unpack(high & low, PADDED, TOKENS), total)
            score = total + offset
        tl.store(to + token[None, :], score, mask=inside[None, :] & (member < NUM_SETS)[:, None])
