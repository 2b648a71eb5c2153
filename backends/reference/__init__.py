"""The operations in plain PyTorch: slow, short, and what every kernel is tested against."""

from vllm_adamas.backends.reference.backend import ReferenceBackend

__all__ = ["ReferenceBackend"]
