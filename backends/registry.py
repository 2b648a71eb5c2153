"""Which compute backend runs where."""

from __future__ import annotations

from vllm_adamas.backends.base import HOPPER, Backend
from vllm_adamas.errors import AdamasError


def gpu_kernels(name: str, capability: tuple[int, int]) -> str:
    """Which kernels ``name`` stands for on a GPU: ``auto`` is CUDA on Hopper, Triton elsewhere."""
    if name == "auto":
        return "cuda" if capability == HOPPER else "triton"
    return name


def get_backend(name: str, device_type: str = "cpu") -> Backend:
    """A new backend called ``name``; ``auto`` takes the fastest one for the device.

    Raises:
        AdamasError: the backend does not exist for the device or its library is not built.
    """
    if device_type == "cuda" and name == "auto":
        import torch

        name = gpu_kernels(name, torch.cuda.get_device_capability())
    if device_type == "cuda" and name == "cuda":
        from vllm_adamas.backends.cuda.backend import CudaBackend

        return CudaBackend()
    if device_type == "cuda" and name == "triton":
        from vllm_adamas.backends.triton.backend import TritonBackend

        return TritonBackend()
    if device_type == "cpu" and name in ("auto", "cpu"):
        from vllm_adamas.backends.cpu.backend import CpuBackend

        return CpuBackend()
    if device_type == "cpu" and name == "reference":
        from vllm_adamas.backends.reference.backend import ReferenceBackend

        return ReferenceBackend()
    raise AdamasError(
        f"kernels={name!r} do not run on {device_type} devices: choose auto there, "
        "or another attention backend."
    )
