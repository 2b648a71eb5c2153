"""The context length and the budget of a row, for every kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def length_of(seq_lens, row, longest):
    """Tokens of a row's context, clamped to ``longest``, the most that buffers and block tables hold."""
    return tl.minimum(tl.maximum(tl.load(seq_lens + row), 0), longest)


@triton.jit
def budget_of(budgets, row, least):
    """Budget of a row in tokens, at least ``least``."""
    return tl.maximum(tl.load(budgets + row), least)
