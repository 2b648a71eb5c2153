"""The report of a load test in Markdown and in HTML, from its record alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from vllm_adamas.serving.loadtest.plot import chart, shares
from vllm_adamas.serving.loadtest.reconcile import ATTENDED, CONTEXT
from vllm_adamas.serving.loadtest.record import PERCENTILES, between
from vllm_adamas.tables import markdown

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.2em .6em;"
    "text-align:right}td:first-child,th:first-child,.facts td{text-align:left}svg{margin:.5em}"
)
TIMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "end to end"}
READING = (
    "A ratio compares the same request to both servers, or for throughput the two servers of one repeat. "
    "Above 1 adamas is faster."
)


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    headers: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Plot:
    svg: str


Block = Heading | Paragraph | Table | Plot


def as_markdown(record: Mapping[str, Any]) -> str:
    """The report without its charts."""
    lines: list[str] = []
    for block in blocks(record):
        if isinstance(block, Heading):
            lines += [f"{'##' if lines else '#'} {_inert(block.text)}", ""]
        elif isinstance(block, Paragraph):
            lines += [_inert(block.text), ""]
        elif isinstance(block, Table):
            headers, *rows = ([*map(_inert, row)] for row in (block.headers, *block.rows))
            lines += [*markdown(headers, rows), ""]
    return "\n".join(lines)


def _inert(text: object) -> str:
    """Text without HTML, links and images for Markdown to render: what a server answered may be in it."""
    return escape(str(text), quote=False).replace("](", "]\\(").replace("|", "\\|")


def as_html(record: Mapping[str, Any]) -> str:
    """The report as one file that loads nothing."""
    body: list[str] = []
    for block in blocks(record):
        if isinstance(block, Heading):
            level = 2 if body else 1
            body.append(f"<h{level}>{escape(block.text)}</h{level}>")
        elif isinstance(block, Paragraph):
            body.append(f"<p>{escape(block.text)}</p>")
        elif isinstance(block, Table):
            rows = [_row("td", row) for row in block.rows]
            if any(block.headers):
                body.append(f"<table>{_row('th', block.headers)}{''.join(rows)}</table>")
            else:
                body.append(f'<table class="facts">{"".join(rows)}</table>')
        else:
            body.append(block.svg)
    title = f"Load test: {escape(record['name'])}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style>{''.join(body)}</html>\n"
    )


def _row(tag: str, cells: Sequence[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"


def blocks(record: Mapping[str, Any]) -> Iterator[Block]:
    """The parts of the report, in their order."""
    scenario = record["scenario"]
    yield Heading(f"Load test: {record['name']}")
    yield Paragraph(scenario["description"])
    yield Table(["", ""], list(_facts(record)))
    if record["problems"]:
        yield Heading("Problems")
        yield Table(["problem"], [[problem] for problem in record["problems"]])
    if record["backends"]:
        yield Heading("Results")
        yield Table(["", *record["backends"]], list(_results(record)))
        if record["ratios"]:
            yield Heading("Ratios")
            yield ratios(record)
            yield Paragraph(READING)
        yield from _plots(record)
    storms = [run for run in record["runs"] if "storm" in run]
    if storms:
        yield Heading("Soak")
        headers = ["backend", "repeat", "requests", "errors", "restarts", "wrong tokens"]
        headers += ["compared", "TTFT p50 / p99 ms", "ITL p50 / p99 ms", "RSS grew by MiB"]
        yield Table(headers, [_storm(run) for run in storms])
    yield Heading("Counters")
    yield Table(
        ["backend", "repeat", "counter", "expected", "counted", ""], list(_counters(record))
    )
    for run in record["runs"]:
        for remark in run["remarks"]:
            yield Paragraph(f"{run['backend']}, repeat {run['repeat']}: {remark}.")


def _facts(record: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    scenario, here = record["scenario"], record["environment"]
    yield "outcome", "all is well" if record["ok"] else f"{len(record['problems'])} problems"
    yield "model", record["model"]
    yield "host", here.get("gpu") or f"{here['cpu']}, {here['cores']} cores"
    yield "versions", ", ".join(f"{name} {value}" for name, value in here["versions"].items())
    yield "date", here["date"]
    yield "order of servers", ", ".join(run["backend"] for run in record["runs"])
    yield "options of adamas", json.dumps(record["options"])
    yield "arguments of both servers", " ".join(scenario["server_args"]) or "none"
    if record["client"] == "aiperf":
        yield "client", record["client"]
    yield "scale, load", f"{record['scale']:g}, {record['load']:g}"
    traffic = {name: value for name, value in scenario["traffic"].items() if value is not None}
    yield "traffic", ", ".join(f"{name} {json.dumps(value)}" for name, value in traffic.items())
    goals = [f"{name} {limit:g}" for name, limit in scenario["slo"].items() if limit is not None]
    yield "objectives", ", ".join(goals) or "none"


def _results(record: Mapping[str, Any]) -> Iterator[list[object]]:
    backends = record["backends"].values()
    yield ["requests", *(one["requests"] for one in backends)]
    yield ["errors", *(one["errors"] for one in backends)]
    yield ["seconds of traffic", *(f"{one['seconds']:.1f}" for one in backends)]
    yield ["requests per second", *(f"{one['requests_per_s']:.3f}" for one in backends)]
    tokens = (one["output_tokens_per_s"]["median"] for one in backends)
    yield ["output tokens per second", *(f"{median:.1f}" for median in tokens)]
    if any(record["scenario"]["slo"].values()):
        shares = (100 * one["good"] / one["requests"] for one in backends)
        yield ["requests within objectives", *(f"{share:.0f} %" for share in shares)]
        yield ["goodput, requests per second", *(f"{one['good_per_s']:.3f}" for one in backends)]
    for name, label in TIMES.items():
        for percentile in PERCENTILES:
            times = (one[f"{name}_ms"].get(percentile) for one in backends)
            yield [f"{label} {percentile} ms", *map(_time, times)]


def _time(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:,.1f}"


def ratios(record: Mapping[str, Any]) -> Table:
    """stock / adamas of latencies, adamas / stock of throughput."""
    rows = [
        [
            TIMES.get(name, "output tokens per second"),
            *(f"{found[key]:.2f}" for key in ("median", "q1", "q3")),
            f"{found['n']:g}",
        ]
        for name, found in record["ratios"].items()
    ]
    return Table(["ratio", "median", "q1", "q3", "pairs"], rows)


def _plots(record: Mapping[str, Any]) -> Iterator[Plot]:
    at = {name: place for place, name in enumerate(record["columns"])}
    answered: dict[str, list[list]] = {name: [] for name in record["backends"]}
    for run in record["runs"]:
        answered[run["backend"]] += [one for one in run["requests"] if one[at["error"]] is None]

    def column(name: str) -> dict[str, list[float]]:
        found = {
            backend: [one[at[name]] for one in rows if one[at[name]] is not None]
            for backend, rows in answered.items()
        }
        return {backend: values for backend, values in found.items() if values}

    points = {
        backend: [
            (one[at["prompt_tokens"]], one[at["tpot_ms"]])
            for one in rows
            if one[at["tpot_ms"]] is not None
        ]
        for backend, rows in answered.items()
    }
    if points := {backend: found for backend, found in points.items() if found}:
        yield Plot(chart("TPOT by prompt", "tokens of the prompt", "TPOT, ms", points))
    for name in ("ttft", "tpot"):
        if found := column(f"{name}_ms"):
            curves = {backend: shares(values) for backend, values in found.items()}
            label, axis = f"{TIMES[name]} of requests", f"{TIMES[name]}, ms"
            yield Plot(chart(label, axis, "requests up to there, %", curves, line=True))


def _storm(run: Mapping[str, Any]) -> list[object]:
    storm = run["storm"]
    checks, memory = storm["checks"].values(), storm["memory_mib"]
    grown = "" if len(memory) < 2 else f"{memory['end']['rss'] - memory['warm']['rss']:.0f}"
    times = (
        f"{_time(t.get('p50'))} / {_time(t.get('p99'))}"
        for t in (storm["ttft_ms"], storm["itl_ms"])
    )
    return [
        run["backend"],
        run["repeat"],
        sum(storm["requests"].values()),
        sum(sum(kinds.values()) for kinds in storm["errors"].values()),
        storm["restarts"],
        sum(check["wrong"] for check in checks),
        sum(check["compared"] for check in checks),
        *times,
        grown,
    ]


def _counters(record: Mapping[str, Any]) -> Iterator[list[object]]:
    for run in record["runs"]:
        where, moved = [run["backend"], run["repeat"]], run["counters"]
        known = {row["counter"]: row for row in run["reconciled"]}
        for name, value in moved.items():
            row = known.get(name)
            expected, verdict = "", ""
            if row:
                expected, verdict = between(row), "agrees" if row["agrees"] else "DIFFERS"
            yield [*where, name, expected, f"{value:,.0f}", verdict]
        if moved.get(CONTEXT):
            yield [*where, "attended / context", "", f"{moved[ATTENDED] / moved[CONTEXT]:.3f}", ""]
