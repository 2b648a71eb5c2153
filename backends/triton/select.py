"""select: the exact k best tokens of a set, by radix selection over the bits of the scores.

The bits of a score are mapped to an integer key of the same order. Candidates are the tokens whose key
reaches a pivot taken from a sample. If fewer than k tokens reach it, every token becomes a candidate, so
the pivot affects the time but not the result. Four passes over the candidates, one per byte, build
histograms of the next digit among keys that share the digits found so far, which yields the k-th best
key. A last pass writes the tokens. Lists have the length of the context, so they cannot overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_adamas.backends.triton.rows import budget_of, length_of


@triton.jit
def _keys(scores, token, inside, length, sinks, recent):
    """Unsigned integers in the order of the scores; tokens that are always kept have the largest one."""
    score = tl.load(scores + token, mask=inside, other=0)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 equals 0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where((token < sinks) | (token >= length - recent), 0x7FFFFFFF, order)
    return (order ^ -(2**31)).to(tl.uint32, bitcast=True)


@triton.jit
def _pivot(scores, length, wanted, sinks, recent, SAMPLES: tl.constexpr):
    """A key that probably at least ``wanted`` tokens reach, and few more; 0 if the context is too short.

    Its rank in the sample is four standard deviations past the expected one; 16 bits are precise enough.
    """
    token = tl.arange(0, SAMPLES) * (length // SAMPLES)
    key = _keys(scores, token, token < length, length, sinks, recent)
    expected = wanted.to(tl.float32) * SAMPLES / tl.maximum(length, 1).to(tl.float32)
    rank = (expected + 4 * tl.sqrt(expected) + 4).to(tl.int32)
    pivot = tl.full((), 0, tl.uint32)
    for i in tl.static_range(16):
        higher = pivot | (tl.full((), 1, tl.uint32) << (31 - i))
        pivot = tl.where(tl.sum((key >= higher).to(tl.int32)) >= rank, higher, pivot)
    return tl.where(length >= 2 * SAMPLES, pivot, 0)


@triton.jit
def select_kernel(
    scores,  # float32 [R, sets, L]
    tokens,  # int32 [R, sets, L]; the selected tokens come first, the rest is undefined
    score_row,
    score_set,
    token_row,
    token_set,
    seq_lens,  # int32 [R]
    budgets,  # int32 [R]
    sinks,
    recent,
    longest,
    least,
    SPARSE_ONLY: tl.constexpr,  # skip dense rows
    SAMPLES: tl.constexpr,
    TOKENS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """One program: one token set. Tokens ascend; ties go to the most recent ones."""
    row, which = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length, budget = length_of(seq_lens, row, longest), budget_of(budgets, row, least)
    if SPARSE_ONLY:
        length = tl.where(budget < length, length, 0)
    scores += row * score_row + which * score_set
    tokens += row * token_row + which * token_set

    wanted = tl.minimum(budget, length)
    pivot = _pivot(scores, length, wanted, sinks, recent, SAMPLES)
    found = tl.full((), -1, tl.int32)
    while found < wanted:
        found = tl.full((), 0, tl.int32)
        for first in range(0, length, TOKENS):
            token = first + tl.arange(0, TOKENS)
            inside = token < length
            key = _keys(scores, token, inside, length, sinks, recent)
            reached = (inside & (key >= pivot)).to(tl.int32)
            tl.store(tokens + (found + tl.cumsum(reached, 0) - 1), token, mask=reached > 0)
            found += tl.sum(reached)
        pivot = tl.full((), 0, tl.uint32)
    tl.debug_barrier()  # every thread sees every candidate

    digits = tl.arange(0, 256)
    prefix = tl.full((), 0, tl.uint32)
    equal = found  # candidates that share the prefix; `wanted` of them are taken
    for i in tl.static_range(4):
        count = tl.zeros((256,), tl.int32)
        for first in range(0, found, CANDIDATES):
            at = first + tl.arange(0, CANDIDATES)
            token = tl.load(tokens + at, mask=at < found, other=0)
            key = _keys(scores, token, at < found, length, sinks, recent) >> (24 - 8 * i)
            shared = (at < found) & ((key >> 8) == prefix)
            count += tl.histogram((key & 255).to(tl.int32), 256, mask=shared)
        # The largest digit with enough candidates at or above it; 0 if nothing is wanted.
        at_or_above = tl.cumsum(count, 0, reverse=True)
        digit = tl.maximum(tl.sum((at_or_above >= wanted).to(tl.int32)) - 1, 0)
        wanted -= tl.sum(tl.where(digits > digit, count, 0))
        equal = tl.sum(tl.where(digits == digit, count, 0))
        prefix = (prefix << 8) | digit.to(tl.uint32)

    ties_passed, written = 0, 0
    for first in range(0, found, CANDIDATES):
        at = first + tl.arange(0, CANDIDATES)
        token = tl.load(tokens + at, mask=at < found, other=0)
        key = _keys(scores, token, at < found, length, sinks, recent)
        tie = ((at < found) & (key == prefix)).to(tl.int32)
        rank = ties_passed + tl.cumsum(tie, 0)  # from 1
        better = (at < found) & (key > prefix)
        take = (better | ((tie > 0) & (rank > equal - wanted))).to(tl.int32)
        # The target is at or before the token's own place, which every thread has already read.
        tl.store(tokens + (written + tl.cumsum(take, 0) - 1), token, mask=take > 0)
        ties_passed += tl.sum(tie)
        written += tl.sum(take)
