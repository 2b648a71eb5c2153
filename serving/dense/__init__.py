"""Dense attention: prompts, and layers that decode densely."""

from __future__ import annotations

from vllm_adamas.serving.dense.base import DenseAttention


def get_dense_attention(device_type: str) -> DenseAttention:
    """A new one for the device."""
    if device_type == "cpu":
        from vllm_adamas.serving.dense.cpu import CpuAttention

        return CpuAttention()
    from vllm_adamas.serving.dense.flash import FlashAttention

    return FlashAttention()
