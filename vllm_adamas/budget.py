"""The token budget of a decode row: how many tokens of its context a sparse layer attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenBudget:
    """
    Args:
        tokens: a number of tokens, or a fraction of the context (0 < f <= 1).
        floor: the least number of tokens where ``tokens`` is a fraction.
        min_context: contexts shorter than this are attended densely.
    """

    tokens: int | float
    floor: int = 1
    min_context: int = 0

    def fill(self, seq_lens: torch.Tensor, out: torch.Tensor) -> None:
        """Writes each row's budget, which is its context where the row is dense. No host sync.

        Args:
            seq_lens, out: int32 ``[R]`` on one device; contexts, the query's own token included.
        """
        if isinstance(self.tokens, float):
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
        """Tokens that a sparse row of at most ``seq_len`` attends to: what launches are sized for.

        ``min_context`` only takes rows away, so it does not count.
        """
        return TokenBudget(self.tokens, self.floor).of(seq_len)

    def __str__(self) -> str:
        if isinstance(self.tokens, float):
            return f"{self.tokens:g} of the context, at least {self.floor} tokens"
        return f"{self.tokens} tokens"
