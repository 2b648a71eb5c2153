"""Writes the results part of docs/quality.md from the JSON files in benchmarks/results.

    python benchmarks/update_quality.py [--check]

With --check nothing is written; the exit status is 1 when the document differs from the results.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass

from records import RESULTS, update_document

from vllm_adamas import profile
from vllm_adamas.config import AdamasConfig
from vllm_adamas.evaluate import report
from vllm_adamas.evaluate.command import profile_table
from vllm_adamas.evaluate.study import DEFAULT, FAMILIES, PERPLEXITY
from vllm_adamas.tables import markdown

DOCUMENT = RESULTS.parent.parent / "docs" / "quality.md"

BUDGET = AdamasConfig().token_budget
NEEDLES = "dot-dense2"
SMOLLM, GEMMA = "SmolLM2-135M-Instruct", "gemma-3-270m"
#: Ends of the names of studies of one question: layer 0, and the default configuration.
LAYER_0, BY_DEFAULT = "-layer0", "-default"
TITLES = {LAYER_0: ", budgets of layer 0", BY_DEFAULT: ", the default"}
SELECTORS = [name for name, options in FAMILIES.items() if "selector" in options]


@dataclass(frozen=True)
class Target:
    """A quality target for a configuration of a model.

    Args:
        study: end of the name of the study; empty for the model's main one.
        key: entry of :func:`report.summary`; ``d<task>`` is the paired difference of a retrieval task.
        limit: upper bound of a ΔNLL, lower bound of anything else.
        noise: whether the target is met when the interval of a difference reaches the limit.
    """

    model: str
    study: str
    words: str
    family: str
    budget: int
    key: str
    limit: float
    noise: bool = False

    def good(self, value) -> float:
        """The value as a quality: larger is better."""
        mean = value[0] if isinstance(value, tuple) else value
        return -mean if self.key == "dnll" else mean

    def met(self, value) -> bool:
        if self.noise:
            return value[2] >= self.limit
        return self.good(value) >= (-self.limit if self.key == "dnll" else self.limit)

    def show(self, value) -> str:
        if self.key == "mass":
            return f"{value:.3f}"
        scale, form = (1, "+.3f") if self.key == "dnll" else (100, "+.1f")
        mean, low, high = (format(scale * x, form) for x in value)
        return f"{mean} [{low}, {high}]"

    def wanted(self) -> str:
        if self.key in ("dnll", "mass"):
            return {"dnll": "ΔNLL ≤", "mass": "mass ≥"}[self.key] + f" {self.limit:.3f}"
        if self.noise:
            return "equal within the interval"
        return f"within {-100 * self.limit:.0f} points"


TARGETS = (
    Target(
        SMOLLM,
        BY_DEFAULT,
        "perplexity within 3% of dense by default",
        DEFAULT,
        BUDGET,
        "dnll",
        0.03,
    ),
    Target(
        SMOLLM,
        BY_DEFAULT,
        "perplexity within 6% with a budget of 128",
        DEFAULT,
        128,
        "dnll",
        0.0583,
    ),
    Target(
        SMOLLM,
        BY_DEFAULT,
        "the same with calibrated budgets of layers",
        "calibrated",
        128,
        "dnll",
        0.0583,
    ),
    # What follows was measured with the sum and dense first layers: one, and two for the needles.
    Target(SMOLLM, "", "passkey as dense", "dot", BUDGET, "dpasskey", 0.0, noise=True),
    Target(SMOLLM, "", "single needle as dense", NEEDLES, BUDGET, "dsingle", 0.0, noise=True),
    Target(SMOLLM, "", "multi-key needle", NEEDLES, BUDGET, "dmultikey", -0.02),
    Target(GEMMA, "", "attention mass with its profile", "dot+profile", 256, "mass", 0.78),
)


def targets(results: dict[str, dict]) -> list[str]:
    """A table of targets and measurements, with the best configuration of the same study and budget.

    Args:
        results: by the model's name and the end of the study's name.
    """
    lines = []
    for target in TARGETS:
        rows = {
            row["family"]: row[target.key]
            for row in report.summary(results[target.model + target.study])
            if row["budget"] == target.budget
            and target.key in row
            and row["family"] not in SELECTORS
        }
        if target.family not in rows:
            continue
        found, best = rows[target.family], max(rows, key=lambda name: target.good(rows[name]))
        lines.append(
            [
                target.model,
                target.words,
                target.wanted(),
                f"`{target.family}-{target.budget}` {target.show(found)}",
                "met" if target.met(found) else "missed",
                f"`{best}` {target.show(rows[best])}",
            ]
        )
    headers = ["model", "target", "wanted", "measured", "", "best of the study with this budget"]
    return [*markdown(headers, lines), ""]


def times(result: dict, bench: dict) -> list[str]:
    """Quality and time of each budget and selection, fastest first."""
    rows = {row["name"]: row for row in report.summary(result)}
    suffix = "+profile" if "dot+profile-256" in rows else ""
    lines = []
    for cell in sorted(bench["rows"], key=lambda cell: cell["least_sparse_ms"]):
        family = "dot" if cell["selection"] == "kv_head" else "dot-query-head"
        row = rows.get(f"{family}{suffix}-{cell['budget']}")
        if row is not None:
            low, middle, high = (cell["sparse_ms"][what] for what in ("q1", "median", "q3"))
            least = cell["least_sparse_ms"]
            lines.append(
                [
                    row["name"],
                    f"{least:.2f}",
                    f"{middle:.2f} ({low:.2f}–{high:.2f})",
                    f"{row['dnll'][0]:+.4f}",
                    f"{row['kl'][0]:.4f}",
                    f"{row['mass']:.3f}",
                ]
            )
    model, first, name = bench["model"], bench["rows"][0], result["model"]["name"]
    head = (
        f"{name}: attention of one decode step at {first['context']} tokens, {model['layers']} layers of its shape "
        f"({first['dense_layers']} dense), {bench['threads']} thread, {bench['sparse']}; least, median and quartiles."
    )
    return [
        head,
        "",
        *markdown(["configuration", "least ms", "median", "ΔNLL", "KL", "mass"], lines),
        "",
    ]


def differences(ours: dict, others: dict) -> list[str]:
    """NLL and KL of a text cell less those of another of the same study, with their intervals."""
    found = (
        report.bootstrap([a - b for a, b in zip(ours[what], others[what], strict=True)])
        for what in ("nll", "kl")
    )
    return ["{:+.4f} [{:+.4f}, {:+.4f}]".format(*difference) for difference in found]


def by_default(result: dict) -> list[str]:
    """The default against the families that it differs from, window by window."""
    text = {name: cell["tasks"][PERPLEXITY] for name, cell in result["cells"].items()}
    lines = [
        [name, other, *differences(text[name], text[other])]
        for name, cell in result["cells"].items()
        if cell["family"] == DEFAULT
        for other in (f"{family}-{cell['budget']}" for family in ("dot", "dot-max"))
        if other in text
    ]
    head = "The default less others, by window; 95% intervals, paired bootstrap over windows."
    return [head, "", *markdown(["configuration", "less", "NLL", "KL"], lines), ""]


def layer_0(result: dict) -> list[str]:
    """Layer 0 with a budget of its own against the dense layer 0 of the same family, window by window."""
    cells, lines = result["cells"], []
    for name, cell in cells.items():
        tokens = cell["options"].get("layer_budgets", {}).get("0")
        if tokens is None:
            continue
        usual = f"{cell['family'].removesuffix(f'-layer0-{tokens}')}-{cell['budget']}"
        ours, dense = (cells[x]["tasks"][PERPLEXITY] for x in (name, usual))
        shown = differences(ours, dense)
        layer = statistics.fmean(ours["error"][ours["layers"].index(0)])
        others = statistics.fmean(statistics.fmean(heads) for heads in dense["error"])
        lines.append([usual, tokens, *shown, f"{layer:.3f}", f"{others:.3f}"])
    head = (
        "Layer 0 sparse less layer 0 dense, by window; 95% intervals, paired bootstrap over windows. Errors "
        "of the attention output: of layer 0, and of the other layers on average."
    )
    headers = ["configuration", "tokens in layer 0", "NLL", "KL", "error of layer 0", "of others"]
    return [head, "", *markdown(headers, lines), ""]


def render() -> list[str]:
    found = {path: json.loads(path.read_text()) for path in RESULTS.glob("quality_*.json")}
    by_model = {
        result["model"]["name"]: result
        for path, result in found.items()
        if path.stem == f"quality_{result['model']['name']}"
        and PERPLEXITY in result["settings"]["tasks"]
    }
    lines = targets({path.stem.removeprefix("quality_"): result for path, result in found.items()})
    benches = {name: RESULTS / f"decode_cpu_{name}.json" for name in by_model}
    if any(path.exists() for path in benches.values()):
        lines += ["### At equal attention time", ""]
        for name, path in sorted(benches.items(), reverse=True):
            lines += times(by_model[name], json.loads(path.read_text())) if path.exists() else []
    for path in sorted(found, reverse=True):
        result = found[path]
        context = result["settings"]["context"]
        study = path.stem.removeprefix(f"quality_{result['model']['name']}")
        title = f"{result['model']['name']}, context {context}{TITLES.get(study, '')}"
        lines += [f"### {title}", ""]
        lines += report.markdown(result).split("\n")[2:]
        if study == LAYER_0:
            lines += layer_0(result)
        elif study == BY_DEFAULT:
            lines += by_default(result)
        else:
            lines += [f"![plot](../benchmarks/results/{path.stem}.png)", ""]
    for path in sorted(profile.SHIPPED.glob("*.json")):
        table = profile_table(profile.load(path.stem))
        lines += [f"### The shipped profile `{path.stem}`", "", "```text", table, "```", ""]
    return lines


def ruler() -> list[str]:
    """The scores of the recorded run of RULER."""
    (record,) = json.loads((RESULTS / "ruler_gpu.json").read_text())["records"]
    lines = [f"{record['model']}. {record['setting']}", ""]
    for table in record["tables"]:
        lines += [f"**{table['title']}**", "", *markdown(table["headers"], table["rows"]), ""]
    return [*lines, *record["findings"][:1]]


if __name__ == "__main__":
    sys.exit(update_document(DOCUMENT, "update_quality", ruler(), render()))
