"""Writes the results part of docs/quality.md from the JSON files in benchmarks/results.

    python benchmarks/update_quality.py [--check]

With --check nothing is written; the exit status is 1 when the document differs from the results.
"""

from __future__ import annotations

import json
import sys

from common import RESULTS

from vllm_adamas import profile
from vllm_adamas.evaluate import report
from vllm_adamas.evaluate.command import profile_table

DOCUMENT = RESULTS.parent.parent / "docs" / "quality.md"
BEGIN = "<!-- results: begin (benchmarks/update_quality.py writes this part) -->"
END = "<!-- results: end -->"


def render() -> str:
    lines = [BEGIN]
    for path in sorted(RESULTS.glob("quality_*.json"), reverse=True):
        result = json.loads(path.read_text())
        context = result["settings"]["context"]
        lines += [f"### {result['model']['name']}, context {context}", ""]
        lines += report.markdown(result).split("\n")[2:]
        lines += [f"![plot](../benchmarks/results/{path.stem}.png)", ""]
    for path in sorted(profile.SHIPPED.glob("*.json")):
        table = profile_table(profile.load(path.stem))
        lines += [f"### The shipped profile `{path.stem}`", "", "```text", table, "```", ""]
    return "\n".join([*lines, END])


def main() -> int:
    text = DOCUMENT.read_text()
    start, end = text.index(BEGIN), text.index(END) + len(END)
    new = text[:start] + render() + text[end:]
    if "--check" in sys.argv:
        return int(new != text)
    DOCUMENT.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
