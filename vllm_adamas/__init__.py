"""vllm-adamas: sparse decode attention over 2-bit key signatures, as a vLLM attention backend."""

__version__ = "0.1.0"
