"""What the audit costs: its time in a real engine, as a share of TPOT at the default interval.

Every decode step of one engine is audited, and the time of the audit is taken apart from that of the step, so other
load on the machine stretches both. Each layer has as many turns as another. torch.compile is on; a CPU has one thread.
On a GPU the audit is timed until the device has done its work. There a second engine without the audit follows, because
in graphs the audit's copies of queries and outputs are part of every step.

    python benchmarks/bench_audit.py --contexts 1024 4096 8000
    python benchmarks/bench_audit.py --model DIR --load-format dummy --contexts 8192 32768 --batches 1 8
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from pathlib import Path
from random import Random

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

import torch
from records import environment, save, spread

from vllm_adamas.config import AUDIT_INTERVALS
from vllm_adamas.serving.audit import Audit
from vllm_adamas.tables import plain

MODEL = Path(__file__).parent.parent / ".models" / "SmolLM2-135M-Instruct"
STEPS = 60  #: of a measurement; each of the demonstration model's layers has two turns
WARM_UP = 4  #: first steps of a measurement, which still hold tokens of prompts
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERVAL = AUDIT_INTERVALS[DEVICE]


def now() -> float:
    """Seconds, when the device has done all its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """The seconds spent in :meth:`Audit.step`, where every comparison is made, and in :meth:`Audit.keep`."""

    def __init__(self):
        self.seconds = 0.0
        Audit.step = self._timed(Audit.step)
        Audit.keep = self._timed(Audit.keep)

    def _timed(self, call):
        def timed(*args):
            if DEVICE == "cuda" and torch.cuda.is_current_stream_capturing():
                return call(*args)
            start = now()
            try:
                return call(*args)
            finally:
                self.seconds += now() - start

        return timed


def measure(engine, clock: Clock, context: int, batch: int) -> dict:
    """Milliseconds of a decode step without the audit, and of the audit in it."""
    from vllm import SamplingParams

    rng, times = Random(context), []
    prompts = [[rng.randrange(100, 40000) for _ in range(context)] for _ in range(batch)]
    for tokens in (1, WARM_UP + STEPS):  # the first leaves the prompts in the prefix cache
        times.clear()
        for row, ids in enumerate(prompts):
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens)
            engine.add_request(
                f"{context}-{batch}-{tokens}-{row}", {"prompt_token_ids": ids}, params
            )
        while engine.has_unfinished_requests():
            before, start = clock.seconds, now()
            engine.step()
            taken, audit = now() - start, clock.seconds - before
            times.append((1e3 * (taken - audit), 1e3 * audit))
    steps, audits = zip(*times[WARM_UP:], strict=True)
    tpot, audit = statistics.median(steps), statistics.fmean(audits)
    return {
        "context": context,
        "batch": batch,
        "step_ms": spread(list(steps)),
        "audit_ms": spread(list(audits)) | {"mean": audit},
        "share": audit / (INTERVAL * tpot),
    }


def measured(args, clock: Clock, interval: int) -> list[dict]:
    """The measurements of an engine that audits every ``interval`` steps, 0 for none."""
    from vllm import LLM

    llm = LLM(
        model=args.model,
        load_format=args.load_format,
        attention_backend="adamas",
        additional_config={"adamas": {"audit_interval": interval}},
        max_num_seqs=max(args.batches),
        max_model_len=args.max_model_len,
        gpu_memory_utilization=args.gpu_memory_utilization,
        distributed_executor_backend="uni",
        async_scheduling=False,
    )
    rows = [
        measure(llm.llm_engine, clock, context, batch)
        for context in args.contexts
        for batch in args.batches
    ]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.4)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 8000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--name", default=f"audit_{DEVICE}", help="result file; empty writes none")
    args = parser.parse_args()

    clock = Clock()
    rows = measured(args, clock, 1)
    if DEVICE == "cuda":
        for row, plain_row in zip(rows, measured(args, clock, 0), strict=True):
            row["off_ms"] = plain_row["step_ms"]
    headers = ["context", "requests", "step ms", "audit off", "audit ms", f"share at {INTERVAL}"]
    lines = [
        [
            *(row["context"], row["batch"], f"{row['step_ms']['median']:.2f}"),
            f"{row['off_ms']['median']:.2f}" if "off_ms" in row else "",
            *(f"{row['audit_ms']['mean']:.2f}", f"{row['share']:.2%}"),
        ]
        for row in rows
    ]
    print(plain(headers, lines))
    if args.name:
        result = {"environment": environment(), "model": Path(args.model).name}
        result |= {"threads": torch.get_num_threads(), "interval": INTERVAL, "rows": rows}
        print("wrote", save(args.name, result))


if __name__ == "__main__":
    main()
