"""What the audit costs on a CPU: its time in a real engine, as a share of TPOT at the default interval.

Every decode step of one engine is audited, and the time of the audit is taken apart from that of the step, so other
load on the machine stretches both. Each layer has as many turns as another. One thread, torch.compile on.

    python benchmarks/bench_audit.py --contexts 1024 4096 8000
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from random import Random

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from common import environment, save, spread

from vllm_adamas.config import CPU_AUDIT_INTERVAL
from vllm_adamas.serving.audit import Audit
from vllm_adamas.tables import plain

MODEL = Path(__file__).parent.parent / ".models" / "SmolLM2-135M-Instruct"
LAYERS, TURNS = 30, 2
WARM_UP = 4  #: first steps of a measurement, which still hold tokens of prompts


class Clock:
    """The seconds spent in :meth:`Audit.step`, where every comparison is made, and in :meth:`Audit.keep`."""

    def __init__(self):
        self.seconds = 0.0
        Audit.step = self._timed(Audit.step)
        Audit.keep = self._timed(Audit.keep)

    def _timed(self, call):
        def timed(*args):
            start = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def measure(engine, clock: Clock, context: int, batch: int) -> dict:
    """Milliseconds of a decode step without the audit, and of the audit in it."""
    from vllm import SamplingParams

    rng, times = Random(context), []
    prompts = [[rng.randrange(100, 40000) for _ in range(context)] for _ in range(batch)]
    for tokens in (1, WARM_UP + LAYERS * TURNS):  # the first leaves the prompts in the prefix cache
        times.clear()
        for row, ids in enumerate(prompts):
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens)
            engine.add_request(
                f"{context}-{batch}-{tokens}-{row}", {"prompt_token_ids": ids}, params
            )
        while engine.has_unfinished_requests():
            before, start = clock.seconds, time.perf_counter()
            engine.step()
            taken, audit = time.perf_counter() - start, clock.seconds - before
            times.append((1e3 * (taken - audit), 1e3 * audit))
    steps, audits = zip(*times[WARM_UP:], strict=True)
    tpot, audit = statistics.median(steps), statistics.fmean(audits)
    return {
        "context": context,
        "batch": batch,
        "step_ms": spread(list(steps)),
        "audit_ms": spread(list(audits)) | {"mean": audit},
        "share": audit / (CPU_AUDIT_INTERVAL * tpot),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 8000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--name", default="audit_cpu", help="result file; empty writes none")
    args = parser.parse_args()
    from vllm import LLM

    clock = Clock()
    llm = LLM(
        model=args.model,
        attention_backend="adamas",
        additional_config={"adamas": {"audit_interval": 1}},
        max_num_seqs=max(args.batches),
        distributed_executor_backend="uni",
        async_scheduling=False,
    )
    rows = [
        measure(llm.llm_engine, clock, context, batch)
        for context in args.contexts
        for batch in args.batches
    ]
    headers = ["context", "requests", "step ms", "audit ms", f"share at {CPU_AUDIT_INTERVAL}"]
    lines = [
        [
            *(row["context"], row["batch"], f"{row['step_ms']['median']:.1f}"),
            *(f"{row['audit_ms']['mean']:.2f}", f"{row['share']:.2%}"),
        ]
        for row in rows
    ]
    print(plain(headers, lines))
    if args.name:
        result = {"environment": environment(), "model": Path(args.model).name, "threads": 1}
        result |= {"interval": CPU_AUDIT_INTERVAL, "rows": rows}
        print("wrote", save(args.name, result))


if __name__ == "__main__":
    main()
