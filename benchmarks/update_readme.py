"""Writes the results part of README.md from the JSON files in benchmarks/results.

    python benchmarks/update_readme.py [--check]

With --check nothing is written; the exit status is 1 when README.md differs from the results.
"""

from __future__ import annotations

import sys

from common import RESULTS, load, update_document

from vllm_adamas.environment import Environment
from vllm_adamas.tables import markdown

README = RESULTS.parent.parent / "README.md"


def times(stat: dict, digits: int = 2) -> str:
    return f"{stat['median']:.{digits}f} ({stat['q1']:.{digits}f}–{stat['q3']:.{digits}f})"


def software(environment: Environment) -> str:
    return f"vLLM {environment.versions['vllm']}, PyTorch {environment.versions['torch']}"


def where(environment: Environment) -> str:
    sets = ", ".join(environment.instruction_sets)
    return f"{environment.cpu} ({sets}), {software(environment)}, {environment.date}"


def decode_table(result: dict) -> list[str]:
    model = result["model"]
    lines = [
        f"Decode attention, all {model['layers']} layers of SmolLM2-135M's shape, batch 1, "
        f"{result['threads']} thread, bfloat16, budget {result['rows'][0]['budget']}, "
        f"dense layers {model['dense_layers']}: {result['sparse']} against {result['dense']} in one process. "
        "Median and quartiles.",
        "",
    ]
    headers = ["context", "score", "selection", "dense ms", "sparse ms", "speed-up"]
    rows = [
        [
            row["context"],
            row["score"],
            row["selection"],
            f"{row['dense_ms']['median']:.2f}",
            f"{row['sparse_ms']['median']:.2f}",
            f"{times(row['speedup'])}x",
            f"{row['sparse_bytes'] / 1e6:.1f} of {row['dense_bytes'] / 1e6:.1f}",
            f"{row['sparse_gb_per_s']:.1f}",
        ]
        for row in result["rows"]
        if row["context"] >= 4096  # the result file has them all
    ]
    return lines + markdown([*headers, "MB read at least", "GB/s"], rows)


def serve_table(result: dict) -> list[str]:
    lines = [
        f"End to end, `vllm bench serve`, {result['model']}, concurrency 1, 1 worker thread, torch.compile on, "
        f"{result['output_len']} output tokens; {result['adamas'].rstrip('.')}. Median and quartiles over "
        f"{result['rows'][0]['requests']} requests per cell.",
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


def both(row: dict, key: str) -> list[str]:
    """Medians of both backends, and their ratio."""
    dense, sparse = (row[f"{who}_{key}_ms"]["median"] for who in ("dense", "adamas"))
    return [f"{dense:.1f} → {sparse:.1f}", f"{row[f'{key}_ratio']:.2f}x"]


def serve_row(load: str, row: dict) -> list[str]:
    return [load, *both(row, "tpot"), *both(row, "itl"), f"{row['ttft_ratio']:.3f}x"]


def gpu_tables(serve: dict, environment: Environment, decode: dict) -> list[str]:
    lines = [
        f"**On GPUs**: {environment.gpu}, driver {environment.driver}, {software(environment)}, Llama-3.1-8B's shape, "
        f"bfloat16, CUDA graphs, over HTTP, against FLASH_ATTN (FlashAttention 3), {serve['output_len']} output "
        "tokens, cached prompts ([method](docs/benchmarks.md)); "
        f"{serve['adamas'].partition(', profile')[0]}.",
        "",
    ]
    headers = ["load", "TPOT ms", "ratio", "ITL ms", "ratio", "TTFT ratio"]
    rows = [
        serve_row(f"{row['context']:,} tokens x {row['concurrency']}", row) for row in serve["rows"]
    ]
    mixed = serve["mixed"]
    row = {f"{key}_ratio": mixed[f"{key}_ratio"] for key in ("tpot", "itl", "ttft")}
    for who, backend in (("dense", "flash_attn"), ("adamas", "adamas")):
        row |= {f"{who}_{key}": value for key, value in mixed[backend].items()}
    load = (
        f"mixed: {mixed['question']}-token questions about {mixed['documents']} documents of "
        f"{mixed['context']:,}, {mixed['rate']:g} a second"
    )
    lines += markdown(headers, [*rows, serve_row(load, row)])
    tokens = list(serve["kv_cache_tokens"].values())[-1]
    kept = tokens["adamas"] / tokens["flash_attn"]
    lines += ["", f"With the same memory the KV cache holds {kept:.1%} of FLASH_ATTN's tokens."]
    cells = []
    for cell in decode["cells"]:
        one = cell["dot kv_head"]
        ratio = one[one["runs"]]["speedup"]
        cells.append(f"{cell['context'] // 1024}K x {cell['rows']} {ratio:.2f}x")
    lines += [
        "",
        "The decode kernels alone, one set per KV head, against FlashAttention 3: "
        + ", ".join(cells)
        + ". [docs/kernels.md](docs/kernels.md) says what bounds each.",
        "",
    ]
    return lines


def render() -> list[str]:
    serve, environment = load("serve_cpu")
    lines = ["Ratios are dense / adamas: above 1 is faster.", ""]
    lines += gpu_tables(*load("serve_gpu"), load("decode_gpu")[0])
    lines += [f"**On a CPU**: {where(environment)}.", ""]
    lines += [
        *serve_table(serve),
        "",
        "![TPOT against context length](benchmarks/results/serve_cpu.png)",
        "",
    ]
    return lines + decode_table(load("decode_cpu")[0])


if __name__ == "__main__":
    sys.exit(update_document(README, "update_readme", render()))
