"""Compute backends, one folder each, behind the operations of :mod:`vllm_adamas.backends.base`."""
