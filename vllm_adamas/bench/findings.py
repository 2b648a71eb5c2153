"""What the times show: the record of the report."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_adamas.bench.results import ATTENTION, DENSE, ENGINES, TPOT
from vllm_adamas.doctor.crossover import faster_from, gain, quartiles
from vllm_adamas.environment import Environment
from vllm_adamas.identity import Heads
from vllm_adamas.page import Chart, Point, Record, Table


@dataclass(frozen=True)
class Cell:
    """Times of the same rounds under both backends.

    Args:
        dense, adamas: by round, in one unit.
    """

    configuration: str
    context: int
    batch: int
    dense: list[float]
    adamas: list[float]

    @property
    def gain(self) -> tuple[float, float, float]:
        """Dense over adamas, round by round: lower quartile, median, upper quartile."""
        return gain(self.dense, self.adamas)


def record(data: dict[str, Any]) -> Record:
    """The record of bench.json's content."""
    parts = {ATTENTION: attention(data), TPOT: tpot(data)}
    titles = {
        ATTENTION: "Attention of one layer, microseconds of a decode step",
        TPOT: "End to end, TPOT in milliseconds",
    }
    charts = [
        Chart(
            title=f"{titles[part].partition(',')[0]}: time of dense over that of adamas, with quartiles",
            x="tokens of a context",
            lines=_lines(cells),
            base=1.0,
        )
        for part, cells in parts.items()
        if cells
    ]
    return Record(
        title=f"bench: {data['settings']['model']}",
        model=data["settings"]["model"],
        setting=_setting(data),
        findings=[
            sentence
            for part, cells in parts.items()
            for sentence in _verdicts(titles[part].partition(",")[0], cells)
        ],
        tables=[_table(titles[part], cells) for part, cells in parts.items() if cells],
        charts=charts,
        notes=list(_notes(data)),
        values={
            part: [
                {
                    "configuration": cell.configuration,
                    "context": cell.context,
                    "batch": cell.batch,
                    "dense": quartiles(cell.dense),
                    "adamas": quartiles(cell.adamas),
                    "ratio": cell.gain,
                }
                for cell in cells
            ]
            for part, cells in parts.items()
        },
    )


def attention(data: dict[str, Any]) -> list[Cell]:
    """The cells of a layer, in microseconds."""
    return _ordered(
        Cell(
            entry["configuration"],
            entry["context"],
            entry["batch"],
            entry["dense_us"],
            entry["adamas_us"],
        )
        for entry in data[ATTENTION]
        if "left out" not in entry
    )


def tpot(data: dict[str, Any]) -> list[Cell]:
    """The cells of engines, in milliseconds: the rounds of all repeats that both backends have."""
    found: dict[tuple, dict[int, list[float]]] = {}
    for entry in data[TPOT]:
        if "left out" not in entry:
            key = entry["configuration"], entry["context"], entry["batch"]
            found.setdefault(key, {})[entry["repeat"]] = [
                statistics.fmean(steps) for steps in entry["steps_ms"]
            ]
    cells = []
    for (name, context, batch), ours in found.items():
        theirs = found.get((DENSE, context, batch), {})
        both = sorted(ours.keys() & theirs.keys())
        if name != DENSE and both:
            dense, adamas = ([t for n in both for t in some[n]] for some in (theirs, ours))
            cells.append(Cell(name, context, batch, dense, adamas))
    return _ordered(cells)


def _ordered(cells) -> list[Cell]:
    return sorted(cells, key=lambda cell: (cell.batch, cell.context))


def _setting(data: dict[str, Any]) -> str:
    settings, layer = data["settings"], data["layer"]
    environment = Environment.model_validate(data["environment"])
    device, *versions = environment.compared().values()
    names = list(environment.compared())[1:]
    software = ", ".join(f"{name} {version}" for name, version in zip(names, versions, strict=True))
    heads = Heads(*layer["heads"])
    return (
        f"{device}, {software}, {environment.date}. {heads.query} query heads, {heads.kv} KV heads, head size "
        f"{heads.size}, {layer['dtype']}, KV cache {settings['kv_cache_dtype']}, at most {layer['max_model_len']:,} "
        "tokens."
    )


def _table(title: str, cells: list[Cell]) -> Table:
    names = list(dict.fromkeys(cell.configuration for cell in cells))
    rows = []
    for context, batch in dict.fromkeys((cell.context, cell.batch) for cell in cells):
        here = {c.configuration: c for c in cells if (c.context, c.batch) == (context, batch)}
        dense = [time for cell in here.values() for time in cell.dense]
        row = [f"{context:,} x {batch}", _spread(quartiles(dense), ",.2f")]
        for name in names:
            cell = here.get(name)
            row += [_spread(quartiles(cell.adamas), ",.2f"), _ratio(cell)] if cell else ["", ""]
        rows.append(row)
    headers = ["context x requests", "dense", *(h for name in names for h in (name, "ratio"))]
    return Table(title=title, headers=headers, rows=rows)


def _spread(values: tuple[float, float, float], form: str) -> str:
    low, middle, high = (format(value, form) for value in values)
    return f"{middle} [{low}, {high}]"


def _ratio(cell: Cell) -> str:
    low, middle, high = cell.gain
    return f"{middle:.2f}x [{low:.2f}, {high:.2f}]"


def _groups(cells: list[Cell]) -> Iterator[tuple[str, int, list[Cell]]]:
    """Cells of one configuration and batch, by their context."""
    for name, batch in dict.fromkeys((cell.configuration, cell.batch) for cell in cells):
        yield name, batch, [c for c in cells if (c.configuration, c.batch) == (name, batch)]


def _requests(batch: int) -> str:
    return "1 request" if batch == 1 else f"{batch} requests"


def _lines(cells: list[Cell]) -> dict[str, list[Point]]:
    lines = {}
    for name, batch, some in _groups(cells):
        gains = [(cell.context, *cell.gain) for cell in some]
        lines[f"{name}, {_requests(batch)}"] = [
            Point(x=context, y=middle, low=low, high=high) for context, low, middle, high in gains
        ]
    return lines


def _verdicts(part: str, cells: list[Cell]) -> Iterator[str]:
    for name, batch, some in _groups(cells):
        start = faster_from([(cell.context, cell.gain[0]) for cell in some])
        last = some[-1]
        who = f"{part}, {_requests(batch)}: {name}"
        at = f"{_ratio(last)} at {last.context:,}"
        if start is None:
            yield f"{who} is not shown to be faster than dense at the longest context ({at} tokens)."
        else:
            yield f"{who} is faster than dense from {start:,} tokens on ({at})."


def _notes(data: dict[str, Any]) -> Iterator[str]:
    settings, layer, engines = data["settings"], data["layer"], data[ENGINES]
    yield (
        "A ratio is dense over adamas, round by round, and above 1 adamas is faster. Times and ratios are medians, in "
        "brackets their quartiles. A context counts as faster if the lower quartile is above 1."
    )
    if "kernels" in layer:
        yield (
            f"Attention: {layer['kernels']} beside {layer['attention']}, in turns, with random keys, of a layer without "
            f"a budget of its own. It is not end to end, where a token also takes the weights.{_threads(layer)}"
        )
    for entry in engines:
        yield (
            f"Engine {entry['repeat']} of {entry['configuration']}: {entry['attention']}, a KV cache of "
            f"{entry['capacity']:,} tokens.{_threads(entry)}"
        )
    if len({one.get("threads") for one in (layer, *engines)} - {None}) > 1:
        yield (
            "Attention and engines ran with different numbers of threads: set OMP_NUM_THREADS to that of the engines."
        )
    if engines:
        yield (
            f"End to end: answers of {settings['output_len']} tokens to prompts of random tokens that are cached, all of "
            "a cell's requests decoding together. A context counts a prompt with its answer. TPOT is the mean of a "
            "round's steps; the engine runs without HTTP."
        )
    if settings["load_format"] == "dummy":
        yield "The weights are random: times of dense models do not depend on them."
    left_out: dict[tuple[str, str], None] = {}
    for part in (ATTENTION, TPOT):
        for entry in data[part]:
            if "left out" in entry:
                what = f"{entry['context']:,} tokens x {entry['batch']}, {entry['configuration']}"
                left_out[f"{part}, {what}", entry["left out"]] = None
    for what, why in left_out:
        yield f"Left out: {what}, because {why}."


def _threads(told: dict[str, Any]) -> str:
    threads = told.get("threads")
    return f" Threads: {threads}." if threads else ""
