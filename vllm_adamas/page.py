"""A report of measurements: records as JSON, and the same as one HTML page that needs no other file.

A command puts its record into a folder with :func:`put`. Records of others stay, so the measurements of a model come
together on one page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_adamas import tables
from vllm_adamas.errors import AdamasError

FORMAT, VERSION = "vllm-adamas-report", 1
NAME = "report"  #: of the two files


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Table(_Part):
    """Cells are text; the first column names the row."""

    title: str
    headers: list[str]
    rows: list[list[str]]


class Point(_Part):
    """A measurement and its interval."""

    x: float
    y: float
    low: float
    high: float


class Chart(_Part):
    """Lines through points by name, over a logarithmic axis of ``x > 0``.

    Args:
        base: the height of nothing gained and nothing lost, which is in the chart and stands out.
    """

    title: str
    x: str
    lines: dict[str, list[Point]]
    base: float = 0.0


class Record(_Part):
    """One measurement.

    Args:
        title: unique in a report.
        model: that was measured; a report is about one.
        setting: what was measured, on what and when.
        findings: the sentences to read first.
        notes: how to read the tables, and what is left out.
        values: the figures of the tables, unrounded.
    """

    title: str
    model: str
    setting: str
    findings: list[str] = []
    tables: list[Table] = []
    charts: list[Chart] = []
    notes: list[str] = []
    values: dict[str, Any] = {}


def load(path: Path) -> list[Record]:
    """The records of a report's JSON file.

    Raises:
        AdamasError: the file is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (data["format"], data["version"]) == (FORMAT, VERSION):
            return [Record.model_validate(record) for record in data["records"]]
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        pass
    raise AdamasError(f"{path} is not a report of this release: give another --output.")


def held(folder: Path, model: str) -> dict[str, Record]:
    """The records of a folder by title.

    Raises:
        AdamasError: its report.json is something else, or about another model.
    """
    path = folder / f"{NAME}.json"
    records = {record.title: record for record in load(path)} if path.exists() else {}
    for record in records.values():
        if record.model != model:
            raise AdamasError(
                f"{path} is about {record.model} and not about {model}: give another --output."
            )
    return records


def put(record: Record, folder: Path) -> Path:
    """Writes report.json and report.html with the folder's records and this one, which replaces that of its title.

    Returns:
        The path of the page.

    Raises:
        AdamasError: as :func:`held` does.
    """
    every = held(folder, record.model) | {record.title: record}
    data = [one.model_dump() for one in every.values()]
    text = json.dumps({"format": FORMAT, "version": VERSION, "records": data}, indent=1) + "\n"
    page = folder / f"{NAME}.html"
    write_whole(page.with_suffix(".json"), text)
    write_whole(page, html(list(every.values())))
    return page


def write_whole(path: Path, text: str) -> None:
    """Writes a file in a folder that is made if it is not there; a killed command leaves the file of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def text(record: Record) -> list[str]:
    """Lines of a record for a terminal."""
    lines = [record.title, record.setting]
    for table in record.tables:
        lines += ["", table.title, tables.plain(table.headers, table.rows)]
    return [*lines, "", *record.notes, *record.findings]


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1.5rem; }
.setting, figcaption, .notes { color: #555; }
.findings { font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .4rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #888; }
figure { margin: 1rem 0; }
svg text { font: 13px system-ui, sans-serif; fill: #333; }
"""


def html(records: Sequence[Record]) -> str:
    """The page of these records."""
    body = "\n".join(map(_section, records))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n<title>vllm-adamas: report</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>vllm-adamas: report</h1>\n{body}\n</body>\n</html>\n"
    )


def _section(record: Record) -> str:
    parts = [f"<h2>{escape(record.title)}</h2>", f'<p class="setting">{escape(record.setting)}</p>']
    parts += [f'<p class="findings">{escape(text)}</p>' for text in record.findings]
    parts += map(_chart, record.charts)
    parts += map(_table, record.tables)
    if record.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in record.notes)
        parts.append(f'<ul class="notes">{items}</ul>')
    return f"<section>\n{chr(10).join(parts)}\n</section>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in table.headers)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in table.rows
    )
    return (
        f'<div class="scroll"><table>\n<caption>{escape(table.title)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 60, 170, 15, 50  # pixels
COLORS = ("#0b62a4", "#c8501e", "#2f7d32", "#7b3fa0", "#8a6d00", "#00778a")


def _chart(chart: Chart) -> str:
    points = [point for line in chart.lines.values() for point in line]
    low = min(chart.base, *(p.low for p in points))
    high = max(chart.base, *(p.high for p in points))
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin
    first, last = (math.log2(choose(p.x for p in points)) for choose in (min, max))

    def at(x: float, y: float) -> tuple[float, float]:
        share = (math.log2(x) - first) / (last - first) if last > first else 0.5
        inner = 0.04 + 0.92 * share
        return (
            round(LEFT + inner * (WIDTH - LEFT - RIGHT), 1),
            round(TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM), 1),
        )

    drawn = []
    for y in sorted({*_ticks(low, high), chart.base}):
        _, down = at(points[0].x, y)
        color = "#888" if y == chart.base else "#e4e4e4"
        drawn.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}" stroke="{color}"/>'
            f'<text x="{LEFT - 8}" y="{down + 4}" text-anchor="end">{y:g}</text>'
        )
    for x in sorted({point.x for point in points}):
        along, _ = at(x, 0)
        drawn.append(
            f'<text x="{along}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{x:g}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    drawn.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(chart.x)}</text>'
    )
    for number, (name, line) in enumerate(chart.lines.items()):
        color, shift = COLORS[number % len(COLORS)], 4 * number
        places = [(p, at(p.x, p.y)) for p in sorted(line, key=lambda p: p.x)]
        track = " ".join(f"{x + shift},{y}" for _, (x, y) in places)
        drawn.append(f'<polyline points="{track}" fill="none" stroke="{color}" stroke-width="2"/>')
        for point, (x, y) in places:
            (_, bottom), (_, top) = at(point.x, point.low), at(point.x, point.high)
            drawn.append(
                f'<line x1="{x + shift}" x2="{x + shift}" y1="{top}" y2="{bottom}" stroke="{color}"/>'
                f'<circle cx="{x + shift}" cy="{y}" r="4" fill="{color}"/>'
            )
        height = TOP + 20 * (number + 1)
        drawn.append(
            f'<circle cx="{WIDTH - RIGHT + 20}" cy="{height - 4}" r="4" fill="{color}"/>'
            f'<text x="{WIDTH - RIGHT + 32}" y="{height}">{escape(name)}</text>'
        )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(chart.title)}">{"".join(drawn)}</svg>'
        f"<figcaption>{escape(chart.title)}</figcaption></figure>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round values between two bounds, about five; zero is one of them if it lies there."""
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
