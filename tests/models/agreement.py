"""When two engines say the same."""

from __future__ import annotations

from engines import Answer

#: Nats between the best two tokens below which rounding may swap them, by the dtype of the model.
NEAR_TIE = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.2}


def agreed(
    stock: Answer, other: Answer, dtype: str = "float32", near_tie: float | None = None
) -> int:
    """The number of tokens that two greedy answers share, up to a near tie of the stock engine's.

    Args:
        near_tie: nats, that of the dtype by default.

    Raises:
        AssertionError: they part where the stock engine's best token was clearly the best.
    """
    near_tie = near_tie or NEAR_TIE[dtype]
    assert len(stock.tokens) == len(other.tokens) == len(stock.margins)
    for i, (expected, found) in enumerate(zip(stock.tokens, other.tokens, strict=True)):
        if expected != found:
            assert stock.margins[i] < near_tie, (
                f"token {i}: {found} instead of {expected}, which was better than any other by "
                f"{stock.margins[i]:.4f} nats"
            )
            return i
    return len(stock.tokens)
