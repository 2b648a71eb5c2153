"""Writes the tables and the plot of docs/kernels.md from the records of the GPU benchmarks of kernels.

    python benchmarks/update_kernels.py [--check]

With --check nothing is written; the exit status is 1 when the document differs from the results.
"""

from __future__ import annotations

import sys

import bench_drafts_gpu
import bench_targets_gpu
from peers import PEERS
from records import RESULTS, load, update_document

from vllm_adamas.environment import Environment
from vllm_adamas.tables import markdown

DOCUMENT = RESULTS.parent.parent / "docs" / "kernels.md"
PLOT = RESULTS / "decode_gpu.png"
#: How a token set is chosen, as the tables name it.
WAYS = {
    "query_head": "per query head",
    "kv_head": "per KV head, sum",
    "max": "per KV head, maximum",
}
NAMES = {
    f"{score} {way}": f"{score}, {name}"
    for score in ("dot", "manhattan")
    for way, name in WAYS.items()
}
BASELINE, *OTHERS = PEERS.values()
DENSE_US = f"{BASELINE.heading} µs"
#: What cells have in common whose times are compared over keys.
SHAPE = ("heads", "context", "rows", "budget")
HEADLINE_KEYS = ("gaussian", "real")  #: the worse of these is shown


def tokens(n: int) -> str:
    return f"{n // 1024}K" if n < 1 << 20 else f"{n >> 20}M"


def names(cells: list[dict], score: str = "") -> list[str]:
    """The keys of ``NAMES`` that all of the cells have."""
    return [name for name in NAMES if name.startswith(score) and all(name in c for c in cells)]


def headline(result: dict) -> str:
    """The way of choosing that is the default, or the nearest one that the record has."""
    return names(result["cells"], "dot")[-1]


def used(cell: dict, name: str) -> dict:
    """The result of the kernels that the policy chose."""
    return cell[name][cell[name]["runs"]]


def served(cells: list[dict]) -> list[dict]:
    """Cells over Gaussian keys as a server launches them: of each shape the one with the longest launch."""
    longest: dict[tuple, int] = {}
    for cell in cells:
        shape = tuple(cell[key] for key in SHAPE)
        longest[shape] = max(cell["launch"], longest.get(shape, 0))
    return [
        cell
        for cell in cells
        if cell["keys"] == "gaussian"
        and cell["launch"] == longest[tuple(cell[key] for key in SHAPE)]
    ]


def over_keys(result: dict, part: str, cell: dict) -> dict[str, dict]:
    """The cells of a part with the shape and launch of ``cell``, by their keys."""
    cells = result[part] + (result.get("keys", []) if part == "cells" else [])
    same = (*SHAPE, "launch")
    return {one["keys"]: one for one in cells if all(one[key] == cell[key] for key in same)}


def worse(result: dict, part: str, cell: dict, name: str) -> dict:
    """Of the cells of this shape over ``HEADLINE_KEYS`` the slower one."""
    found = over_keys(result, part, cell)
    measured = [found[keys] for keys in HEADLINE_KEYS if name in found.get(keys, ())]
    return max(measured, key=lambda one: used(one, name)["us"])


def place(cell: dict) -> str:
    return f"{tokens(cell['context'])} x {cell['rows']}"


def form(fused: dict) -> str:
    """Blocks of a cluster of the fused kernel, and warps of a block."""
    return f"{fused['cluster']}x{fused['warps']}"


def timing(cell: dict, name: str) -> str:
    """Microseconds, speed-up, and which kernels ran."""
    one = used(cell, name)
    how = f", {form(one)}" if "cluster" in one else ""
    speedup = f" **{one['speedup']:.2f}x**" if "speedup" in one else ""
    return f"{one['us']:.1f}{speedup}{how}"


def table(headers: list[str], rows: list[list]) -> list[str]:
    return [*markdown(headers, rows), ""]


def cells(result: dict) -> list[str]:
    rows, measured = [], names(result["cells"])
    for cell in served(result["cells"]):
        three = cell["dot query_head"]["three"]
        rows.append(
            [
                place(cell),
                cell[BASELINE.name]["us"],
                *(timing(worse(result, "cells", cell, name), name) for name in measured),
                f"{cell['read']['us']:.1f} ({cell['read']['GBps']})",
                f"{three['encode_us']} / {three['scan_us']} ({cell['read']['us'] / three['scan_us']:.0%}) / "
                f"{three['attend_us']}",
            ]
        )
    headers = [
        "context x rows",
        DENSE_US,
        *map(NAMES.get, measured),
        "reading signatures µs (GB/s)",
        "encode / scan (reading / scan) / attend µs, dot per query head",
    ]
    return table(headers, rows)


def peers(result: dict) -> list[str]:
    """All measured dense kernels, with their times as multiples of the baseline's."""
    measured = served(result["cells"])
    found = [peer for peer in OTHERS if any(peer.name in cell for cell in measured)]
    rows = []
    for cell in measured:
        row = [place(cell), cell[BASELINE.name]["us"]]
        for peer in found:
            us = cell.get(peer.name, {}).get("us")
            row.append(f"{us} ({us / cell['fa3']['us']:.2f})" if us else "-")
        rows.append(row)
    return table(["context x rows", DENSE_US, *(f"{peer.heading} µs" for peer in found)], rows)


def distributions(result: dict, name: str) -> list[str]:
    """Each cell over all keys, with the share of token sets that were selected again, and launched exactly."""
    shapes = [(cell, over_keys(result, "cells", cell)) for cell in served(result["cells"])]
    keys = list(dict.fromkeys(keys for _, found in shapes for keys in found))
    rows = []
    for cell, found in shapes:
        row = [place(cell), cell[BASELINE.name]["us"]]
        for one in map(found.get, keys):
            again = used(one, name)["again"] if one else 0
            row.append((timing(one, name) if one else "-") + (f" ({again:.1%})" if again else ""))
        exact = next((one for one in result["cells"] if is_exact(one, cell)), None)
        rows.append([*row, timing(exact, name) if exact else "-"])
    return table(["context x rows", DENSE_US, *keys, "gaussian, launched exactly"], rows)


def is_exact(one: dict, cell: dict) -> bool:
    """Whether ``one`` is the cell of this shape that was launched for exactly its context."""
    same = all(one[key] == cell[key] for key in (*SHAPE, "keys"))
    return same and one["launch"] == one["context"]


def both_kernels(result: dict) -> list[str]:
    rows = []
    for cell in served(result["cells"]):
        for name in names(result["cells"], "dot"):
            one = cell[name]
            if "fused" in one:
                fused, three = one["fused"], one["three"]
                taken = "one" if one["runs"] == "fused" else "three"
                rows.append(
                    [place(cell), NAMES[name], form(fused), fused["us"], three["us"], taken]
                )
    headers = ["context x rows", "set", "form", "one kernel µs", "three kernels µs", "taken"]
    return table(headers, rows)


def part(result: dict, name: str) -> list[str]:
    """A part's cells, with the column that tells them apart besides the context and the rows."""
    column = {"budgets": "budget", "large_budgets": "budget", "heads": "heads"}.get(name)
    rows, measured = [], names(result[name], "dot")
    for cell in served(result[name]):
        start = [place(cell), cell[column]] if column else [place(cell)]
        dense = cell.get(BASELINE.name, {}).get("us", "-")
        times = [timing(worse(result, name, cell, one), one) for one in measured]
        rows.append([*start, dense, *times])
    headers = ["context x rows", *([column] if column else [])]
    return table([*headers, DENSE_US, *map(NAMES.get, measured)], rows)


def conditions(result: dict) -> list[str]:
    """How steps were launched and over which keys, unless they were launched exactly over Gaussian ones."""
    measured = [cell for cells in result.values() if isinstance(cells, list) for cell in cells]
    launches = sorted({c["launch"] for c in measured if c["launch"] > c["context"]})
    lines = []
    if launches:
        lines.append(f"Steps were launched for {' or '.join(f'{n:,}' for n in launches)} tokens.")
    if any(cell["keys"] == "real" for cell in measured):
        lines.append(
            "Times are the slower ones of Gaussian and real keys, where both were measured."
        )
    return [" ".join(lines), ""] if lines else []


def over_all_keys(result: dict) -> list[str]:
    """The tables of :func:`distributions`, if the record has more than one."""
    if "keys" not in result:
        return []
    lines = []
    for name in reversed(names(result["keys"], "dot")):
        lines += [
            f"Over all keys, {NAMES[name]} (share of token sets that were selected again):",
            "",
        ]
        lines += distributions(result, name)
    return lines


def render(result: dict, environment: Environment) -> list[str]:
    versions = environment.versions
    lines = [
        f"One run: {environment.gpu}, driver {environment.driver}, CUDA {environment.cuda}, "
        f"torch {versions['torch']}, vLLM {versions.get('vllm', '-')}. Microseconds of a decode step of one layer, speed-up over {BASELINE.title}. After a time, 8x16 is the one kernel in clusters of "
        "8 blocks of 16 warps; other times are those of the three kernels.",
        "",
        *conditions(result),
        *cells(result),
        *over_all_keys(result),
        f"Dense decode kernels over one cache, µs (as a multiple of {BASELINE.title}):",
        "",
        *peers(result),
        "Where both forms of a step can run:",
        "",
        *both_kernels(result),
    ]
    titles = {
        "budgets": "Token budgets, dot:",
        "large_budgets": "Large token budgets in the other cells, dot:",
        "contexts": "Other contexts, one row, dot:",
        "heads": "Other layers (query heads x KV heads x head size), dot:",
        "mha": "Multi-head attention (32 query and 32 KV heads), one row, dot:",
        "fp8": "e4m3 pages, dot:",
    }
    for name, title in titles.items():
        if name in result:
            lines += [title, "", *part(result, name)]
    return [
        *lines,
        f"![time and speed-up against context length](../benchmarks/results/{PLOT.name})",
    ]


def layers(result: dict) -> list[str]:
    """What a step takes between the other kernels of a layer, and alone in brackets."""
    wanted = [BASELINE.name, *(f"dot {way}" for way in WAYS if f"dot {way}" in result["cells"][0])]
    rows = []
    for cell in result["cells"]:
        row = [place(cell), cell["keys"]]
        for name in wanted:
            one = cell[name]
            speedup = f" **{one['speedup']:.2f}x**" if "speedup" in one else ""
            row.append(f"{one['us']:.1f} ({one['alone_us']:.1f}){speedup}")
        rows.append(row)
    return table(["context x rows", "keys", DENSE_US, *map(NAMES.get, wanted[1:])], rows)[:-1]


def drafts(result: dict) -> list[str]:
    """A step by the query tokens of a request, and in brackets over a step of one."""
    headers, rows = bench_drafts_gpu.table(result["cells"])
    return table(headers, [[tokens(row[0]), *row[1:]] for row in rows])[:-1]


def targets(result: dict) -> list[str]:
    """The library for other GPUs beside Triton."""
    return table(*bench_targets_gpu.table(result["cells"]))[:-1]


def plot(result: dict) -> None:
    """Plots the time of one row and the speed-up of 1, 8 and 32 rows over the context length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = {name: served(result.get(name, [])) for name in ("cells", "contexts")}
    measured = [(part, cell) for part, cells in parts.items() for cell in cells]
    measured.sort(key=lambda one: one[1]["context"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    one = [(part, cell) for part, cell in measured if cell["rows"] == 1]
    lengths = [cell["context"] for _, cell in one]
    dense = [cell[BASELINE.name]["us"] for _, cell in one]
    left.loglog(lengths, dense, "k.-", label=BASELINE.title)
    default = headline(result)
    for name in names([cell for _, cell in measured], "dot"):
        times = [used(worse(result, *where, name), name)["us"] for where in one]
        left.loglog(lengths, times, ".-", label=NAMES[name])
    left.set(title="one row", ylabel="µs of a decode step of one layer")
    left.legend()
    for rows in sorted({cell["rows"] for _, cell in measured}):
        these = [where for where in measured if where[1]["rows"] == rows]
        shown = [worse(result, *where, default) for where in these]
        ratios = [used(cell, default)["speedup"] for cell in shown]
        right.semilogx([cell["context"] for cell in shown], ratios, ".-", label=f"{rows} rows")
    right.set(title=f"speed-up, {NAMES[default]}", ylim=(0, None))
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
    parts = [
        render(record, environment),
        layers(load("layer_gpu")[0]),
        drafts(load("drafts_gpu")[0]),
        targets(load("targets_gpu")[0]),
    ]
    sys.exit(update_document(DOCUMENT, "update_kernels", *parts))
