"""Writes the tables of models in docs/compatibility.md from benchmarks/results/models_cpu.json.

    python benchmarks/update_support.py [--check]

`make test-models` writes that file: a row is there only if its test has passed. With --check nothing is
written; the exit status is 1 when the document differs from the record.
"""

from __future__ import annotations

import sys

from common import RESULTS, load, update_document

from vllm_adamas.tables import markdown

DOCUMENT = RESULTS.parent.parent / "docs" / "compatibility.md"


def main() -> int:
    record, environment = load("models_cpu")
    software = ", ".join(
        f"{name} {environment.versions[name]}" for name in ("vllm", "torch", "transformers")
    )
    served = [
        [name, row["sparse_layers"], row["sparse_rows"], f"{row['compared']} of {row['tokens']}"]
        for name, row in record["models"].items()
    ]
    refused = [[name, row["sentence"]] for name, row in record["refused"].items()]
    lines = [
        f"{environment.device}; {software}.",
        "",
        *markdown(["configuration", "sparse layers", "sparse rows", "same tokens"], served),
        "",
        "On a Llama, against the same: " + ", ".join(sorted(record["features"])) + ".",
        "",
        *markdown(["refused", "in this sentence"], refused),
    ]
    return update_document(DOCUMENT, "update_support", lines)


if __name__ == "__main__":
    sys.exit(main())
