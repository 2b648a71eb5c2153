"""A step of speculative decoding in one layer on a Hopper GPU: adamas and FlashAttention 3 in one run.

A request that verifies D drafts has D + 1 query tokens in a step. FlashAttention takes them as one sequence of queries
and reads the context once. For adamas each is a row of its own, with its own causal limit and token set, and the rows of
a request share a block table. The time of a step by its positions is compared with that of one position, for both. Every
way to take the step is timed: the fused kernel and three kernels, with a scan for each row, and three whose scan the rows
of a request share.

    python benchmarks/bench_drafts_gpu.py
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from bench_decode_gpu import (
    DTYPE,
    LLAMA,
    PEERS,
    Pool,
    Steps,
    cells_of,
    copies_of,
    launch_of,
    timed,
)
from keys import DISTRIBUTIONS, Contexts
from records import environment, save

from vllm_adamas.backends.cuda.backend import CudaBackend
from vllm_adamas.backends.cuda.policy import THREE
from vllm_adamas.tables import plain

CELLS = ("8192x8", "8192x32", "32768x1", "32768x8", "131072x1", "131072x8")
POSITIONS = (1, 2, 4, 8)
DIFFERENCE = 0.3  #: of the queries of a request's positions, as a share of their size
FA3 = "fa3"
WAYS = {"fused": "one kernel", "three": "three kernels", "shared": "shared scan"}


def measure(backend, pool: Pool, contexts: Contexts, positions: int, selection: str) -> dict:
    """One step with some query tokens per request, in µs: adamas, as it runs and in every way, and FlashAttention 3."""
    launch, rows = launch_of(pool.length, "server"), pool.rows * positions
    query = contexts.query.repeat_interleave(positions, 0)
    spread = query.square().mean(-1, keepdim=True).sqrt() * DIFFERENCE
    queries = list((query + spread * torch.randn_like(query)).to(DTYPE).unflatten(0, (-1, rows)))
    layer = pool.layer(backend, "dot", selection)
    steps = Steps(backend, pool, layer, queries, launch, positions=positions)
    ways = PEERS[FA3].prepare(replace(pool.cell(launch), positions=positions))
    dense = min((timed(make()) for make in ways.values()), key=lambda one: one["us"])
    plan = backend.plan(layer, rows, DTYPE, launch, positions)
    form = backend.fused_form(layer, rows, DTYPE, launch)
    ways = {"three": {"form": THREE, "shared": False}}
    if form != THREE:
        ways["fused"] = {"form": form, "shared": False}
    if positions > 1:
        ways["shared"] = {"form": THREE, "shared": True}
    return {
        "runs": "shared" if plan.shared else "three" if plan.form == THREE else "fused",
        "adamas": timed(steps.calls()),
        **{name: timed(steps.calls(**how)) for name, how in ways.items()},
        FA3: dense,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", nargs="+", default=CELLS, help="CONTEXTxREQUESTS, as in 32768x8")
    parser.add_argument("--positions", nargs="+", type=int, default=POSITIONS)
    parser.add_argument("--selection", default="max", choices=["kv_head", "max"])
    parser.add_argument("--keys", default="real", choices=DISTRIBUTIONS)
    parser.add_argument("--name", default="drafts_gpu", help="result file")
    args = parser.parse_args()
    cells = cells_of(parser, args.cells)
    torch.manual_seed(0)
    backend, record = CudaBackend(), {"environment": environment(), "keys": args.keys, "cells": []}
    for length, requests in cells:
        copies = min(8, copies_of(LLAMA, length, requests))
        pool = Pool(LLAMA, length, requests, copies)
        generator = torch.Generator("cuda").manual_seed(0)
        contexts = Contexts(args.keys, LLAMA, length, copies * requests, generator)
        pool.fill(backend, contexts)
        for positions in args.positions:
            one = measure(backend, pool, contexts, positions, args.selection)
            cell = {"context": length, "requests": requests, "positions": positions, **one}
            record["cells"].append(cell)
        save(args.name, record)
        del pool, contexts  # before the next ones are allocated
    print(plain(*table(record["cells"])))


def table(cells: list[dict]) -> tuple[list[str], list[list]]:
    """Headers and rows: both times, each over that of the fewest positions, their ratio, and every way to take the step."""
    rows = []
    for cell in cells:
        same = [c for c in cells if all(c[k] == cell[k] for k in ("context", "requests"))]
        least = min(same, key=lambda c: c["positions"])
        row = [cell["context"], cell["requests"], cell["positions"]]
        for name in (FA3, "adamas"):
            us = cell[name]["us"]
            row.append(f"{us:.1f} ({us / least[name]['us']:.2f}x)")
        row += [f"{cell[FA3]['us'] / cell['adamas']['us']:.2f}x", WAYS[cell["runs"]]]
        rows.append([*row, *(f"{cell[way]['us']:.1f}" if way in cell else "–" for way in WAYS)])
    return [
        "context",
        "requests",
        "positions",
        "FlashAttention 3 µs",
        "adamas µs",
        "speed-up",
        "runs as",
        *(f"{name} µs" for name in WAYS.values()),
    ], rows


if __name__ == "__main__":
    main()
