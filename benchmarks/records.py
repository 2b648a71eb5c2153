"""Shared by all benchmarks: the environment, statistics and result files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_adamas.environment import Environment
from vllm_adamas.serving.loadtest.measure import spread as spread

RESULTS = Path(__file__).parent / "results"


def environment(packages: Sequence[str] = ()) -> dict:
    """The record of this host and its software for a result file (:class:`Environment`).

    Args:
        packages: distributions that are measured besides the project's own kernels.
    """
    return Environment.capture(RESULTS.parent, packages).record()


def load(name: str) -> tuple[dict, Environment]:
    """Loads ``benchmarks/results/<name>.json`` and the environment it was measured in."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    return result, Environment.model_validate(result["environment"])


def save(name: str, result: dict) -> Path:
    """Writes ``benchmarks/results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def update_document(document: Path, script: str, *parts: list[str]) -> int:
    """Writes the lines of each part between the next markers that name the script; returns the exit status.

    With ``--check`` on the command line nothing is written, and the status is 1 if the document differs.
    """
    begin = f"<!-- results: begin (benchmarks/{script}.py writes this part) -->"
    end = "<!-- results: end -->"
    text, *rest = document.read_text().split(begin)
    new = text
    for lines, old in zip(parts, rest, strict=True):
        new += "\n".join([begin, *lines, end]) + old.partition(end)[2]
    if "--check" in sys.argv:
        return int(new != begin.join([text, *rest]))
    document.write_text(new)
    return 0
