"""Results of a study as tables and plots."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vllm_adamas import page, tables
from vllm_adamas.environment import Environment
from vllm_adamas.evaluate import tasks
from vllm_adamas.evaluate.study import AGREEMENT, DENSE, PERPLEXITY

RESAMPLES = 2000
CONFIDENCE = 0.95


def bootstrap(differences: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of paired differences and its percentile interval ``(mean, low, high)``; resamples pairs."""
    rng, n = random.Random(seed), len(differences)
    means = sorted(statistics.fmean(rng.choices(differences, k=n)) for _ in range(RESAMPLES))
    tail = (1 - CONFIDENCE) / 2
    low, high = means[int(tail * RESAMPLES)], means[int((1 - tail) * RESAMPLES) - 1]
    return statistics.fmean(differences), low, high


def summary(result: dict) -> list[dict]:
    """One row per cell; each quantity is ``(mean, low, high)`` or a number, and absent if not measured."""
    cells = result["cells"]
    dense = cells[DENSE]["tasks"]
    rows = []
    for name, cell in cells.items():
        row: dict = {"name": name, "family": cell["family"], "budget": cell["budget"]}
        found = cell["tasks"]
        if PERPLEXITY in found and PERPLEXITY in dense:
            ours, theirs = found[PERPLEXITY], dense[PERPLEXITY]
            row["nll"] = statistics.fmean(ours["nll"])
            if name != DENSE:
                pairs = zip(ours["nll"], ours.get("dense", theirs["nll"]), strict=True)
                row["dnll"] = bootstrap([a - b for a, b in pairs])
            if "kl" in ours:
                row["kl"] = bootstrap(ours["kl"])
            for what in ("mass", "oracle", "error"):
                if what in ours:
                    row[what] = statistics.fmean(statistics.fmean(heads) for heads in ours[what])
        if "agreed" in found.get(AGREEMENT, {}):
            row["agreed"] = bootstrap(found[AGREEMENT]["agreed"])
        for task in tasks.TASKS:
            if task in found and task in dense:
                row[task] = statistics.fmean(found[task]["scores"])
                if name != DENSE:
                    pairs = zip(found[task]["scores"], dense[task]["scores"], strict=True)
                    row[f"d{task}"] = bootstrap([a - b for a, b in pairs])
        rows.append(row)
    return rows


class Part(NamedTuple):
    """A table of the report, and in words what it shows and how."""

    title: str
    description: str
    headers: list[str]
    rows: list[list[str]]


def parts(result: dict) -> list[Part]:
    """A table of text quality and a table of retrieval, as far as they were measured."""
    rows, settings = summary(result), result["settings"]
    dense, found = rows[0], []
    cells = result["cells"][DENSE]["tasks"]
    if "nll" in dense:
        windows, steps = len(cells[PERPLEXITY]["nll"]), cells[PERPLEXITY]["steps"]
        description = (
            f"{windows} windows of {settings['context']} tokens, {steps} forced decode steps each: "
            f"{windows * steps} scored tokens. Dense NLL {dense['nll']:.4f}. ΔNLL and KL to dense in nats per "
            "token; mass: attention kept, of the oracle's with as many tokens; error: of the attention output; "
            f"agreement: greedy tokens (of {settings['free_tokens']}) until the first that differs from dense. "
            "In brackets 95% intervals, paired bootstrap over windows."
        )
        quality = [
            [
                row["name"],
                _interval(row.get("dnll"), "+.4f"),
                _interval(row.get("kl"), ".4f"),
                _number(row.get("mass")),
                _number(row.get("oracle")),
                _number(row.get("error")),
                _interval(row.get("agreed"), ".1f"),
            ]
            for row in rows
            if "nll" in row and row["name"] != DENSE
        ]
        headers = ["configuration", "ΔNLL", "KL", "mass", "oracle", "error", "agreement"]
        found.append(Part("Text", description, headers, quality))
    names = [task for task in tasks.TASKS if task in dense]
    if names:
        description = (
            f"{_counts(cells, names)} prompts of up to {settings['context']} tokens, seed "
            f"{settings['seed']}: share of expected strings in the answer, in per cent, and in brackets the "
            "95% interval of the difference to dense, paired bootstrap over prompts."
        )
        retrieval = [
            [row["name"], *(_score(row, name) for name in names)]
            for row in rows
            if any(name in row for name in names)
        ]
        headers = ["configuration", *(name.replace("_", " ") for name in names)]
        found.append(Part("Retrieval", description, headers, retrieval))
    return found


def markdown(result: dict) -> str:
    """The report in Markdown: the setup and the tables."""
    lines = [
        f"# Quality of {result['model']['name']} under sparse decode",
        "",
        _setting(result),
        "",
    ]
    for part in parts(result):
        lines += [f"**{part.title}**, {part.description}", ""]
        lines += [*tables.markdown(part.headers, part.rows), ""]
    return "\n".join(lines)


def record(result: dict) -> page.Record:
    """The record of the report that other measurements of the model share."""
    lines: dict[str, list[page.Point]] = {}
    for row in summary(result):
        if row["budget"] and "dnll" in row:
            mean, low, high = row["dnll"]
            point = page.Point(x=row["budget"], y=mean, low=low, high=high)
            lines.setdefault(row["family"], []).append(point)
    title = "ΔNLL to dense in nats per token, with 95 % intervals"
    model, shown = result["model"]["name"], parts(result)
    return page.Record(
        title=f"eval: {model}",
        model=model,
        setting=_setting(result),
        tables=[
            page.Table(title=part.title, headers=part.headers, rows=part.rows) for part in shown
        ],
        charts=[page.Chart(title=title, x="token budget", lines=lines)] if lines else [],
        notes=[f"{part.title}: {part.description}" for part in shown],
        values={row["name"]: row for row in summary(result)},
    )


def _counts(cells: dict, names: list[str]) -> str:
    return ", ".join(f"{len(cells[name]['scores'])} {name.replace('_', ' ')}" for name in names)


def _setting(result: dict) -> str:
    environment = Environment.model_validate(result["environment"])
    texts = ", ".join(result["settings"]["texts"])
    device, *versions = environment.compared().items()
    software = ", ".join(f"{name} {version}" for name, version in versions)
    return f"{device[1]}, {software}, {environment.date}. Texts: {texts}."


def _interval(value: tuple[float, float, float] | None, form: str) -> str:
    if value is None:
        return ""
    mean, low, high = (format(x, form) for x in value)
    return f"{mean} [{low}, {high}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _score(row: dict, task: str) -> str:
    if task not in row:
        return ""
    text = f"{100 * row[task]:.1f}"
    if f"d{task}" not in row:
        return text
    _, low, high = row[f"d{task}"]
    return f"{text} [{100 * low:+.1f}, {100 * high:+.1f}]"


def plot(result: dict, path: Path) -> bool:
    """ΔNLL, attention mass and retrieval against the budget; False without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in summary(result) if row["budget"]]
    panels = [
        (title, key)
        for title, key in (
            ("ΔNLL to dense, nats per token", "dnll"),
            ("attention mass kept", "mass"),
            ("retrieval, difference to dense, mean of tasks", "retrieval"),
        )
        if any(_mean(row, key) is not None for row in rows)
    ]
    families = list(dict.fromkeys(row["family"] for row in rows))
    figure, axes = pyplot.subplots(1, max(1, len(panels)), figsize=(5 * max(1, len(panels)), 4))
    for axis, (title, key) in zip([axes] if len(panels) < 2 else axes, panels, strict=False):
        for family in families:
            points = sorted(
                (row["budget"], _mean(row, key), row.get(key))
                for row in rows
                if row["family"] == family and _mean(row, key) is not None
            )
            if not points:
                continue
            x, y, values = zip(*points, strict=True)
            color = pyplot.get_cmap("tab20")(families.index(family) % 20)
            axis.plot(x, y, marker="o", markersize=3, label=family, color=color)
            if key == "dnll":
                low, high = ([v[i] for v in values] for i in (1, 2))
                axis.fill_between(x, low, high, color=color, alpha=0.08)
        if key == "dnll":
            axis.set_yscale("symlog", linthresh=0.03)
        if key != "mass":
            axis.axhline(0, color="grey", linewidth=0.6)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("token budget")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    lines = {}
    for axis in figure.axes:
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, line)
    figure.suptitle(f"{result['model']['name']}, context {result['settings']['context']}")
    figure.legend(lines.values(), lines, loc="lower center", ncols=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06 * -(-len(lines) // 5), 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _retrieval(row: dict) -> float | None:
    values = [row[f"d{task}"][0] for task in tasks.TASKS if f"d{task}" in row]
    return statistics.fmean(values) if values else None


def _mean(row: dict, key: str) -> float | None:
    if key == "retrieval":
        return _retrieval(row)
    value = row.get(key)
    return value[0] if isinstance(value, tuple) else value
