"""Writes the table of docs/audit.md from benchmarks/results/audit_cpu.json.

    python benchmarks/update_audit.py [--check]

With --check nothing is written; the exit status is 1 when the document differs from the record.
"""

from __future__ import annotations

import sys

from common import RESULTS, load, update_document

from vllm_adamas.tables import markdown

DOCUMENT = RESULTS.parent.parent / "docs" / "audit.md"


def main() -> int:
    record, environment = load("audit_cpu")
    rows = [
        [
            f"{row['context']:,}",
            row["batch"],
            f"{row['step_ms']['median']:.1f}",
            f"{row['audit_ms']['mean']:.1f}",
            f"{100 * row['share']:.2f} %",
        ]
        for row in record["rows"]
    ]
    headers = ["context", "requests", "step, ms", "audit of a step, ms"]
    headers.append(f"share of TPOT at {record['interval']} steps")
    lines = [
        f"{record['model']}, one thread; {environment.device}, vLLM {environment.versions['vllm']}. A step is a median, "
        "and an audit a mean over the turns of all layers.",
        "",
        *markdown(headers, rows),
    ]
    return update_document(DOCUMENT, "update_audit", lines)


if __name__ == "__main__":
    sys.exit(main())
