"""What several test files need."""

import re
from pathlib import Path

MODEL = Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct"  # `make model` makes it


def is_one_sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text and not re.search(r"[.!?] +[A-Z]", text)
