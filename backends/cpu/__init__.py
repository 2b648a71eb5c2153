"""Kernels of ``csrc/cpu``."""
