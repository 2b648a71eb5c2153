"""The 2-bit signature of a key, and the two scores computed from signatures.

Paper: arXiv 2510.18413, section 3.1 (Hadamard transform, bucketize) and section 3.2 (Manhattan
distance). Codes are 0..3; D is head_size.
"""

from __future__ import annotations

import torch

from vllm_adamas.config import Coding
from vllm_adamas.layout import WORD

QUERY_BITS = 4  #: bits of a query element in the dot score
QUERY_MAX = 2 ** (QUERY_BITS - 1) - 1
FP16_MAX = 65504.0


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal Hadamard transform of the last dimension, ``[..., D]`` float32.

    It is block-diagonal; the block size is the largest power of two that divides D, so D = 96 has three
    blocks of 32.
    """
    size = x.shape[-1]
    block = size & -size
    y = x.float().unflatten(-1, (size // block, block))  # [..., D/block, block]
    step = 1
    while step < block:
        y = y.unflatten(-1, (block // (2 * step), 2, step))  # [..., pairs, 2, step]
        a, b = y.unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)  # [..., block]
        step *= 2
    return (y * block**-0.5).flatten(-2)


def thresholds(x: torch.Tensor, coding: Coding) -> torch.Tensor:
    """Outer threshold of each transformed vector: ``[..., D] -> [..., 1]``."""
    if not coding.relative:
        return torch.full_like(x[..., :1], coding.threshold)
    return coding.threshold * x.square().mean(-1, keepdim=True).sqrt()


def bucketize(x: torch.Tensor, coding: Coding) -> torch.Tensor:
    """Codes 0..3 of a transformed vector: uint8 ``[..., D]``. NaN gives code 0."""
    t = thresholds(x, coding)  # [..., 1]
    return (x >= -t).to(torch.uint8) + (x >= 0).to(torch.uint8) + (x >= t).to(torch.uint8)


def code_scale(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Least-squares factor from levels {-3,-1,1,3} to ``x``: fp16 ``[...]``, clamped to finite values."""
    levels = 2.0 * codes.float() - 3.0  # [..., D]
    scale = (x * levels).sum(-1) / levels.square().sum(-1)  # [...]
    return scale.nan_to_num(0.0).clamp(-FP16_MAX, FP16_MAX).to(torch.float16)


def pack(bits: torch.Tensor) -> torch.Tensor:
    """Packs bits ``[..., D]`` into int32 words ``[..., D/32]``; bit i of word w is dimension 32*w + i."""
    shifts = torch.arange(WORD, dtype=torch.int64, device=bits.device)
    words = (bits.to(torch.int64).unflatten(-1, (-1, WORD)) << shifts).sum(-1)  # [..., D/32]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Unpacks int32 words ``[..., D/32]`` into bits, uint8 ``[..., D]``."""
    shifts = torch.arange(WORD, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 1).flatten(-2).to(torch.uint8)


def untile(plane: torch.Tensor) -> torch.Tensor:
    """Reorders a signature plane ``[..., N/16, D/32, 16]`` to words per token ``[..., N, D/32]``."""
    return plane.transpose(-1, -2).flatten(-3, -2)


def quantize_query(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises a query symmetrically to QUERY_BITS bits, for the dot score.

    Returns:
        integers in -QUERY_MAX..QUERY_MAX as float32 ``[..., D]``, and the step ``[..., 1]``.
    """
    step = q.abs().amax(-1, keepdim=True) / QUERY_MAX  # [..., 1]
    step = torch.where(step.isfinite(), step, torch.zeros_like(step))
    inverse = torch.where(step > 0, 1.0 / step, torch.zeros_like(step))
    inverse = torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))
    return (q * inverse).round().nan_to_num(0.0).clamp(-QUERY_MAX, QUERY_MAX), step


def dot_score(q: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Estimated q.k in units of the query's step: ``scale * sum(q_int * (2 * code - 3))``.

    Args:
        q: transformed queries ``[..., D]``.
        codes: ``[..., L, D]``.
        scale: fp16 ``[..., L]``.

    Returns:
        float32 ``[..., L]``.
    """
    q_int, _ = quantize_query(q)
    levels = 2.0 * codes.float() - 3.0  # [..., L, D]
    return (levels @ q_int.unsqueeze(-1)).squeeze(-1) * scale.float()


def manhattan_score(q_codes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Negated Manhattan distance of codes, -3D..0: float32 ``[..., L]`` (paper, section 3.2)."""
    return -(q_codes.unsqueeze(-2).float() - codes.float()).abs().sum(-1)
