"""Writes the tables and the plot of docs/kernels.md from benchmarks/results/decode_gpu.json.

    python benchmarks/update_kernels.py [--check]

With --check nothing is written; the exit status is 1 when the document differs from the results.
"""

from __future__ import annotations

import sys

from common import RESULTS, load, update_document
from peers import PEERS

from vllm_adamas.environment import Environment
from vllm_adamas.tables import markdown

DOCUMENT = RESULTS.parent.parent / "docs" / "kernels.md"
PLOT = RESULTS / "decode_gpu.png"
SELECTIONS = ("query_head", "kv_head")
BASELINE, *OTHERS = PEERS.values()
DENSE_US = f"{BASELINE.heading} µs"


def tokens(n: int) -> str:
    return f"{n // 1024}K" if n < 1 << 20 else f"{n >> 20}M"


def used(cell: dict, name: str) -> dict:
    return cell[name][cell[name]["runs"]]


def timing(cell: dict, name: str) -> str:
    """Microseconds, speed-up, and which kernels ran."""
    one = used(cell, name)
    how = f", clusters of {one['cluster']}" if "cluster" in one else ""
    speedup = f" **{one['speedup']:.2f}x**" if "speedup" in one else ""
    return f"{one['us']:.1f}{speedup}{how}"


def table(headers: list[str], rows: list[list]) -> list[str]:
    return [*markdown(headers, rows), ""]


def cells(result: dict) -> list[str]:
    rows = []
    for cell in result["cells"]:
        three = cell["dot query_head"]["three"]
        rows.append(
            [
                f"{tokens(cell['context'])} x {cell['rows']}",
                cell[BASELINE.name]["us"],
                timing(cell, "dot query_head"),
                timing(cell, "dot kv_head"),
                timing(cell, "manhattan query_head"),
                timing(cell, "manhattan kv_head"),
                f"{cell['read']['us']:.1f} ({cell['read']['GBps']})",
                f"{three['encode_us']} / {three['scan_us']} ({cell['read']['us'] / three['scan_us']:.0%}) / "
                f"{three['attend_us']}",
            ]
        )
    headers = [
        "context x rows",
        DENSE_US,
        "dot, set per query head",
        "dot, per KV head",
        "manhattan, per query head",
        "manhattan, per KV head",
        "reading signatures µs (GB/s)",
        "encode / scan (reading / scan) / attend µs, dot per query head",
    ]
    return table(headers, rows)


def peers(result: dict) -> list[str]:
    """All measured dense kernels, with their times as multiples of the baseline's."""
    found = [peer for peer in OTHERS if any(peer.name in cell for cell in result["cells"])]
    rows = []
    for cell in result["cells"]:
        row = [f"{tokens(cell['context'])} x {cell['rows']}", cell[BASELINE.name]["us"]]
        for peer in found:
            us = cell.get(peer.name, {}).get("us")
            row.append(f"{us} ({us / cell['fa3']['us']:.2f})" if us else "-")
        rows.append(row)
    return table(["context x rows", DENSE_US, *(f"{peer.heading} µs" for peer in found)], rows)


def both_kernels(result: dict) -> list[str]:
    rows = []
    for cell in result["cells"]:
        for selection in SELECTIONS:
            one = cell[f"dot {selection}"]
            if "fused" in one:
                fused, three = one["fused"], one["three"]
                name = f"{tokens(cell['context'])} x {cell['rows']}"
                taken = "one" if one["runs"] == "fused" else "three"
                rows.append([name, selection, fused["cluster"], fused["us"], three["us"], taken])
    headers = ["context x rows", "set per", "cluster", "one kernel µs", "three kernels µs", "taken"]
    return table(headers, rows)


def part(result: dict, name: str, with_budget: bool) -> list[str]:
    rows = []
    for cell in result[name]:
        shape = f"{tokens(cell['context'])} x {cell['rows']}"
        start = [shape, cell["budget"]] if with_budget else [shape]
        dense = cell.get(BASELINE.name, {}).get("us", "-")
        rows.append([*start, dense, *(timing(cell, f"dot {s}") for s in SELECTIONS)])
    headers = ["context x rows", *(["budget"] if with_budget else [])]
    return table([*headers, DENSE_US, "set per query head", "set per KV head"], rows)


def render(result: dict, environment: Environment) -> list[str]:
    versions = environment.versions
    lines = [
        f"One run: {environment.gpu}, driver {environment.driver}, CUDA {environment.cuda}, "
        f"torch {versions['torch']}, vLLM {versions.get('vllm', '-')}. Microseconds of a decode step of one layer, speed-up over {BASELINE.title}.",
        "",
        *cells(result),
        f"Dense decode kernels over one cache, µs (as a multiple of {BASELINE.title}):",
        "",
        *peers(result),
        "Where both forms of a step can run:",
        "",
        *both_kernels(result),
    ]
    titles = {
        "budgets": "Token budgets, dot:",
        "contexts": "Other contexts, one row, dot:",
        "mha": "Multi-head attention (32 query and 32 KV heads), one row, dot:",
        "fp8": "e4m3 pages, dot:",
    }
    for name, title in titles.items():
        if name in result:
            lines += [title, "", *part(result, name, with_budget=name == "budgets")]
    return [
        *lines,
        f"![time and speed-up against context length](../benchmarks/results/{PLOT.name})",
    ]


def plot(result: dict) -> None:
    """Plots the time of one row and the speed-up of 1, 8 and 32 rows over the context length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = sorted(result["cells"] + result.get("contexts", []), key=lambda c: c["context"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    one = [cell for cell in measured if cell["rows"] == 1]
    lengths = [cell["context"] for cell in one]
    left.loglog(lengths, [cell[BASELINE.name]["us"] for cell in one], "k.-", label=BASELINE.title)
    for selection in SELECTIONS:
        times = [used(cell, f"dot {selection}")["us"] for cell in one]
        left.loglog(lengths, times, ".-", label=f"one set per {selection}")
    left.set(title="one row", ylabel="µs of a decode step of one layer")
    left.legend()
    for rows in sorted({cell["rows"] for cell in measured}):
        these = [cell for cell in measured if cell["rows"] == rows]
        ratios = [used(cell, "dot kv_head")["speedup"] for cell in these]
        right.semilogx([cell["context"] for cell in these], ratios, ".-", label=f"{rows} rows")
    right.set(title="speed-up, one set per kv_head", ylim=(0, None))
    right.legend()
    ticks = [1 << n for n in range(12, 21, 2)]
    for axes in (left, right):
        axes.set_xticks(ticks, [tokens(n) for n in ticks], minor=False)
        axes.set_xlabel("context length (tokens)")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.savefig(PLOT, dpi=140)


if __name__ == "__main__":
    record, environment = load("decode_gpu")
    if "--check" not in sys.argv:
        plot(record)
    sys.exit(update_document(DOCUMENT, "update_kernels", render(record, environment)))
