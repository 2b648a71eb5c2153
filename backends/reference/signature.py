"""The 2-bit signature of a key, and the two scores computed from signatures.

Paper: arXiv 2510.18413, section 3.1 (Hadamard transform, bucketize) and section 3.2 (Manhattan
distance). Codes are 0..3; D is head_size, and S the dimensions that are coded.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from vllm_adamas.config import Coding
from vllm_adamas.layout import TILE, WORD, coded_size

QUERY_BITS = 4  #: bits of a query element in the dot score
QUERY_MAX = 2 ** (QUERY_BITS - 1) - 1
FP16_MAX = 65504.0
SAMPLE_TILES = 32  #: tiles of a context that a head's log-sum-exp is estimated from
SAMPLE_BITS = 9  #: log2 of their tokens
LARGEST_FACTOR = 1e25  #: of logits, which stay finite: a dot score is below 4e8
FRACTION_BITS = 18  #: of a power of two in fixed point; SAMPLE_TILES * TILE of them fit 32 bits
LEAST_EXPONENT = -20  #: of a term of the sum of powers of two; smaller ones are 0 in fixed point


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal Hadamard transform of the last dimension, ``[..., D] -> [..., S]`` float32.

    It is block-diagonal; the block size is the largest power of two that divides S, so D = 96 has three
    blocks of 32. Zeros make S of D, so D = 80 has one block of 128.
    """
    size = coded_size(x.shape[-1])
    block = size & -size
    y = pad(x.float(), (0, size - x.shape[-1]))
    y = y.unflatten(-1, (size // block, block))  # [..., S/block, block]
    step = 1
    while step < block:
        y = y.unflatten(-1, (block // (2 * step), 2, step))  # [..., pairs, 2, step]
        a, b = y.unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)  # [..., block]
        step *= 2
    return (y * block**-0.5).flatten(-2)


def thresholds(x: torch.Tensor, coding: Coding) -> torch.Tensor:
    """Outer threshold of each transformed vector: ``[..., S] -> [..., 1]``."""
    if not coding.relative:
        return torch.full_like(x[..., :1], coding.threshold)
    return coding.threshold * x.square().mean(-1, keepdim=True).sqrt()


def bucketize(x: torch.Tensor, coding: Coding) -> torch.Tensor:
    """Codes 0..3 of a transformed vector: uint8 ``[..., S]``. NaN gives code 0."""
    t = thresholds(x, coding)  # [..., 1]
    return (x >= -t).to(torch.uint8) + (x >= 0).to(torch.uint8) + (x >= t).to(torch.uint8)


def code_scale(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Least-squares factor from levels {-3,-1,1,3} to ``x``: fp16 ``[...]``, clamped to finite values."""
    levels = 2.0 * codes.float() - 3.0  # [..., S]
    scale = (x * levels).sum(-1) / levels.square().sum(-1)  # [...]
    return scale.nan_to_num(0.0).clamp(-FP16_MAX, FP16_MAX).to(torch.float16)


def pack(bits: torch.Tensor) -> torch.Tensor:
    """Packs bits ``[..., S]`` into int32 words ``[..., S/32]``; bit i of word w is dimension 32*w + i."""
    shifts = torch.arange(WORD, dtype=torch.int64, device=bits.device)
    words = (bits.to(torch.int64).unflatten(-1, (-1, WORD)) << shifts).sum(-1)  # [..., S/32]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Unpacks int32 words ``[..., S/32]`` into bits, uint8 ``[..., S]``."""
    shifts = torch.arange(WORD, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 1).flatten(-2).to(torch.uint8)


def untile(plane: torch.Tensor) -> torch.Tensor:
    """Reorders a signature plane ``[..., N/16, S/32, 16]`` to words per token ``[..., N, S/32]``."""
    return plane.transpose(-1, -2).flatten(-3, -2)


def quantize_query(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises a query symmetrically to QUERY_BITS bits, for the dot score.

    Returns:
        integers in -QUERY_MAX..QUERY_MAX as float32 ``[..., S]``, and the step ``[..., 1]``.
    """
    step = q.abs().amax(-1, keepdim=True) / QUERY_MAX  # [..., 1]
    step = torch.where(step.isfinite(), step, torch.zeros_like(step))
    inverse = torch.where(step > 0, 1.0 / step, torch.zeros_like(step))
    inverse = torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))
    return (q * inverse).round().nan_to_num(0.0).clamp(-QUERY_MAX, QUERY_MAX), step


def dot_score(q: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Estimated q.k in units of the query's step: ``scale * sum(q_int * (2 * code - 3))``.

    Args:
        q: transformed queries ``[..., S]``.
        codes: ``[..., L, S]``.
        scale: fp16 ``[..., L]``.

    Returns:
        float32 ``[..., L]``.
    """
    q_int, _ = quantize_query(q)
    levels = 2.0 * codes.float() - 3.0  # [..., L, S]
    return (levels @ q_int.unsqueeze(-1)).squeeze(-1) * scale.float()


def logits(
    q: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, logit_scale: float
) -> torch.Tensor:
    """Estimated logits in base 2: the dot score times the query's step and ``logit_scale``.

    Arguments and result are those of :func:`dot_score`.
    """
    factor = (quantize_query(q)[1] * logit_scale).clamp_max(LARGEST_FACTOR)  # [..., 1]
    return dot_score(q, codes, scale) * factor


def sampled_tokens(length: int) -> torch.Tensor:
    """Tokens of SAMPLE_TILES tiles spread over a context, or all of its tokens: ascending int64."""
    tiles = -(-length // TILE)
    count = min(tiles, SAMPLE_TILES)
    first = torch.arange(count) * tiles // count * TILE
    tokens = (first.unsqueeze(-1) + torch.arange(TILE)).flatten()
    return tokens[tokens < length]


def log_sum(logits: torch.Tensor) -> torch.Tensor:
    """log2(sum(2^logits) / 2^SAMPLE_BITS) of the last dimension, ``[..., L] -> [..., 1]``, within 0.09.

    The divisor is the same for all heads, so it decides nothing. With it, small logits less this number are small,
    too, and float32 does not round them to equal scores.

    Powers and logarithm are interpolated linearly between powers of two, and terms are added in fixed
    point, so the result does not depend on the order of additions.
    """
    top = logits.amax(-1, keepdim=True)
    x = (logits - top).clamp_min(LEAST_EXPONENT)  # [..., L]
    exponent = x.floor()
    terms = ((1 + (x - exponent)) * 2**FRACTION_BITS).int() >> (-exponent).int()
    total = terms.sum(-1, keepdim=True, dtype=torch.int32).float()  # [..., 1]
    mantissa, exponent = total.frexp()  # 0.5 <= mantissa < 1
    return top + ((exponent - 1 - FRACTION_BITS - SAMPLE_BITS) + (2 * mantissa - 1))


def manhattan_score(q_codes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Negated Manhattan distance of codes, -3S..0: float32 ``[..., L]`` (paper, section 3.2)."""
    return -(q_codes.unsqueeze(-2).float() - codes.float()).abs().sum(-1)
