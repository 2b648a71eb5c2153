"""append: writes K, V and the signature of each token in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_adamas.backends.triton.signature import (
    TILE,
    WORD,
    bucketize,
    hadamard,
    pack,
    signature_offset,
)

FP16_MAX = tl.constexpr(65504.0)


@triton.jit(do_not_specialize=["tokens"])  # it differs in every step
def append_kernel(
    key,  # [T, Hkv, D] with the strides key_*
    mean,  # float32 [Hkv, S] or None
    stored_key,  # elements of the planes, [T, Hkv, D] with the strides stored_*
    stored_value,
    slots,  # int64 [T]
    tokens,
    all_slots,  # slots in the cache; later ones are skipped, like negative ones
    key_token,
    key_head,
    stored_key_token,
    stored_key_head,
    stored_value_token,
    stored_value_head,
    k,
    v,
    hi,
    lo,
    scale,
    kv_block,
    kv_head,
    sig_block,
    sig_head,
    scale_block,
    scale_head,
    threshold,
    RELATIVE: tl.constexpr,
    N: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    CODED: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program: TOKENS tokens of one KV head."""
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + token, mask=token < tokens, other=-1)
    kept = (slot >= 0) & (slot < all_slots)
    block, offset = slot // N, (slot % N).to(tl.int32)
    token = token.to(tl.int64)
    dim = tl.arange(0, PADDED)
    inside = kept[:, None] & (dim < SIZE)[None, :]

    to = (block * kv_block + head * kv_head + offset * SIZE)[:, None] + dim[None, :]
    at = (token * stored_key_token + head * stored_key_head)[:, None] + dim[None, :]
    tl.store(k + to, tl.load(stored_key + at, mask=inside), mask=inside)
    at = (token * stored_value_token + head * stored_value_head)[:, None] + dim[None, :]
    tl.store(v + to, tl.load(stored_value + at, mask=inside), mask=inside)

    at = (token * key_token + head * key_head)[:, None] + dim[None, :]
    x = hadamard(tl.load(key + at, mask=inside, other=0).to(tl.float32), TOKENS, PADDED, BLOCK)
    if mean is not None:
        x -= tl.load(mean + head * CODED + dim, mask=dim < CODED, other=0)[None, :]
    code = bucketize(x, threshold, RELATIVE, CODED)

    word = tl.arange(0, PADDED // WORD)
    to = block * sig_block + head * sig_head + signature_offset(offset, CODED)
    to = to[:, None] + (word * TILE)[None, :]
    whole = kept[:, None] & (word < CODED // WORD)[None, :]
    tl.store(hi + to, pack(code >> 1, TOKENS, PADDED), mask=whole)
    tl.store(lo + to, pack(code & 1, TOKENS, PADDED), mask=whole)

    # The least-squares factor from the levels {-3, -1, 1, 3} to x.
    level = tl.where((dim < CODED)[None, :], 2.0 * code.to(tl.float32) - 3.0, 0.0)
    fit = tl.sum(x * level, 1) / tl.sum(level * level, 1)
    fit = tl.minimum(tl.maximum(tl.where(fit == fit, fit, 0.0), -FP16_MAX), FP16_MAX)
    to = block * scale_block + head * scale_head + offset
    tl.store(scale + to, fit.to(tl.float16), mask=kept)
