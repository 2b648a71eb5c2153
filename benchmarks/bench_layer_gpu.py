"""Decode attention between the other kernels of a layer on a Hopper GPU: adamas and FlashAttention 3 in one run.

`bench_decode_gpu.py` calls one step after another, so that the instructions of the kernel are still in the caches of the
multiprocessors. In a model every layer reads its weights in between, hundreds of megabytes, by other kernels: not only K
and V but the instructions too are then read from memory. Here each step follows the matrix products of a layer in
Llama-3.1-8B's shape and the write of the step's own keys and values. What the step takes is the time of a graph with it
less that of the same graph without it.

    python benchmarks/bench_layer_gpu.py
"""

from __future__ import annotations

import argparse

import torch
from bench_decode_gpu import (
    BLOCK_SIZE,
    DTYPE,
    LLAMA,
    PEERS,
    SETS,
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
from vllm_adamas.tables import plain

CELLS = ("8192x1", "8192x8", "8192x32", "32768x1", "32768x8", "32768x32", "131072x1", "131072x8")
COPIES = 16  #: most steps of a graph
HIDDEN, INNER = 4096, 14336  #: of Llama-3.1-8B
FA3 = "fa3"


class Matrices:
    """The matrix products of a layer for some rows; they read 436 MB."""

    def __init__(self, rows: int):
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=DTYPE, device="cuda") * 0.01

        self._row = random(rows, HIDDEN)
        widths = (HIDDEN + 2 * LLAMA.kv * LLAMA.size, HIDDEN), (HIDDEN, HIDDEN)
        self._weights = [
            random(*shape) for shape in (*widths, (2 * INNER, HIDDEN), (HIDDEN, INNER))
        ]

    def __call__(self) -> None:
        x = self._row
        for weight in self._weights:
            x = torch.nn.functional.linear(x[:, : weight.shape[1]], weight)


def added(before: list, calls: list) -> dict:
    """What a call adds after ``before``, in µs, and what it takes after calls of its own kind alone."""

    def joined(*lists: list) -> list:
        return [lambda each=each: [call() for call in each] for each in zip(*lists, strict=True)]

    with_it, without = timed(joined(before, calls)), timed(before)
    spread = with_it["q3"] - with_it["q1"] + without["q3"] - without["q1"]
    return {
        "us": round(with_it["us"] - without["us"], 2),
        "spread_us": round(spread, 2),
        "alone_us": timed(calls)["us"],
    }


def measure(backend, pool: Pool, contexts: Contexts, matrices: Matrices) -> dict:
    """One cell: each step after the products, and for adamas after the write of its keys and values."""
    rows, launch = pool.rows, launch_of(pool.length, "server")
    queries = list(contexts.query.to(DTYPE).unflatten(0, (pool.copies, rows)))
    found = {}
    if pool.dense:
        ways = PEERS[FA3].prepare(pool.cell(launch))
        tried = [added([matrices] * pool.copies, make()) for make in ways.values()]
        found[FA3] = min(tried, key=lambda one: one["us"])
    key = torch.randn(rows, LLAMA.kv, LLAMA.size, dtype=DTYPE, device="cuda")
    slots = [table[:, -1].long() * BLOCK_SIZE + BLOCK_SIZE - 1 for table in pool.tables()]
    for selection in ("kv_head", "max"):
        layer = pool.layer(backend, "dot", selection)

        def before(layer=layer):
            def call(slot):
                matrices()
                backend.append(layer, key, key, slot)

            return [lambda slot=slot: call(slot) for slot in slots]

        steps = Steps(backend, pool, layer, queries, launch)
        found[f"dot {selection}"] = added(before(), steps.calls())
        if FA3 in found:
            result = found[f"dot {selection}"]
            result["speedup"] = round(found[FA3]["us"] / result["us"], 2)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", nargs="+", default=CELLS, help="CONTEXTxROWS, as in 32768x8")
    parser.add_argument("--keys", nargs="+", default=["gaussian", "real"], choices=DISTRIBUTIONS)
    parser.add_argument("--no-fa3", action="store_true", help="measure adamas alone, without vLLM")
    parser.add_argument("--name", default="layer_gpu", help="result file")
    args = parser.parse_args()
    cells = cells_of(parser, args.cells)
    torch.manual_seed(0)
    backend, record = CudaBackend(), {"environment": environment(), "cells": []}
    for length, rows in cells:
        copies = min(COPIES, copies_of(LLAMA, length, rows))
        matrices = Matrices(rows)
        pool = Pool(LLAMA, length, rows, copies, dense=not args.no_fa3)
        for keys in args.keys:
            generator = torch.Generator("cuda").manual_seed(0)
            contexts = Contexts(keys, LLAMA, length, copies * rows, generator)
            pool.fill(backend, contexts)
            cell = {"context": length, "rows": rows, "keys": keys, "copies": copies}
            cell |= measure(backend, pool, contexts, matrices)
            record["cells"].append(cell)
            print(plain(*table(record["cells"][-1:])), end="\n\n", flush=True)
        save(args.name, record)
        del pool, contexts  # before the next ones are allocated


def table(cells: list[dict]) -> tuple[list[str], list[list]]:
    """Headers and rows: what a step takes in a layer, and alone in brackets."""
    names = [name for name in (FA3, *(f"dot {way}" for way in SETS)) if name in cells[0]]
    rows = []
    for cell in cells:
        row = [cell["context"], cell["rows"], cell["keys"]]
        for name in names:
            one = cell[name]
            speedup = f" {one['speedup']:.2f}x" if "speedup" in one else ""
            row.append(f"{one['us']:.1f} ({one['alone_us']:.1f}){speedup}")
        rows.append(row)
    return ["context", "rows", "keys", *(f"{name} µs (alone)" for name in names)], rows


if __name__ == "__main__":
    main()
