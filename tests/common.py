"""What several test files need."""

import re
from pathlib import Path

import pytest

from vllm_adamas.errors import AdamasError

MODEL = Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct"  # `make model` makes it


def is_one_sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text and not re.search(r"[.!?] +[A-Z]", text)


def refused(call, *named: str) -> None:
    """The call ends in an AdamasError of one sentence that holds each of ``named``."""
    with pytest.raises(AdamasError) as error:
        call()
    message = str(error.value)
    assert is_one_sentence(message), message
    assert all(part in message for part in named), message
