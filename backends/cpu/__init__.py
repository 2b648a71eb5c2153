"""The CPU backend: kernels of ``csrc/cpu``."""
