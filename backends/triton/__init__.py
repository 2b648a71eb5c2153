"""The Triton backend, for every GPU that Triton compiles for."""

from vllm_adamas.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
