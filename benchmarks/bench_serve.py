"""TPOT and TTFT of two servers on a CPU that differ in the attention backend alone, as a client measures them.

Requests are sent one at a time, each to both servers in turn, so that a ratio compares neighbouring measurements. The
other server is stopped meanwhile, because even an idle one slows a small machine. Concurrency 1, prefix caching off
(every prompt is new), torch.compile on.

    python benchmarks/bench_serve.py --contexts 1024 2048 4096 8000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

from records import RESULTS, environment, save, spread

from vllm_adamas.serving.launch import Server
from vllm_adamas.tables import plain

MODEL = Path(__file__).parent.parent / ".models" / "SmolLM2-135M-Instruct"
BACKENDS = ("cpu_attn", "adamas")
MAX_MODEL_LEN = 8192
VOCABULARY = 49152  #: of the models that are measured


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8000])
    parser.add_argument("--output-len", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=10, help="requests per backend and context")
    parser.add_argument("--config", default="{}", help="options of the adamas backend as JSON")
    parser.add_argument("--name", default="serve_cpu", help="result file")
    return parser.parse_args()


def random_prompt(seed: str, tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100, VOCABULARY) for _ in range(tokens)]


def one_request(server: Server, prompt: list[int], tokens: int, wait: float = 0.0) -> dict:
    """Times of one streamed completion, in ms."""
    time.sleep(wait)
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    start, times = time.perf_counter(), []
    for event in server.stream("/v1/completions", body):
        if event["choices"]:
            times.append(1e3 * (time.perf_counter() - start))
    result = {"ttft": times[0], "end": times[-1]}
    if tokens > 1:
        result |= {
            "tpot": (times[-1] - times[0]) / (tokens - 1),
            "itl": statistics.median(b - a for a, b in pairwise(times)),
        }
    return result


def in_turn(names, turn: int) -> list[str]:
    """The names, in reverse order in every second turn."""
    return list(names)[:: 1 if turn % 2 == 0 else -1]


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """A server that is stopped outside the context, with every process that it started."""
    os.killpg(server.pid, signal.SIGCONT)
    try:
        yield server
    finally:
        os.killpg(server.pid, signal.SIGSTOP)


def measure(args) -> tuple[list[dict], str]:
    """The rows of the table, and the backend's own log line."""
    samples = {
        name: {c: {"tpot": [], "itl": [], "ttft": []} for c in args.contexts} for name in BACKENDS
    }
    extra = ["--max-model-len", str(MAX_MODEL_LEN), "--no-enable-prefix-caching"]
    extra += ["--disable-log-stats"]
    with ExitStack() as stack:
        servers = {}
        for name in BACKENDS:
            config = json.loads(args.config) if name == "adamas" else None
            servers[name] = stack.enter_context(Server(args.model, name, config, extra_args=extra))
            stack.callback(os.killpg, servers[name].pid, signal.SIGCONT)  # or it does not end
            with running(servers[name]) as server:
                one_request(server, random_prompt("warm up", 1024), 8)
        for turn in range(args.rounds):
            for context in args.contexts:
                prompt = random_prompt(f"{context}/{turn}", context)
                for name in in_turn(BACKENDS, turn):
                    with running(servers[name]) as server:
                        one = one_request(server, prompt, args.output_len)
                    for key, kept in samples[name][context].items():
                        kept.append(one[key])
        log = servers["adamas"].log().splitlines()
    line = next(x for x in log if "Using ADAMAS" in x)
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
