"""gather: copies K and V of several contexts, back to back."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_adamas.backends.triton.attend import dequantize
from vllm_adamas.backends.triton.rows import length_of

ROWS = tl.constexpr(1024)  #: lengths that are summed at a time


@triton.jit(do_not_specialize=["tokens", "longest"])  # they differ in every step
def gather_kernel(
    k,
    v,
    kv_block,
    kv_head,
    block_table,  # int32 [R, blocks]
    table_row,
    seq_lens,  # int32 [R]
    key,  # [T, Hkv, D]
    value,
    key_token,
    key_head,
    value_token,
    value_head,
    tokens,  # T
    longest,
    k_scale,
    v_scale,
    N: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    MANTISSA: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program: TOKENS tokens of one row and KV head."""
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    before = tl.full((), 0, tl.int64)
    for first in range(0, tl.program_id(1), ROWS):
        other = first + tl.arange(0, ROWS)
        lengths = tl.load(seq_lens + other, mask=other < row, other=0)
        before += tl.sum(tl.minimum(tl.maximum(lengths, 0), longest).to(tl.int64))
    length = tl.minimum(length_of(seq_lens, row, longest), tokens - before)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < length
    block = tl.load(block_table + row * table_row + token // N, mask=inside, other=0)
    dim = tl.arange(0, PADDED)
    whole = inside[:, None] & (dim < SIZE)[None, :]
    at = block.to(tl.int64) * kv_block + head * kv_head + token % N * SIZE
    at = at[:, None] + dim[None, :]
    one = dequantize(tl.load(k + at, mask=whole, other=0), MANTISSA)
    two = dequantize(tl.load(v + at, mask=whole, other=0), MANTISSA)
    if MANTISSA is not None:
        one, two = one.to(tl.float32) * k_scale, two.to(tl.float32) * v_scale
    to = ((before + token) * key_token + head * key_head)[:, None] + dim[None, :]
    tl.store(key + to, one.to(key.dtype.element_ty), mask=whole)
    to = ((before + token) * value_token + head * value_head)[:, None] + dim[None, :]
    tl.store(value + to, two.to(value.dtype.element_ty), mask=whole)
