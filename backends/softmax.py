"""The softmax of attention: soft-capped logits, and sinks that take a share of the weight."""

from __future__ import annotations

import torch


def soft_cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """``cap * tanh(logits / cap)``; a cap of 0 caps nothing."""
    return cap * (logits / cap).tanh() if cap else logits


def softmax(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Weights of tokens: exp(x) / (exp(sink) + sum(exp(x))) over the last dimension.

    Args:
        logits: ``[..., K]``.
        sinks: ``[...]`` or broadcast to it; None takes no share.
    """
    if sinks is None:
        return logits.softmax(-1)
    sink = sinks.expand(logits.shape[:-1]).unsqueeze(-1)  # [..., 1]
    return torch.cat((logits, sink), -1).softmax(-1)[..., :-1]
