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
    if device_type != "cpu":
        raise AdamasError(
            f"this release has no kernels for {device_type} devices: serve on a CPU host, or with "
            "another attention backend."
        )
    if name in ("auto", "cpu"):
        from vllm_adamas.backends.cpu import CpuBackend

        return CpuBackend()
    if name == "reference":
        from vllm_adamas.backends.reference import ReferenceBackend

        return ReferenceBackend()
    raise AdamasError(f"there is no backend {name!r}: choose auto, cpu or reference.")
