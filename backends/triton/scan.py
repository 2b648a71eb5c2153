"""scan: computes the score of every context token from signatures alone.

Both scores are sums over bits, which are counted 32 at a time. With the code c = 2 * hi + lo of a key,

    dot:        sum q * (2c - 3)  =  2 * sum over b of 2^b * (2 |hi & q_b| + |lo & q_b|)  -  3 sum q
    manhattan:  -sum |a - c|      =  -sum over t = 1..3 of |[a >= t] xor [c >= t]|

where q_b are the bits of the 4-bit query, the last one with weight -8, and |x| counts the bits of x.

The maximum over a KV head's query heads compares logits less their log-sum-exp, which a sample of the tiles
estimates first. Launches of its kernels do not fuse products with sums, for the reference's bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_adamas.backends.triton.rows import budget_of, length_of
from vllm_adamas.backends.triton.signature import (
    TILE,
    WORD,
    bucketize,
    hadamard,
    pack,
    signature_offset,
)

QUERY_BITS = tl.constexpr(4)
QUERY_MAX = tl.constexpr(7)
PLANES = tl.constexpr(4)  #: bit planes of an encoded query in memory; manhattan uses three
ROUND = tl.constexpr(12582912.0)  #: 1.5 * 2^23: adding it rounds to an integer

# As in the reference's signature.py.
SAMPLE_TILES = tl.constexpr(32)
SAMPLE_BITS = tl.constexpr(9)
LARGEST_FACTOR = tl.constexpr(1e25)
FRACTION_BITS = tl.constexpr(18)
FRACTION_ONE = tl.constexpr(2.0**18)
LEAST_EXPONENT = tl.constexpr(-20.0)


@triton.jit
def _quantize(q):
    """Symmetric 4-bit query, int32 [ROWS, PADDED], halves rounded to even, and its step [ROWS]."""
    top = tl.max(tl.where(q == q, tl.abs(q), float("inf")), 1)
    step = tl.div_rn(tl.where(top < float("inf"), top, 0.0), 1.0 * QUERY_MAX)
    inverse = tl.where(step > 0, tl.div_rn(1.0, tl.where(step > 0, step, 1.0)), 0.0)
    inverse = tl.where(inverse < float("inf"), inverse, 0.0)
    x = (q * inverse[:, None] + ROUND) - ROUND
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -QUERY_MAX), QUERY_MAX).to(tl.int32), step


@triton.jit
def encode_kernel(
    query,  # [R, Hq, D]
    planes,  # int32 [R, Hkv, ROWS, PLANES, S/32]: bits of the encoded queries
    bias,  # int32 [R, Hkv, ROWS]: -3 sum q
    factor,  # float32 [R, Hkv, ROWS]: from dot scores to logits in base 2
    query_row,
    query_head,
    threshold,
    logit_scale,
    DOT: tl.constexpr,
    SUMMED: tl.constexpr,  # sum the group's queries into one; ROWS is 1
    RELATIVE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    CODED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the query heads of one row and KV head."""
    ROWS: tl.constexpr = 1 if SUMMED else GROUP_PADDED
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    member, dim = tl.arange(0, GROUP_PADDED), tl.arange(0, PADDED)
    real = (member < GROUP)[:, None] & (dim < SIZE)[None, :]
    at = row * query_row + (head * GROUP + member)[:, None] * query_head + dim[None, :]
    q = tl.load(query + at, mask=real, other=0).to(tl.float32)
    q = hadamard(q, GROUP_PADDED, PADDED, BLOCK)
    if SUMMED:
        q = tl.sum(q, 0)[None, :]

    encoded, word = tl.arange(0, ROWS), tl.arange(0, PADDED // WORD)
    unit = (row * tl.num_programs(1) + head) * ROWS + encoded
    to = planes + (unit * (PLANES * CODED // WORD))[:, None] + word[None, :]
    inside = (word < CODED // WORD)[None, :]
    if DOT:
        q, step = _quantize(q)
        tl.store(factor + unit, tl.minimum(step * logit_scale, LARGEST_FACTOR))
        for b in tl.static_range(QUERY_BITS):
            tl.store(to + b * (CODED // WORD), pack((q >> b) & 1, ROWS, PADDED), mask=inside)
        tl.store(bias + unit, -3 * tl.sum(q, 1))
    else:
        a = bucketize(q, threshold, RELATIVE, CODED)
        for t in tl.static_range(3):
            at_least = (a > t).to(tl.int32)
            tl.store(to + t * (CODED // WORD), pack(at_least, ROWS, PADDED), mask=inside)


@triton.jit
def _popcount(x):
    """Counts set bits of uint32, in the form that the compiler turns into one instruction."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _scores(
    planes,
    bias,
    hi,
    lo,
    scale,
    sig_block,
    sig_head,
    scale_block,
    scale_head,
    block_table,
    unit,  # [ROWS]: the encoded queries
    head,
    token,  # [TOKENS]
    inside,
    DOT: tl.constexpr,
    N: tl.constexpr,
    CODED: tl.constexpr,
):
    """Scores of some tokens of one row with the queries of one KV head, float32 [ROWS, TOKENS]."""
    WORDS: tl.constexpr = CODED // WORD
    planes += unit * (PLANES * WORDS)
    block = tl.load(block_table + token // N, mask=inside, other=0).to(tl.int64)
    at = block * sig_block + head * sig_head + signature_offset(token % N, CODED)
    high, low = (), ()
    for w in tl.static_range(WORDS):
        high_word = tl.load(hi + at + w * TILE, mask=inside, other=0)
        low_word = tl.load(lo + at + w * TILE, mask=inside, other=0)
        high += (high_word.to(tl.uint32, bitcast=True)[None, :],)
        low += (low_word.to(tl.uint32, bitcast=True)[None, :],)
    total = tl.zeros((unit.shape[0], token.shape[0]), tl.int32)
    if DOT:
        for b in tl.static_range(QUERY_BITS):
            in_high, in_low = tl.zeros_like(total), tl.zeros_like(total)
            for w in tl.static_range(WORDS):
                q = tl.load(planes + (b * WORDS + w)).to(tl.uint32, bitcast=True)[:, None]
                in_high += _popcount(high[w] & q)
                in_low += _popcount(low[w] & q)
            part = (4 * in_high + 2 * in_low) << b
            total += part if b < QUERY_BITS - 1 else -part  # two's complement
        fit = scale + block * scale_block + head * scale_head + token % N
        fit = tl.load(fit, mask=inside, other=0).to(tl.float32)[None, :]
        score = (total + tl.load(bias + unit)[:, None]).to(tl.float32) * fit
    else:
        for w in tl.static_range(WORDS):
            for t in tl.static_range(3):
                q = tl.load(planes + (t * WORDS + w)).to(tl.uint32, bitcast=True)[:, None]
                if t == 0:
                    at_least = high[w] | low[w]
                elif t == 1:
                    at_least = high[w]
                else:
                    at_least = high[w] & low[w]
                total += _popcount(at_least ^ q)
        score = -total.to(tl.float32)
    return score


@triton.jit
def sample_kernel(
    planes,
    bias,
    factor,
    log_sum,  # float32 [R, Hkv, ROWS]: of the powers of two of the sampled logits
    hi,
    lo,
    scale,
    sig_block,
    sig_head,
    scale_block,
    scale_head,
    block_table,  # int32 [R, blocks]
    table_row,
    seq_lens,  # int32 [R]
    budgets,  # int32 [R]; dense rows are skipped; None takes all rows
    longest,
    least,
    ROWS: tl.constexpr,  # as in encode_kernel
    N: tl.constexpr,
    CODED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program: the query heads of one row and KV head. Sums are in fixed point, so their order does not matter."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = length_of(seq_lens, row, longest)
    if budgets is not None:
        length = tl.where(budget_of(budgets, row, least) < length, length, 0)
    tiles = tl.cdiv(length, TILE)
    sampled = tl.minimum(tiles, SAMPLE_TILES)
    block_table += row * table_row
    unit = (row * tl.num_programs(1) + head) * ROWS + tl.arange(0, ROWS)
    to_logit = tl.load(factor + unit)[:, None]
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.int32)
    for step in tl.static_range(2):  # the largest logit, then the sum
        for first in range(0, sampled * TILE, TOKENS):
            place = first + tl.arange(0, TOKENS)
            token = (place // TILE).to(tl.int64) * tiles // sampled * TILE + place % TILE
            inside = (place < sampled * TILE) & (token < length)
            logit = to_logit * _scores(
                planes, bias, hi, lo, scale, sig_block, sig_head, scale_block, scale_head,
                block_table, unit, head, token, inside, True, N, CODED,
            )  # fmt: skip
            if step == 0:
                top = tl.maximum(top, tl.max(tl.where(inside[None, :], logit, float("-inf")), 1))
            else:
                x = tl.maximum(logit - top[:, None], LEAST_EXPONENT)
                exponent = tl.floor(x)
                term = ((1 + (x - exponent)) * FRACTION_ONE).to(tl.int32)
                term = term >> (-exponent).to(tl.int32)
                total += tl.sum(tl.where(inside[None, :], term, 0), 1)
    bits = total.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - (FRACTION_BITS + SAMPLE_BITS + 127)).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    tl.store(log_sum + unit, top + (exponent + (mantissa - 1)))


@triton.jit
def scan_kernel(
    planes,
    bias,
    factor,
    log_sum,
    hi,
    lo,
    scale,
    sig_block,
    sig_head,
    scale_block,
    scale_head,
    block_table,  # int32 [R, blocks]
    table_row,
    seq_lens,  # int32 [R]
    budgets,  # int32 [R]; dense rows are skipped; None scans all rows
    scores,  # float32 [R, sets, L]
    score_row,
    score_set,
    longest,
    least,
    DOT: tl.constexpr,
    SHARED: tl.constexpr,  # one set per KV head
    MAXIMUM: tl.constexpr,  # of its logits, less the log-sum-exp of each query; otherwise the sum
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # as in encode_kernel
    N: tl.constexpr,
    CODED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program: a part of one row's context, for one KV head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = length_of(seq_lens, row, longest)
    chunk = tl.cdiv(tl.cdiv(length, tl.num_programs(2)), TOKENS) * TOKENS
    start = tl.program_id(2) * chunk
    end = tl.minimum(start + chunk, length)
    if budgets is not None:
        end = tl.where(budget_of(budgets, row, least) < length, end, start)

    encoded = tl.arange(0, ROWS)
    real = (encoded < GROUP)[:, None]
    unit = (row * tl.num_programs(1) + head) * ROWS + encoded
    which = tl.arange(0, 1 if SHARED else ROWS)
    sets = 1 if SHARED else GROUP
    scores += row * score_row + (head * sets + which)[:, None] * score_set
    block_table += row * table_row
    if MAXIMUM:
        to_logit, less = tl.load(factor + unit)[:, None], tl.load(log_sum + unit)[:, None]

    for first in range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        inside = token < end
        score = _scores(
            planes, bias, hi, lo, scale, sig_block, sig_head, scale_block, scale_head,
            block_table, unit, head, token, inside, DOT, N, CODED,
        )  # fmt: skip
        if MAXIMUM:
            score = tl.where(real, score * to_logit - less, float("-inf"))
            score = tl.max(score, 0)[None, :]
        elif SHARED:
            score = tl.sum(tl.where(real, score, 0), 0)[None, :]
        tl.store(scores + token[None, :], score, mask=inside[None, :] & (which < sets)[:, None])
