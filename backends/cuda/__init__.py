"""Kernels of ``csrc/sm90`` for Hopper GPUs."""
