"""Writes the table of docs/options.md from the options of `vllm_adamas/config.py`.

    python benchmarks/update_options.py [--check]

With --check nothing is written; the exit status is 1 when the document differs from the options.
"""

from __future__ import annotations

import json
import sys

from records import RESULTS, update_document

from vllm_adamas.config import MAX_TOKENS, AdamasConfig
from vllm_adamas.tables import markdown

DOCUMENT = RESULTS.parent.parent / "docs" / "options.md"
TYPES = {"boolean": "true or false", "integer": "integer", "number": "number", "string": "string"}
BOUNDS = {"minimum": "{}", "exclusiveMinimum": "above {}", "maximum": "to {}"}


def number(value: float) -> str:
    return "2^30" if value == MAX_TOKENS else f"{value:,.0f}"


def values(schema: dict) -> str:
    """The values that a JSON schema allows, in words; null, which stands for the default, is not among them."""
    if "anyOf" in schema:
        return " or ".join(values(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if schema["type"] == "object":
        return f"object: layer numbers to {values(schema['additionalProperties'])}"
    bounds = [text.format(number(schema[name])) for name, text in BOUNDS.items() if name in schema]
    return ", ".join([TYPES[schema["type"]], *([" ".join(bounds)] if bounds else [])])


def lines() -> list[str]:
    rows = []
    for name, schema in AdamasConfig.model_json_schema()["properties"].items():
        default = schema.get("default")
        unset = "see the meaning" if "(default" in schema["description"] else "none"
        shown = unset if default is None else f"`{json.dumps(default)}`"
        rows.append([f"`{name}`", values(schema), shown, schema["description"]])
    return markdown(["option", "values", "default", "meaning"], rows)


if __name__ == "__main__":
    sys.exit(update_document(DOCUMENT, "update_options", lines()))
