"""What the launches of every GPU backend have in common."""

from __future__ import annotations

from functools import lru_cache

LEAST_CONTEXT = 1024  #: steps of shorter contexts are launched alike


@lru_cache(maxsize=1024)
def rounded_context(max_seq_len: int) -> int:
    """The next of 1, 1.25, 1.5 and 1.75 times a power of two: contexts that grow seldom need a new plan."""
    tokens = max(max_seq_len, LEAST_CONTEXT)
    step = 1 << ((tokens - 1).bit_length() - 3)
    return -(-tokens // step) * step
