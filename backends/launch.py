"""Launch rules common to all GPU backends."""

from __future__ import annotations

from functools import lru_cache

LEAST_CONTEXT = 1024  #: shorter contexts are launched like this one


@lru_cache(maxsize=1024)
def rounded_context(max_seq_len: int) -> int:
    """Rounds up to 1, 1.25, 1.5 or 1.75 times a power of two, so growing contexts rarely need a new plan."""
    tokens = max(max_seq_len, LEAST_CONTEXT)
    step = 1 << ((tokens - 1).bit_length() - 3)
    return -(-tokens // step) * step
