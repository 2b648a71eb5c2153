"""The operations in plain PyTorch: slow and short, the reference that kernels are tested against."""

from vllm_adamas.backends.reference.backend import ReferenceBackend

__all__ = ["ReferenceBackend"]
