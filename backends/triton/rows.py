"""What every kernel asks of a row: how long it is, and how many tokens it may attend to."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def length_of(seq_lens, row, longest):
    """Tokens of a row's context, no more than buffers and block tables hold."""
    return tl.minimum(tl.maximum(tl.load(seq_lens + row), 0), longest)


@triton.jit
def budget_of(budgets, row, least):
    """Tokens of a row's budget; ``least`` are kept whatever it is."""
    return tl.maximum(tl.load(budgets + row), least)
