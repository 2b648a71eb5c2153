"""A sample of a suite: a prompt, how many tokens may answer it, and what an answer is worth."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """
    Args:
        ids: token ids of the prompt.
        tokens: largest number of tokens of the answer.
        score: what an answer's text is worth, from 0 to 1; None where answers are compared with each other.
        stops: whether an answer ends at the model's end-of-sequence token.
        until: strings that end an answer too.
    """

    ids: Sequence[int]
    tokens: int
    score: Callable[[str], float] | None
    stops: bool = True
    until: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that tell the prompt from others."""
        return hashlib.sha256(np.asarray(self.ids, np.int64).tobytes()).hexdigest()[:12]

    def cut(self, answer: str) -> str:
        """The answer up to the first string that ends it."""
        for end in filter(None, self.until):
            answer = answer.partition(end)[0]
        return answer


def share_of(expected: Sequence[str], answer: str) -> float:
    """Share of the expected strings in the answer; upper and lower case are the same."""
    found = answer.lower()
    return sum(text.lower() in found for text in expected) / len(expected)


def any_of(expected: Sequence[str], answer: str) -> float:
    """1 if one of the expected strings is in the answer, else 0; upper and lower case are the same."""
    found = answer.lower()
    return float(any(text.lower() in found for text in expected))


def question_ids(tokenizer, text: str, answer: str) -> list[int]:
    """Token ids of a user's text, in the tokenizer's chat template if it has one, and the answer's start."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text + answer, add_special_tokens=False, verbose=False).input_ids)
    return list(tokenizer(f"{text} {answer}".rstrip(), verbose=False).input_ids)
