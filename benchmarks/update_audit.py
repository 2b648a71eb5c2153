"""Writes the tables of docs/audit.md from audit_cpu.json and audit_gpu.json of benchmarks/results.

    python benchmarks/update_audit.py [--check]

With --check nothing is written; the exit status is 1 when the document differs from the record.
"""

from __future__ import annotations

import sys

from records import RESULTS, load, update_document

from vllm_adamas.tables import markdown

DOCUMENT = RESULTS.parent.parent / "docs" / "audit.md"


def table(name: str, where: str) -> list[str]:
    """A record's table; ``where`` says what ran."""
    record, environment = load(name)
    off = "off_ms" in record["rows"][0]
    rows = [
        [
            f"{row['context']:,}",
            row["batch"],
            *([f"{row['off_ms']['median']:.2f}"] if off else []),
            f"{row['step_ms']['median']:.2f}",
            f"{row['audit_ms']['mean']:.1f}",
            f"{100 * row['share']:.2f} %",
        ]
        for row in record["rows"]
    ]
    headers = ["context", "requests", *(["step without audit, ms"] if off else []), "step, ms"]
    headers += ["audit of a step, ms", f"share of TPOT at {record['interval']} steps"]
    device = f"{environment.device}, vLLM {environment.versions['vllm']}"
    return [f"{where}; {device}.", "", *markdown(headers, rows)]


def main() -> int:
    lines = [
        *table("audit_cpu", "SmolLM2-135M-Instruct, one thread"),
        "",
        *table("audit_gpu", "Llama-3.1-8B's shape with random weights, CUDA graphs"),
        "",
        "A step is a median, and an audit a mean over the turns of all layers.",
    ]
    return update_document(DOCUMENT, "update_audit", lines)


if __name__ == "__main__":
    sys.exit(main())
