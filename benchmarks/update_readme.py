"""Writes the figures of README.md and docs/benchmarks.md, and the README's plot, from benchmarks/results.

    python benchmarks/update_readme.py [--check]

With --check nothing is written; the exit status is 1 when a document differs from the results.
"""

from __future__ import annotations

import json
import sys

import bench_drafts_serve
import bench_serve
import bench_serve_gpu
from peers import PEERS
from records import RESULTS, load, update_document
from update_kernels import headline, served, used, worse

from vllm_adamas.config import AdamasConfig
from vllm_adamas.environment import Environment
from vllm_adamas.evaluate.report import summary
from vllm_adamas.tables import markdown

ROOT = RESULTS.parent.parent
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
PLOT = RESULTS / "overview.png"
BASELINE = next(iter(PEERS.values()))
QUALITY = "quality_SmolLM2-135M-Instruct"

#: Results shown in README.md: loads (context, requests) of the GPU server, a cell of the kernels (context,
#: rows), and the context of the CPU server.
LOADS = ((32000, 1), (32000, 8), (32000, 22), (128000, 5))
CELL = (32768, 32)
CPU_CONTEXT = 8000
#: Records of a server and of the kernels, by processor.
CPUS = {
    "Intel Xeon with AMX": ("serve_cpu", "decode_cpu"),
    "AMD EPYC": ("serve_cpu_epyc", "decode_cpu_epyc"),
}


def times(stat: dict, digits: int = 2) -> str:
    return f"{stat['median']:.{digits}f} ({stat['q1']:.{digits}f}–{stat['q3']:.{digits}f})"


def software(environment: Environment) -> str:
    return f"vLLM {environment.versions['vllm']}, PyTorch {environment.versions['torch']}"


def where(environment: Environment) -> str:
    sets = ", ".join(environment.instruction_sets)
    return f"{environment.cpu} ({sets}), {software(environment)}, {environment.date}"


def change(row: dict, key: str, digits: int = 1) -> str:
    """Medians of both backends in milliseconds."""
    dense, sparse = (row[f"{who}_{key}_ms"]["median"] for who in ("dense", "adamas"))
    return f"{dense:,.{digits}f} → {sparse:,.{digits}f}"


def find(measured: list[dict], **values) -> dict:
    """The first row with these values."""
    return next(row for row in measured if all(row[key] == value for key, value in values.items()))


def mixed_row(serve: dict) -> dict:
    """The mixed load in the form of the other rows."""
    mixed = serve["mixed"]
    row = {f"{key}_ratio": mixed[f"{key}_ratio"] for key in ("tpot", "itl", "ttft")}
    for who, backend in (("dense", "flash_attn"), ("adamas", "adamas")):
        row |= {f"{who}_{key}": value for key, value in mixed[backend].items()}
    return row


def readme() -> list[str]:
    """The rows of README.md."""
    serve, environment = load("serve_gpu")
    gpu = (environment.gpu or "").removeprefix("NVIDIA ")
    rows = []
    for context, concurrency in LOADS:
        row = find(serve["rows"], context=context, concurrency=concurrency)
        rows.append(
            [
                f"{gpu} server, {context:,} tokens x {concurrency}",
                "FLASH_ATTN",
                f"TPOT {change(row, 'tpot')} ms",
                f"{row['tpot_ratio']:.2f}x (ITL {row['itl_ratio']:.2f}x)",
                f"{bench_serve_gpu.MAX_MODEL_LEN:,}",
            ]
        )
    context, count = CELL
    record = load("decode_gpu")[0]
    name = headline(record)
    cell = find(served(record["cells"]), context=context, rows=count)
    dense, one = cell[BASELINE.name]["us"], used(worse(record, "cells", cell, name), name)
    exactly = ", exactly the context" if cell["launch"] == context else ""
    rows.append(
        [
            f"{gpu}, decode kernels of one layer, {context:,} tokens x {count}",
            BASELINE.title,
            f"{dense:.0f} → {one['us']:.0f} µs",
            f"{one['speedup']:.2f}x",
            f"{cell['launch']:,}{exactly}",
        ]
    )
    for processor, (server, _) in CPUS.items():
        row = find(load(server)[0]["rows"], context=CPU_CONTEXT)
        rows.append(
            [
                f"CPU server ({processor}), one worker thread, {CPU_CONTEXT:,} tokens x 1",
                "CPU_ATTN",
                f"TPOT {change(row, 'tpot')} ms",
                f"{row['tpot_ratio']['median']:.2f}x",
                f"{bench_serve.MAX_MODEL_LEN:,}",
            ]
        )
    headers = ["measured", "compared with", "dense → adamas", "ratio", "`max_model_len`"]
    return markdown(headers, rows)


def gpu_tables() -> list[str]:
    serve, environment = load("serve_gpu")
    lines = [
        f"{environment.gpu}, driver {environment.driver}, {software(environment)}, Llama-3.1-8B's shape, bfloat16, CUDA "
        f"graphs, `max_model_len` {bench_serve_gpu.MAX_MODEL_LEN:,}, over HTTP, against FLASH_ATTN ({BASELINE.title}), "
        f"{serve['output_len']} output tokens, cached prompts; {serve['adamas'].partition(', profile')[0]}. "
        "Medians; ratios are dense / adamas, above 1 is faster.",
        "",
    ]
    rows = [(f"{row['context']:,} tokens x {row['concurrency']}", row) for row in serve["rows"]]
    rows.append(("mixed", mixed_row(serve)))
    headers = ["load", "TPOT ms", "ratio", "ITL ms", "ratio", "TTFT ms", "ratio"]
    lines += markdown(
        headers,
        [
            [
                name,
                change(row, "tpot"),
                f"{row['tpot_ratio']:.2f}x",
                change(row, "itl"),
                f"{row['itl_ratio']:.2f}x",
                change(row, "ttft", 0),
                f"{row['ttft_ratio']:.3f}x",
            ]
            for name, row in rows
        ],
    )
    mixed, tokens = serve["mixed"], list(serve["kv_cache_tokens"].values())[-1]
    return [
        *lines,
        "",
        f"Mixed: {mixed['requests']} questions of {mixed['question']} tokens about {mixed['documents']} cached documents "
        f"of {mixed['context']:,} arrive at {mixed['rate']:g} a second, with {mixed['output_len']} output tokens each. "
        f"With the same memory the KV cache holds {tokens['adamas'] / tokens['flash_attn']:.1%} of FLASH_ATTN's tokens "
        f"({tokens['adamas']:,} of {tokens['flash_attn']:,}).",
        "",
        *(second_client(one) for one in serve["second_client"]),
        "",
    ]


def second_client(found: dict) -> str:
    """What `vllm bench serve` says of a load."""
    changes = []
    for key in ("tpot", "itl"):
        dense, sparse = (found[name][f"{key}_ms"]["median"] for name in bench_serve_gpu.BACKENDS)
        changes.append(
            f"{key.upper()} {dense:.1f} → {sparse:.1f} ms ({found[f'{key}_ratio']:.2f}x)"
        )
    load = f"{found['context']:,} tokens x {found['concurrency']}"
    return f"`vllm bench serve` as the client, {load}: {', '.join(changes)}."


def drafts(result: dict, environment) -> list[str]:
    """What drafts gain in servers."""
    return [
        f"{environment.device}, {software(environment)}, {result['model']}, prompts of {result['context']:,} tokens, "
        f"{result['output_len']} output tokens, {result['drafts']} drafts a step, Model Runner V1 where there are drafts. "
        f"Median TPOT over {result['prompts']} requests, the share of the drafts that was accepted, and tokens per step with "
        "drafts.",
        "",
        *markdown(*bench_drafts_serve.table(result["cells"])),
        "",
    ]


def serve_table(result: dict) -> list[str]:
    lines = [
        f"{result['model']}, concurrency 1, 1 worker thread, torch.compile on, `max_model_len` "
        f"{bench_serve.MAX_MODEL_LEN:,}, {result['output_len']} output tokens; {result['adamas'].rstrip('.')}. Median "
        f"and quartiles over {result['rows'][0]['requests']} requests per cell.",
        "",
    ]
    headers = ["context", "TPOT dense ms", "TPOT adamas ms", "TPOT ratio", "TTFT ratio"]
    rows = [
        [
            row["context"],
            f"{row['dense_tpot_ms']['median']:.1f}",
            f"{row['adamas_tpot_ms']['median']:.1f}",
            f"{times(row['tpot_ratio'])}x",
            f"{times(row['ttft_ratio'])}x",
        ]
        for row in result["rows"]
    ]
    return lines + markdown(headers, rows)


def decode_tables(result: dict, environment: Environment) -> list[str]:
    """The CPU kernels over every distribution of keys, then every configuration over Gaussian keys."""
    model = result["model"]
    first = result["rows"][0]
    lines = [
        f"{where(environment)}. Decode attention alone, all {model['layers']} layers of SmolLM2-135M's shape, batch "
        f"{first['batch']}, {result['threads']} thread, bfloat16, budget {first['budget']}: {result['sparse']} against "
        f"{result['dense']} in one process. Median and quartiles of {first['speedup']['n']} turns. Other processes were at "
        "work on the machine, so compare the ratios of the least times.",
        "",
        f"The default, `dot` with the maximum over the heads, and the sum; {first['budget_of_layer_0']} tokens in "
        "layer 0. Milliseconds are the least:",
        "",
    ]
    shared = {"score": "dot", "selection": "kv_head"}
    rows = []
    for most in (row for row in result["rows"] if row["combine"] == "max"):
        place = {"context": most["context"], "keys": most["keys"]}
        total = find(result["rows"], **place, **shared, combine="sum")
        rows.append([*place.values(), f"{most['least_dense_ms']:.2f}"])
        for row in (most, total):
            rows[-1] += [
                f"{row['least_sparse_ms']:.2f}",
                f"{row['least_speedup']:.2f}x",
                f"{times(row['speedup'])}x",
            ]
    headers = ["context", "keys", "dense ms"]
    for name in ("maximum", "sum"):
        headers += [f"{name} ms", "speed-up", "median"]
    lines += [*markdown(headers, rows), "", "All configurations over Gaussian keys:", ""]
    headers = [
        "context",
        "score",
        "selection",
        "combine",
        "layer 0",
        "dense ms",
        "sparse ms",
        "speed-up",
        "median",
    ]
    rows = [
        [
            row["context"],
            row["score"],
            row["selection"],
            row["combine"],
            "dense" if row["dense_layers"] else f"{row['budget_of_layer_0']} tokens",
            f"{row['least_dense_ms']:.2f}",
            f"{row['least_sparse_ms']:.2f}",
            f"{row['least_speedup']:.2f}x",
            f"{times(row['speedup'])}x",
            f"{row['sparse_bytes'] / 1e6:.1f} of {row['dense_bytes'] / 1e6:.1f}",
            f"{row['sparse_bytes'] / row['least_sparse_ms'] / 1e6:.1f}",
        ]
        for row in result["rows"]
        if row["keys"] == "gaussian"
    ]
    return lines + markdown([*headers, "MB read at least", "GB/s"], rows)


def cpu_tables(processor: str) -> list[str]:
    server, kernels = CPUS[processor]
    serve, environment = load(server)
    return [
        f"### CPU server, {processor}",
        "",
        f"{where(environment)}.",
        "",
        *serve_table(serve),
        "",
        f"![TPOT against context length](../benchmarks/results/{server}.png)",
        "",
        f"### CPU kernels, {processor}",
        "",
        *decode_tables(*load(kernels)),
        "",
    ]


def benchmarks() -> list[str]:
    """Every table of docs/benchmarks.md."""
    lines = [
        "### GPU servers",
        "",
        *gpu_tables(),
        "### Drafts",
        "",
        *drafts(*load("drafts_serve")),
        *(line for processor in CPUS for line in cpu_tables(processor)),
    ]
    return lines[:-1]


def plot() -> None:
    """Plots TPOT of the GPU servers, and the loss that sparse decode adds over the token budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    serve, environment = load("serve_gpu")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    loads = {f"{row['context']:,}\nx {row['concurrency']}": row for row in serve["rows"]}
    loads["mixed\n"] = mixed_row(serve)
    for place, (who, label) in enumerate((("dense", "FLASH_ATTN"), ("adamas", "ADAMAS"))):
        heights = [row[f"{who}_tpot_ms"]["median"] for row in loads.values()]
        bars = left.bar(
            [n + 0.4 * place - 0.2 for n in range(len(loads))], heights, 0.4, label=label
        )
        left.bar_label(bars, fmt="%.1f", fontsize=8)
    left.set_xticks(
        range(len(loads)), [f"{name}\n{row['tpot_ratio']:.2f}x" for name, row in loads.items()]
    )
    left.set(
        title=f"TPOT, Llama-3.1-8B's shape, {environment.gpu}",
        xlabel="context length (tokens), requests, ratio",
        ylabel="median TPOT (ms)",
    )
    left.legend()
    budgets: set[int] = set()
    for study, family, label in (
        ("-default", "default", "default"),
        ("", "dot", "one set per KV head, sum"),
        ("", "dot-query-head", "one set per query head"),
    ):
        result = json.loads((RESULTS / f"{QUALITY}{study}.json").read_text())
        rows = [row for row in summary(result) if row["family"] == family and row["budget"] >= 64]
        rows.sort(key=lambda row: row["budget"])
        at = [row["budget"] for row in rows]
        budgets.update(at)
        mean, low, high = zip(*(row["dnll"] for row in rows), strict=True)
        windows = len(result["cells"][rows[0]["name"]]["tasks"]["perplexity"]["nll"])
        (line,) = right.plot(at, mean, ".-", label=f"{label}, {windows} windows")
        right.fill_between(at, low, high, color=line.get_color(), alpha=0.2)
    default = AdamasConfig().token_budget
    right.axvline(default, color="gray", linestyle=":", label=f"default, {default} tokens")
    right.set_xscale("log", base=2)
    right.set_xticks(sorted(budgets), list(map(str, sorted(budgets))))
    right.set(
        title=f"loss, {result['model']['name']}, {result['settings']['context']:,} tokens",
        xlabel="token budget",
        ylabel="ΔNLL (nats per token), 95% interval",
        ylim=(0, None),
    )
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(PLOT, dpi=120)


if __name__ == "__main__":
    if "--check" not in sys.argv:
        plot()
    differs = [
        update_document(README, "update_readme", readme()),
        update_document(BENCHMARKS, "update_readme", benchmarks()),
    ]
    sys.exit(max(differs))
