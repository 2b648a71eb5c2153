"""Compute backends, one folder each, behind the operations of :mod:`vllm_adamas.backends.base`."""

from __future__ import annotations

from functools import cache

from vllm_adamas.backends.base import Backend
from vllm_adamas.errors import AdamasError


@cache
def get_backend(name: str, device_type: str = "cpu") -> Backend:
    """The backend called ``name``; ``auto`` takes the fastest one for the device.

    Raises:
        AdamasError: the backend does not exist for the device or its library is not built.
    """
    if device_type == "cuda" and name in ("auto", "cuda"):
        from vllm_adamas.backends.cuda import CudaBackend

        return CudaBackend()
    if device_type == "cpu" and name in ("auto", "cpu"):
        from vllm_adamas.backends.cpu import CpuBackend

        return CpuBackend()
    if device_type == "cpu" and name == "reference":
        from vllm_adamas.backends.reference import ReferenceBackend

        return ReferenceBackend()
    raise AdamasError(
        f"kernels={name!r} do not run on {device_type} devices: choose auto there, "
        "or another attention backend."
    )
