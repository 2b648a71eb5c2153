"""The CUDA backend: kernels of ``csrc/sm90`` for Hopper GPUs."""
