"""Writes the tables of docs/use.md from benchmarks/results: from which context on decoding gains, and the loss.

    python benchmarks/update_use.py [--check]

With --check nothing is written; the exit status is 1 when the document differs from the results.
"""

from __future__ import annotations

import json
import sys

from records import RESULTS, load, update_document
from update_kernels import headline, served, used, worse
from update_readme import CPUS, QUALITY

from vllm_adamas.config import AdamasConfig
from vllm_adamas.evaluate.report import summary
from vllm_adamas.tables import markdown

DOCUMENT = RESULTS.parent.parent / "docs" / "use.md"
Measured = list[tuple[int, float]]  #: contexts in tokens, and dense time over sparse time


def crossover(measured: Measured) -> tuple[str, str]:
    """The longest context measured that does not gain, and the shortest from which all longer ones do."""
    measured = sorted(measured)
    slower = [at for at, (_, ratio) in enumerate(measured) if ratio <= 1]
    first = slower[-1] + 1 if slower else 0
    shown = [f"{context:,} ({ratio:.2f}x)" for context, ratio in measured]
    return shown[first - 1] if slower else "–", shown[first] if first < len(shown) else "–"


def by(cells: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Cells by the values of some keys, in the order in which these first appear."""
    found: dict[tuple, list[dict]] = {}
    for cell in cells:
        found.setdefault(tuple(cell[key] for key in keys), []).append(cell)
    return found


def speedups(record: dict, part: str) -> list[dict]:
    """Cells of a part of the GPU record, with the speed-up over the slower of Gaussian and real keys."""
    name = headline(record)
    return [
        {**cell, "ratio": used(worse(record, part, cell, name), name)["speedup"]}
        for cell in served(record[part])
    ]


def layer(heads: str) -> str:
    """The heads of a layer in words, query heads x KV heads."""
    query, kv, size = heads.split("x")
    return f"{query} x {kv} heads of size {size}"


def crossovers() -> list[str]:
    """Servers, and decode attention alone."""
    rows = []
    serve, environment = load("serve_gpu")
    gpu = environment.gpu.removeprefix("NVIDIA ")
    for (requests,), cells in by(serve["rows"], "concurrency").items():
        measured = [(cell["context"], cell["tpot_ratio"]) for cell in cells]
        rows.append([f"{gpu}, TPOT of a server", requests, *crossover(measured)])
    for processor, (server, _) in CPUS.items():
        serve, _ = load(server)
        measured = [(cell["context"], cell["tpot_ratio"]["median"]) for cell in serve["rows"]]
        title = f"{processor}, TPOT of a server ({serve['model']}, one worker thread)"
        rows.append([title, 1, *crossover(measured)])
    record, _ = load("decode_gpu")
    cells = [cell for part in ("cells", "contexts", "mha") for cell in speedups(record, part)]
    for (heads, requests), alike in by(cells, "heads", "rows").items():
        measured = [(cell["context"], cell["ratio"]) for cell in alike]
        rows.append(
            [f"{gpu}, attention of a layer, {layer(heads)}", requests, *crossover(measured)]
        )
    for processor, (_, kernels) in CPUS.items():
        decode, _ = load(kernels)
        served_by_default = [cell for cell in decode["rows"] if cell["combine"] == "max"]
        measured = [
            (context, min(cell["least_speedup"] for cell in cells))
            for (context,), cells in by(served_by_default, "context").items()
        ]
        rows.append([f"{processor}, attention of all layers", 1, *crossover(measured)])
    return markdown(["measured", "requests", "no gain at", "gain from"], rows)


def order(value: int | str) -> list[int]:
    """What budgets and heads ("32x8x128") are sorted by."""
    return [int(part) for part in str(value).split("x")]


def at_one_context() -> list[str]:
    """What else the gain depends on, at the context that has been measured most."""
    record, _ = load("decode_gpu")
    lines = []
    for key, title in (("budget", "token budget"), ("heads", "layer (query x KV heads)")):
        varied = speedups(record, "budgets" if key == "budget" else "heads")
        (context,) = {cell["context"] for cell in varied}
        counts = sorted({cell["rows"] for cell in varied})
        common = [
            cell
            for cell in speedups(record, "cells")
            if cell["context"] == context and cell["rows"] in counts
        ]
        cells = by(sorted(common + varied, key=lambda cell: order(cell[key])), key, "rows")
        rows = [
            [
                layer(of) if key == "heads" else of,
                *(f"{cells[of, count][0]['ratio']:.2f}x" for count in counts),
            ]
            for of in dict.fromkeys(of for of, _ in cells)
        ]
        headers = [f"{title}, at {context:,} tokens", *(_requests(count) for count in counts)]
        lines += ["", *markdown(headers, rows)]
    return lines


def _requests(count: int) -> str:
    return f"{count} request" + "s" * (count > 1)


def costs() -> list[str]:
    """What is the same or worse: time to first token, and the room in the KV cache."""
    serve, _ = load("serve_gpu")
    one = next(row for row in serve["rows"] if row["concurrency"] == 1)
    cpus = [load(server)[0] for server, _ in CPUS.values()]
    ratios = [row["ttft_ratio"]["median"] for cpu in cpus for row in cpu["rows"]]
    tokens = list(serve["kv_cache_tokens"].values())[-1]
    dense, _ = load("dense_gpu")
    rows = [cell["kernels"]["us"] / cell["flash"]["us"] for cell in dense["cells"]]
    return [
        f"- Time to first token, dense / adamas: {one['ttft_ratio']:.3f}x on the GPU server for a prompt of "
        f"{one['context']:,} tokens; {min(ratios):.2f}x to {max(ratios):.2f}x on the CPU servers.",
        f"- Tokens in the KV cache of the GPU server: {tokens['adamas']:,} where FLASH_ATTN has "
        f"{tokens['flash_attn']:,}.",
        f"- A dense row of a sparse layer, such as one whose context is within the budget, takes {min(rows):.2f} to "
        f"{max(rows):.2f} times as long on the GPU as with FlashAttention.",
    ]


def loss() -> list[str]:
    """The loss that sparse decode adds, by budget; the sum has been measured at more budgets."""
    rows = []
    for study, family, name in (("-default", "default", "default"), ("", "dot", "sum")):
        result = json.loads((RESULTS / f"{QUALITY}{study}.json").read_text())
        windows = len(result["cells"]["dense"]["tasks"]["perplexity"]["nll"])
        found = [row for row in summary(result) if row["family"] == family]
        for row in sorted(found, key=lambda row: row["budget"]):
            mean, low, high = row["dnll"]
            rows.append([row["budget"], name, f"+{mean:.3f} [{low:+.3f}, {high:+.3f}]", windows])
    size = result["settings"]["context"]
    return markdown(
        ["token budget", "scores", f"ΔNLL at {size:,} tokens [95 % interval]", "windows"], rows
    )


def lines() -> list[str]:
    return [
        "### Speed",
        "",
        *crossovers(),
        *at_one_context(),
        "",
        "### What it costs",
        "",
        *costs(),
        "",
        f"{QUALITY.removeprefix('quality_')}, default budget {AdamasConfig().token_budget}:",
        "",
        *loss(),
    ]


if __name__ == "__main__":
    sys.exit(update_document(DOCUMENT, "update_use", lines()))
