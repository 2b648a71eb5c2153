"""`vllm bench serve` against two servers that differ in the attention backend alone.

The servers run one at a time with the same prompts, because even an idle server slows another one on a small
machine. Concurrency 1, prefix caching off (every prompt is new), torch.compile on.

    python benchmarks/bench_serve.py --contexts 1024 2048 4096 8000
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from records import RESULTS, environment, save, spread

from vllm_adamas.serving.launch import Server
from vllm_adamas.tables import plain

MODEL = Path(__file__).parent.parent / ".models" / "SmolLM2-135M-Instruct"
BACKENDS = ("cpu_attn", "adamas")
MAX_MODEL_LEN = 8192


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8000])
    parser.add_argument("--output-len", type=int, default=96)
    parser.add_argument(
        "--prompts", type=int, default=2, help="requests per backend, context and round"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--config", default="{}", help="options of the adamas backend as JSON")
    parser.add_argument("--name", default="serve_cpu", help="result file")
    return parser.parse_args()


def run_bench(
    server: Server, context: int, output_len: int, prompts: int, seed: int, concurrency: int = 1
) -> dict:
    """Runs `vllm bench serve`; per request in ms: TPOT, median inter-token latency and TTFT."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve",
            "--base-url", server.url, "--model", server.model, "--dataset-name", "random",
            "--random-input-len", str(context), "--random-output-len", str(output_len),
            "--num-prompts", str(prompts), "--max-concurrency", str(concurrency), "--seed", str(seed), "--ignore-eos",
            "--ready-check-timeout-sec", "0", "--disable-tqdm", "--temperature", "0",
            "--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", "r.json",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"vllm bench serve failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            )
        result = json.loads((Path(folder) / "r.json").read_text())
    if result["completed"] != prompts:
        raise SystemExit(f"only {result['completed']} of {prompts} requests completed")
    gaps = [itl for itl in result["itls"] if itl]  # a request of one token has none
    return {
        "tpot": [1e3 * sum(itl) / len(itl) for itl in gaps],
        "itl": [1e3 * statistics.median(itl) for itl in gaps],
        "ttft": [1e3 * t for t in result["ttfts"]],
    }


def measure(args) -> tuple[list[dict], str]:
    """The rows of the table, and the backend's own log line."""
    samples = {
        name: {c: {"tpot": [], "itl": [], "ttft": []} for c in args.contexts} for name in BACKENDS
    }
    extra = ["--max-model-len", str(MAX_MODEL_LEN), "--no-enable-prefix-caching"]
    extra += ["--disable-log-stats"]
    line = ""
    for seed in range(args.rounds):
        # The order alternates, so that neither backend always runs second.
        for name in BACKENDS if seed % 2 == 0 else BACKENDS[::-1]:
            config = json.loads(args.config) if name == "adamas" else None
            with Server(args.model, name, config, extra_args=extra) as server:
                run_bench(server, 1024, 8, 1, seed=1000)  # warm up
                for context in args.contexts:
                    one = run_bench(server, context, args.output_len, args.prompts, seed)
                    for key, values in one.items():
                        samples[name][context][key] += values
                line = next((x for x in server.log().splitlines() if "Using ADAMAS" in x), line)
    return [compare(c, *(samples[name][c] for name in BACKENDS)) for c in args.contexts], line


def compare(context: int, dense: dict, sparse: dict) -> dict:
    row = {"context": context, "requests": len(dense["tpot"])}
    for key in ("tpot", "ttft"):
        row[f"dense_{key}_ms"] = spread(dense[key])
        row[f"adamas_{key}_ms"] = spread(sparse[key])
        row[f"{key}_ratio"] = spread([d / s for d, s in zip(dense[key], sparse[key], strict=True)])
    return row


def table(rows: list[dict]) -> str:
    """Medians, with quartiles of the ratios."""
    headers = ["context", "dense TPOT ms", "adamas TPOT ms", "TPOT ratio", "q1", "q3"]
    return plain(
        [*headers, "TTFT ratio", "q1", "q3"],
        [
            [
                row["context"],
                *(f"{row[f'{name}_tpot_ms']['median']:.1f}" for name in ("dense", "adamas")),
                *(f"{row['tpot_ratio'][key]:.2f}" for key in ("median", "q1", "q3")),
                *(f"{row['ttft_ratio'][key]:.3f}" for key in ("median", "q1", "q3")),
            ]
            for row in rows
        ],
    )


def plot(rows: list[dict], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for key, label in (("dense", "CPU_ATTN (dense)"), ("adamas", "ADAMAS")):
        stats = [row[f"{key}_tpot_ms"] for row in rows]
        middle = [s["median"] for s in stats]
        error = [
            [m - s["q1"] for m, s in zip(middle, stats, strict=True)],
            [s["q3"] - m for m, s in zip(middle, stats, strict=True)],
        ]
        axes.errorbar(
            [row["context"] for row in rows], middle, yerr=error, marker="o", capsize=3, label=label
        )
    axes.set(
        xlabel="context length (tokens)", ylabel="TPOT (ms), median and quartiles", title=title
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=140)


def main():
    args = parse_args()
    rows, line = measure(args)
    print(table(rows))
    facts = environment()
    result = {
        "environment": facts,
        "model": Path(args.model).name,
        "adamas": line.partition("backend: ")[2],
        "output_len": args.output_len,
        "rows": rows,
    }
    print("wrote", save(args.name, result))
    plot(
        rows,
        RESULTS / f"{args.name}.png",
        f"{Path(args.model).name}, {facts['cpu']}, 1 worker thread",
    )


if __name__ == "__main__":
    main()
