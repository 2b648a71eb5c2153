"""Device functions shared by append and scan: the Hadamard transform and the 2-bit codes."""

from __future__ import annotations

import triton
import triton.language as tl

WORD = tl.constexpr(32)  #: dimensions per signature word
TILE = tl.constexpr(16)  #: tokens per signature tile


@triton.jit
def hadamard(x, ROWS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Orthonormal Hadamard transform of float32 [ROWS, PADDED] in blocks of BLOCK dimensions.

    The order of additions is the reference's, so the result is bit-identical.
    """
    x = tl.reshape(x, (ROWS * PADDED // BLOCK, BLOCK))
    for i in tl.static_range(9):
        if (2 << i) <= BLOCK:
            pairs = tl.reshape(x, (ROWS * PADDED // BLOCK, BLOCK // (2 << i), 2, 1 << i))
            a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            pairs = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))
            x = tl.reshape(pairs, (ROWS * PADDED // BLOCK, BLOCK))
    return tl.reshape(x * BLOCK**-0.5, (ROWS, PADDED))


@triton.jit
def bucketize(x, threshold, RELATIVE: tl.constexpr, CODED: tl.constexpr):
    """Codes 0..3, int32 [ROWS, PADDED], of a transformed vector with CODED dimensions; NaN gives 0."""
    t = threshold
    if RELATIVE:
        t = threshold * tl.sqrt(tl.sum(x * x, 1) / CODED)[:, None]
    return (x >= -t).to(tl.int32) + (x >= 0).to(tl.int32) + (x >= t).to(tl.int32)


@triton.jit
def pack(bits, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Packs bits, int32 [ROWS, PADDED], into words [ROWS, PADDED/32]."""
    bits = tl.reshape(bits, (ROWS, PADDED // WORD, WORD))
    return tl.sum(bits << tl.arange(0, WORD)[None, None, :], 2)


@triton.jit
def signature_offset(offset, CODED: tl.constexpr):
    """Offset of a token's first word in a block's signature plane; its words are TILE apart."""
    return offset // TILE * (CODED // WORD * TILE) + offset % TILE
