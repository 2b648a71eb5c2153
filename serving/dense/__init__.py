"""Dense attention for prompts and for the decode of dense layers."""

from __future__ import annotations

from vllm_adamas.serving.dense.base import DenseAttention


def get_dense_attention(device_type: str) -> DenseAttention:
    """A new dense attention for the device."""
    if device_type == "cpu":
        from vllm_adamas.serving.dense.cpu import CpuAttention

        return CpuAttention()
    from vllm_adamas.serving.dense.flash import FlashAttention

    return FlashAttention()
