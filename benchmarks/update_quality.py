"""Writes the results part of docs/quality.md from the JSON files in benchmarks/results.

    python benchmarks/update_quality.py [--check]

With --check nothing is written; the exit status is 1 when the document differs from the results.
"""

from __future__ import annotations

import json
import sys

from common import RESULTS, update_document

from vllm_adamas import profile
from vllm_adamas.evaluate import report
from vllm_adamas.evaluate.command import profile_table
from vllm_adamas.evaluate.study import FAMILIES, PERPLEXITY

DOCUMENT = RESULTS.parent.parent / "docs" / "quality.md"

#: What the project wants: model, quantity, configuration, budget, limit, and its words.
TARGETS = (
    ("SmolLM2-135M-Instruct", "dnll", "dot", 256, 0.03, "perplexity within 3% of dense by default"),
    ("SmolLM2-135M-Instruct", "dnll", "dot", 128, 0.0583, "within 6% with a budget of 128"),
    ("gemma-3-270m", "mass", "dot+profile", 256, 0.78, "attention mass of 0.78 with its profile"),
)
SELECTORS = [name for name, options in FAMILIES.items() if "selector" in options]


def targets(results: dict[str, dict]) -> list[str]:
    """A table of wanted and measured, with the best configuration of the same budget."""
    lines = ["| target | wanted | measured | | best with this budget |", "|---|---|---|---|---|"]
    for model, key, family, budget, limit, words in TARGETS:
        if model not in results:
            continue
        rows = {
            row["family"]: row[key][0] if key == "dnll" else row[key]
            for row in report.summary(results[model])
            if row["budget"] == budget and key in row and row["family"] not in SELECTORS
        }
        if family not in rows:
            continue
        best = (min if key == "dnll" else max)(rows, key=rows.get)
        met = rows[family] <= limit if key == "dnll" else rows[family] >= limit
        name, sign = ("ΔNLL", "≤") if key == "dnll" else ("mass", "≥")
        lines.append(
            f"| {model}: {words} | {name} {sign} {limit:.3f} | `{family}` {rows[family]:.3f} | "
            f"{'met' if met else 'missed'} | `{best}` {rows[best]:.3f} |"
        )
    return [*lines, ""] if len(lines) > 2 else []


def render() -> list[str]:
    found = {path: json.loads(path.read_text()) for path in RESULTS.glob("quality_*.json")}
    by_model = {
        result["model"]["name"]: result
        for result in found.values()
        if PERPLEXITY in result["settings"]["tasks"]
    }
    lines = targets(by_model)
    for path in sorted(found, reverse=True):
        result = found[path]
        context = result["settings"]["context"]
        lines += [f"### {result['model']['name']}, context {context}", ""]
        lines += report.markdown(result).split("\n")[2:]
        lines += [f"![plot](../benchmarks/results/{path.stem}.png)", ""]
    for path in sorted(profile.SHIPPED.glob("*.json")):
        table = profile_table(profile.load(path.stem))
        lines += [f"### The shipped profile `{path.stem}`", "", "```text", table, "```", ""]
    return lines


if __name__ == "__main__":
    sys.exit(update_document(DOCUMENT, "update_quality", render()))
