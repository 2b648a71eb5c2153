"""select: the exact k best tokens of a set, by radix selection over the bits of the scores.

A float's bits become an integer of the same order. Four passes, one per byte, count the digits of
the scores that share the digits found so far, and so find the k-th best score; a fifth writes the
tokens. Nothing is buffered, so no distribution of scores can overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _keys(scores, token, length, sinks, recent):
    """Unsigned integers in the order of the scores; tokens that are always kept have the largest."""
    score = tl.load(scores + token, mask=token < length, other=0)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # both zeros are one score
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where((token < sinks) | (token >= length - recent), 0x7FFFFFFF, order)
    return (order ^ -(2**31)).to(tl.uint32, bitcast=True)


@triton.jit
def select_kernel(
    scores,  # float32 [R, sets, L]
    tokens,  # int32 [R, sets, k]; may be the memory of scores: token i is written at or before i
    score_row,
    score_set,
    token_row,
    token_set,
    context_lens,  # int32 [R]
    budgets,  # int32 [R]
    sinks,
    recent,
    SPARSE_ONLY: tl.constexpr,  # leave rows out whose budget reaches the context
    TOKENS: tl.constexpr,
):
    """One program: one token set. Ascending tokens; of equal scores the most recent ones."""
    row, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length, budget = tl.load(context_lens + row), tl.load(budgets + row)
    if SPARSE_ONLY:
        length = tl.where(budget < length, length, 0)
    scores += row * score_row + which * score_set
    tokens += row * token_row + which * token_set

    digits = tl.arange(0, 256)
    wanted = tl.minimum(budget, length)  # of the tokens that share the prefix
    prefix = tl.full((), 0, tl.uint32)
    equal = length  # tokens that share the prefix
    for i in tl.static_range(4):
        count = tl.zeros((256,), tl.int32)
        for first in range(0, length, TOKENS):
            token = first + tl.arange(0, TOKENS)
            key = _keys(scores, token, length, sinks, recent) >> (24 - 8 * i)
            shared = (token < length) & ((key >> 8) == prefix)
            count += tl.histogram((key & 255).to(tl.int32), 256, mask=shared)
        # The largest digit with enough tokens at or above it; at least one where nothing is wanted.
        at_or_above = tl.cumsum(count, 0, reverse=True)
        digit = tl.maximum(tl.sum((at_or_above >= wanted).to(tl.int32)) - 1, 0)
        wanted -= tl.sum(tl.where(digits > digit, count, 0))
        equal = tl.sum(tl.where(digits == digit, count, 0))
        prefix = (prefix << 8) | digit.to(tl.uint32)

    ties_passed, written = 0, 0
    for first in range(0, length, TOKENS):
        token = first + tl.arange(0, TOKENS)
        key = _keys(scores, token, length, sinks, recent)
        tie = ((token < length) & (key == prefix)).to(tl.int32)
        rank = ties_passed + tl.cumsum(tie, 0)  # from 1
        take = (token < length) & ((key > prefix) | ((tie > 0) & (rank > equal - wanted)))
        place = written + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(tokens + place, token, mask=take)
        ties_passed += tl.sum(tie)
        written += tl.sum(take.to(tl.int32))
