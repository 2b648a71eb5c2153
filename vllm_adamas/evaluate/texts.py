"""Texts to measure on: the packaged book, or the user's own files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from vllm_adamas.errors import AdamasError
from vllm_adamas.evaluate.engine import Request

PACKAGED = "alice.txt"  #: Lewis Carroll, Alice's Adventures in Wonderland (1865), public domain
CALIBRATION_SHARE = 0.4  #: share of the packaged book for calibration; the rest is for evaluation


@dataclass(frozen=True)
class Text:
    """A text and its name in the results."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def packaged(calibration: bool) -> Text:
    """The part of the packaged book that calibration reads, or the one that evaluation reads."""
    book = files("vllm_adamas.evaluate").joinpath("data", PACKAGED).read_text(encoding="utf-8")
    cut = book.index("\n\n", int(len(book) * CALIBRATION_SHARE))
    return Text(PACKAGED, book[:cut] if calibration else book[cut:].lstrip())


def read(paths: Sequence[str]) -> list[Text]:
    """
    Raises:
        AdamasError: a file cannot be read, is not UTF-8 or is empty.
    """
    texts = []
    for path in paths:
        try:
            content = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise AdamasError(
                f"the text {path} is not UTF-8: convert it, or give a plain text file."
            ) from None
        except OSError as error:
            raise AdamasError(
                f"the text {path} cannot be read ({error.strerror}): give the path of a plain text file."
            ) from None
        if not content.strip():
            raise AdamasError(f"the text {path} is empty: give a file with a long text.")
        texts.append(Text(Path(path).name, content))
    return texts


def windows(
    tokenizer, texts: Sequence[Text], context: int, steps: int, limit: int
) -> list[Request]:
    """Windows of ``context`` tokens whose last ``steps`` are scored, evenly spread over the texts.

    Windows do not overlap; each starts with the tokenizer's special tokens (BOS).

    Raises:
        AdamasError: no text is as long as one window.
    """
    start = list(tokenizer("").input_ids)
    body = context - len(start)
    found = []
    for text in texts:
        ids = tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids
        found += [ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]
    if not found:
        longest = max(texts, key=lambda text: len(text.content)).name
        raise AdamasError(
            f"no text holds the {context} tokens of one window (the longest is {longest}): lower "
            "--context or give longer texts."
        )
    if len(found) > limit:
        found = [found[i * len(found) // limit] for i in range(limit)]
    # One token more than the steps: the first is predicted by the prefill.
    cut = body - steps - 1
    return [Request(start + ids[:cut], ids[cut:], window=i) for i, ids in enumerate(found)]
