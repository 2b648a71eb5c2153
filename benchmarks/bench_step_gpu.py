"""What a decode step of a server consists of on a GPU: the time of its kernels, by kind, with FLASH_ATTN and ADAMAS.

The servers, weights and loads are those of `bench_serve_gpu.py`. Each load runs once as it is, for the time between
tokens, and then under PyTorch's profiler for `--steps` steps, which slows steps down by little more than a microsecond
per kernel. Kernels may overlap: every time is counted once, for the kernel that started first.

    python benchmarks/bench_step_gpu.py --tokenizer DIR --devices 0 1
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from urllib.request import Request, urlopen

from bench_serve import MODEL
from bench_serve_gpu import LLAMA_8B, Load, at_once, make_model, server_arguments
from records import environment, save, spread

from vllm_adamas.serving.launch import Server
from vllm_adamas.tables import plain

CONFIGS = {"flash_attn": None, "adamas": {}, "adamas, no audit": {"audit_interval": 0}}
KINDS = {  # of kernels, by their names; the first that matches
    "decode attention": r"fused_kernel|encode_kernel|scan_kernel|attend_kernel|[Ff]lash.*[Ff]wd|flash::",
    "cache write": r"append_kernel|reshape_and_cache",
    "matrix products": r"nvjet|gemm|gemv|cutlass|cublas|splitK|matmul",
}
OTHER, IDLE = "other kernels", "no kernel"
SHOWN = (*KINDS, OTHER, IDLE)
LONGEST = 14  #: kernels that a record names


def kind_of(kernel: str) -> str:
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel)), OTHER)


def parts(trace: dict, layers: int) -> dict:
    """Microseconds per step of each kind of kernel, and of the longest kernels by name: medians over the steps.

    A step begins with the first of as many cache writes as there are layers. Steps at both ends of the trace are left
    out, as they may be cut.
    """
    events = sorted(
        (x["ts"], x["dur"], x["name"])
        for x in trace["traceEvents"]
        if x.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    writes = [i for i, (_, _, name) in enumerate(events) if kind_of(name) == "cache write"]
    first, last = layers, (len(writes) // layers - 1) * layers
    steps = (last - first) // layers
    if steps < 1:
        raise ValueError(f"{len(writes)} cache writes of {layers} layers hold no whole step")
    bounds = [writes[first + step * layers] for step in range(steps + 1)]
    each = [kinds_of(events[a:b]) for a, b in pairwise(bounds)]
    kernels: dict[str, list[float]] = {}
    for _, _, times in each:
        for name, us in times.items():
            kernels.setdefault(name, []).append(us)
    longest = sorted(kernels, key=lambda name: -sum(kernels[name]))[:LONGEST]
    return {
        "steps": steps,
        "us": {kind: statistics.median(one[0][kind] for one in each) for kind in SHOWN},
        "kernels": [
            {
                "name": name,
                "us": statistics.median(kernels[name]),
                "count": statistics.median(one[1][name] for one in each),
            }
            for name in longest
        ],
    }


def kinds_of(events: list[tuple]) -> tuple[Counter, Counter, Counter]:
    """Microseconds of each kind in the events of a step, and how often and how long each kernel ran."""
    kinds, counts, times = Counter(), Counter(), Counter()
    covered = events[0][0]
    for start, duration, kernel in events:
        kinds[IDLE] += max(0.0, start - covered)
        alone = max(0.0, start + duration - max(start, covered))
        covered = max(covered, start + duration)
        kinds[kind_of(kernel)] += alone
        times[kernel[:100]] += alone
        counts[kernel[:100]] += 1
    return kinds, counts, times


def order(server: Server, path: str, body: dict | None = None) -> None:
    """A POST whose answer is empty."""
    headers = {"Content-Type": "application/json"}
    data = json.dumps(body or {}).encode()
    urlopen(Request(server.url + path, data, headers), timeout=300).close()


def profile(server: Server, folder: Path, prompts: list[list[int]], args) -> dict:
    """Profiles steps in the middle of a round of answers."""
    seen = set(folder.glob("**/*.json.gz"))
    answers = threading.Thread(target=at_once, args=(server, prompts, args.output_len))
    answers.start()
    time.sleep(args.wait)
    order(server, "/start_profile", {"max_iterations": args.steps + 2})
    answers.join()
    order(server, "/stop_profile")
    traces = [x for x in folder.glob("**/*.json.gz") if x not in seen]
    with gzip.open(max(traces, key=lambda x: x.stat().st_size), "rt") as file:
        return parts(json.load(file), LLAMA_8B["num_hidden_layers"])


def measure(name: str, device: str, model: Path, args) -> None:
    stack = ExitStack()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trace-")))
    profiler = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder),
        "torch_profiler_with_stack": False,
        "torch_profiler_activities": ["CUDA"],
        "ignore_frontend": True,
    }
    extra = [*server_arguments(args.kv_bytes), "--profiler-config", json.dumps(profiler)]
    with stack:
        env = {"CUDA_VISIBLE_DEVICES": device}
        server = Server(model, name.partition(",")[0], CONFIGS[name], extra_args=extra, env=env)
        stack.callback(server.stop)
        for load in map(Load.parse, args.loads):
            prompts = load.prompts()
            at_once(server, prompts, 1)  # cached from here on
            samples = [
                x for _ in range(args.rounds) for x in at_once(server, prompts, args.output_len)
            ]
            row = {"server": name, "context": load.context, "requests": load.requests}
            row |= {"itl_ms": spread([x["itl"] for x in samples])}
            row |= profile(server, folder, prompts, args)
            print(
                name,
                load.context,
                load.requests,
                f"{row['itl_ms']['median']:.2f}",
                row["us"],
                flush=True,
            )
            args.done.append(row)
            save(args.name, {"environment": environment(), "rows": args.done})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", default=str(MODEL), help="folder with a small tokenizer")
    parser.add_argument(
        "--loads", nargs="+", default=["32000x1", "32000x8"], help="CONTEXTxREQUESTS"
    )
    parser.add_argument("--output-len", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=32, help="steps of a profile")
    parser.add_argument(
        "--wait", type=float, default=0.4, help="seconds of a round before the profile"
    )
    parser.add_argument("--kv-bytes", default="38G")
    parser.add_argument(
        "--devices", nargs="+", default=["0"], help="GPUs, each for one server at a time"
    )
    parser.add_argument("--name", default="step_gpu", help="result file")
    args = parser.parse_args()
    args.done = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), Path(args.tokenizer))

        def run(turn: int) -> None:
            for name in list(CONFIGS)[turn :: len(args.devices)]:
                measure(name, args.devices[turn], model, args)

        with ThreadPoolExecutor(len(args.devices)) as pool:
            list(pool.map(run, range(len(args.devices))))
    headers = ["server", "context", "requests", "ITL ms", *SHOWN]
    lines = [
        [
            *(row["server"], row["context"], row["requests"], f"{row['itl_ms']['median']:.2f}"),
            *(f"{row['us'][kind]:.0f}" for kind in SHOWN),
        ]
        for row in args.done
    ]
    print(plain(headers, lines))


if __name__ == "__main__":
    main()
