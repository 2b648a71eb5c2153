"""Compute backends, one folder each, that implement :mod:`vllm_adamas.backends.base`."""
