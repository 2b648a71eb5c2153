"""What drafts gain in a server: TPOT and accepted drafts of the dense backend and of adamas.

The model has real weights, since what is accepted depends on them. Prompts are texts that the model continues, and texts
that end by repeating a passage of their own, which it copies. Drafts come from n-grams of the context, and from the model
itself as a draft model: a perfect drafter for a dense target, so that its rejected drafts show where sparse decode says
something else.

Servers share a GPU and take turns; on a CPU each runs alone. Every prompt is sent once for its prefix and is cached then.

    python benchmarks/bench_drafts_serve.py --text .texts/*.txt
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import torch
from bench_serve import MODEL
from bench_serve_gpu import at_once
from records import environment, save, spread
from transformers import AutoTokenizer

from vllm_adamas.serving.launch import Server
from vllm_adamas.tables import plain

MAX_MODEL_LEN = 8192
COPIED = 48  #: tokens of the passage that a prompt repeats before the model copies on
COUNTS = {
    "proposed": "vllm:spec_decode_num_draft_tokens_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
    "steps": "vllm:spec_decode_num_drafts_total",
}


def prompts_of(tokens: list[int], context: int, output_len: int, number: int) -> dict[str, list]:
    """Prompts of both kinds, from different parts of the text."""
    windows = [tokens[i * context : (i + 1) * context] for i in range(number)]
    if len(windows[-1]) < context:
        raise SystemExit(f"the texts have {len(tokens)} tokens of {number * context}")
    copies = []
    for window in windows:
        start = (context - output_len) // 3
        passage = window[start : start + COPIED]
        copies.append(window[: context - COPIED] + passage)
    return {"continue": windows, "copy": copies}


def drafters(model: str, drafts: int) -> dict[str, dict | None]:
    """Speculative configurations by name."""
    ngrams = {"method": "ngram", "prompt_lookup_min": 3, "prompt_lookup_max": 5}
    by_model = {"method": "draft_model", "model": model}
    found = {"n-grams": ngrams, "the model itself": by_model}
    return {"none": None, **{n: {**c, "num_speculative_tokens": drafts} for n, c in found.items()}}


def start(model: str, backend: str, drafter: dict | None, config: dict) -> Server:
    arguments = ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8"]
    if torch.cuda.is_available():
        arguments += ["--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", "3G"]
    if drafter:
        arguments += ["--speculative-config", json.dumps(drafter)]
    # Model Runner V2 gives a draft model the backend of the target.
    env = {"VLLM_USE_V2_MODEL_RUNNER": "0"} if drafter else None
    options = config if backend == "adamas" else None
    return Server(model, backend, options, extra_args=arguments, env=env)


def measure(server: Server, prompts: list, output_len: int, batch: int, rounds: int) -> dict:
    """TPOT over the requests, in ms, and what became of the drafts."""
    for prompt in prompts:
        at_once(server, [prompt], 1)
    before, tpot = server.metrics(), []
    for _ in range(rounds):
        for first in range(0, len(prompts), batch):
            answers = at_once(server, prompts[first : first + batch], output_len)
            tpot += [one["tpot"] for one in answers]
    after = server.metrics()
    counts = [int(after.get(n, 0) - before.get(n, 0)) for n in COUNTS.values()]
    return {"tpot_ms": spread(tpot), **dict(zip(COUNTS, counts, strict=True))}


def table(cells: list[dict]) -> tuple[list[str], list[list]]:
    """Headers and rows: TPOT of both backends, the share of the drafts that each accepts, and tokens per step."""
    rows = []
    for cell in cells:
        row = [cell["prompts"], cell["requests"], cell["drafter"]]
        for name in ("dense", "adamas"):
            one = cell[name]
            row.append(f"{one['tpot_ms']['median']:.2f}")
            proposed, steps = one["proposed"], one["steps"]
            row.append(f"{100 * one['accepted'] / proposed:.1f} %" if proposed else "")
            row.append(f"{1 + one['accepted'] / steps:.2f}" if steps else "")
        rows.append(row)
    headers = ["prompts", "requests", "drafts by"]
    for name in ("dense", "adamas"):
        headers += [f"{name} TPOT ms", f"{name} accepts", f"{name} tokens per draft"]
    return headers, rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--text", nargs="+", required=True, type=Path)
    parser.add_argument("--context", type=int, default=7800)
    parser.add_argument("--output-len", type=int, default=192)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--drafts", type=int, default=3, help="per step")
    parser.add_argument("--config", default="{}", help="options of the adamas backend as JSON")
    parser.add_argument("--name", default="drafts_serve", help="result file")
    args = parser.parse_args()
    config = json.loads(args.config)
    text = "\n\n".join(path.read_text() for path in args.text)
    tokens = AutoTokenizer.from_pretrained(args.model)(text)["input_ids"]
    prompts = prompts_of(tokens, args.context, args.output_len, args.prompts)
    dense = "flash_attn" if torch.cuda.is_available() else "cpu_attn"
    backends = {"dense": dense, "adamas": "adamas"}
    kinds = drafters(args.model, args.drafts)
    sizes = {k: getattr(args, k) for k in ("context", "output_len", "prompts", "rounds", "drafts")}
    record = {"environment": environment(), "model": Path(args.model).name, **sizes}
    record |= {"adamas": config, "cells": []}
    with ExitStack() as stack:

        def started(arm: tuple[str, str]) -> Server:
            return start(args.model, backends[arm[1]], kinds[arm[0]], config)

        running: dict[tuple[str, str], Server] = {}
        if torch.cuda.is_available():
            arms = list(product(kinds, backends))
            with ThreadPoolExecutor() as pool:
                running = dict(zip(arms, pool.map(started, arms), strict=True))
            for server in running.values():
                stack.callback(server.stop)
        for drafter in kinds:
            cells = {(kind, batch): {} for kind, batch in product(prompts, args.batches)}
            for name in backends:
                server = running.get((drafter, name))
                if server is None:
                    server = started((drafter, name))
                    stack.callback(server.stop)
                for (kind, batch), cell in cells.items():
                    cell[name] = measure(server, prompts[kind], args.output_len, batch, args.rounds)
                    print(drafter, name, kind, batch, cell[name], flush=True)
                server.stop()
            record["cells"] += [
                {"prompts": kind, "requests": batch, "drafter": drafter, **cell}
                for (kind, batch), cell in cells.items()
            ]
            save(args.name, record)
    print(plain(*table(record["cells"])))


if __name__ == "__main__":
    main()
