"""The CUDA backend: kernels of ``csrc/sm90`` for Hopper GPUs, and of ``csrc/sm80`` for others."""
