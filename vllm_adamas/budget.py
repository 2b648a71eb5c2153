"""The token budget of a decode row: the number of context tokens that a sparse layer attends to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class TokenBudget:
    """
    Args:
        tokens: a number of tokens, or a fraction of the context (0 < f <= 1).
        floor: minimum number of tokens when ``tokens`` is a fraction.
        min_context: contexts shorter than this are attended densely.
        ceiling: number of tokens that a request may raise the budget to; 0 if requests have no say.
    """

    tokens: int | float
    floor: int = 1
    min_context: int = 0
    ceiling: int = 0
    # A field, because 1 token and the whole context, 1.0, would be equal without it.
    is_fraction: bool = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "is_fraction", isinstance(self.tokens, float))

    def fill(self, seq_lens: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the budget of each row; a dense row's budget is its context. Does not sync the host.

        Args:
            seq_lens: int32 ``[R]``, tokens in the context, the query's own included.
            out: int32 ``[R]`` on the same device, the budgets in tokens.
        """
        if self.is_fraction:
            wanted = (seq_lens.double() * self.tokens).ceil().clamp_(min=self.floor)
            torch.minimum(seq_lens, wanted.to(torch.int32), out=out)
        else:
            torch.clamp(seq_lens, max=self.tokens, out=out)
        if self.min_context:
            out.copy_(torch.where(seq_lens < self.min_context, seq_lens, out))

    def of(self, seq_len: int) -> int:
        """The budget of one row."""
        out = torch.empty(1, dtype=torch.int32, device="cpu")
        self.fill(torch.tensor([seq_len], dtype=torch.int32, device="cpu"), out)
        return int(out)

    def most(self, seq_len: int) -> int:
        """The most tokens that a sparse row attends to in a context of at most ``seq_len`` tokens.

        Launches are sized for it. ``min_context`` is ignored, since it only makes rows dense.
        """
        return max(TokenBudget(self.tokens, self.floor).of(seq_len), min(self.ceiling, seq_len))

    def __str__(self) -> str:
        if self.is_fraction:
            return f"{self.tokens:g} of the context, at least {self.floor} tokens"
        return f"{self.tokens} tokens"
