"""The CUDA kernels for other NVIDIA GPUs beside Triton's, on the GPU at hand, in one run.

On Hopper the library for other GPUs runs where it was built for it (`ADAMAS_CUDA_ARCHS=90a,90`), and Hopper's own kernels
are timed as well.

    python benchmarks/bench_targets_gpu.py
"""

from __future__ import annotations

import argparse

import torch
from bench_decode_gpu import (
    DTYPE,
    LLAMA,
    SELECTIONS,
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
from vllm_adamas.backends.cuda.library import FOR_HOPPER, FOR_OTHERS
from vllm_adamas.backends.triton import TritonBackend
from vllm_adamas.tables import plain

CELLS = ("8192x1", "8192x8", "32768x1", "32768x8", "32768x32", "131072x1")
TRITON = "triton"
ROUNDING = 0.02  #: of the largest output


def backends() -> dict:
    found = {FOR_OTHERS: CudaBackend(FOR_OTHERS), TRITON: TritonBackend()}
    if torch.cuda.get_device_capability() == (9, 0):
        found[FOR_HOPPER] = CudaBackend(FOR_HOPPER)
    return found


def measure(found: dict, pool: Pool, contexts: Contexts, selection: str) -> dict:
    """One step by each backend, in µs. Their outputs must be equal but for rounding."""
    launch = launch_of(pool.length, "server")
    queries = list(contexts.query.to(DTYPE).unflatten(0, (pool.copies, pool.rows)))
    times, expected = {}, None
    for name, backend in found.items():
        steps = Steps(backend, pool, pool.layer(backend, "dot", selection), queries, launch)
        times[name] = timed(steps.calls())
        output = torch.stack(steps.outputs)
        expected = output if expected is None else expected
        error = (output - expected).abs().max() / expected.abs().max()
        if not error < ROUNDING:
            raise AssertionError(f"{name} and {next(iter(found))} differ by {error:.3f}")
    return times


def table(cells: list[dict]) -> tuple[list[str], list[list]]:
    """Headers and rows: microseconds, and how many times as long as the library for other GPUs Triton takes."""
    rows = []
    for cell in cells:
        us = {name: cell[name]["us"] for name in (TRITON, FOR_OTHERS, FOR_HOPPER) if name in cell}
        row = [f"{cell['context'] // 1024}K x {cell['rows']}", cell["keys"], cell["selection"]]
        row += [
            f"{us[name]:.1f}" if name in us else "" for name in (TRITON, FOR_OTHERS, FOR_HOPPER)
        ]
        rows.append([*row, f"{us[TRITON] / us[FOR_OTHERS]:.2f}x"])
    headers = [
        "context x rows",
        "keys",
        "selection",
        "Triton µs",
        "for other GPUs µs",
        "Hopper's own µs",
    ]
    return [*headers, "Triton / other"], rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", nargs="+", default=CELLS, help="CONTEXTxROWS, as in 32768x8")
    parser.add_argument("--selections", nargs="+", default=SELECTIONS, choices=SELECTIONS)
    parser.add_argument("--keys", nargs="+", default=["real"], choices=DISTRIBUTIONS)
    parser.add_argument("--name", default="targets_gpu", help="result file")
    args = parser.parse_args()
    cells = cells_of(parser, args.cells)
    torch.manual_seed(0)
    found, record = backends(), {"environment": environment(), "cells": []}
    for length, rows in cells:
        copies = min(8, copies_of(LLAMA, length, rows))
        pool = Pool(LLAMA, length, rows, copies, dense=False)
        for keys in args.keys:
            generator = torch.Generator("cuda").manual_seed(0)
            contexts = Contexts(keys, LLAMA, length, copies * rows, generator)
            pool.fill(found[FOR_OTHERS], contexts)
            for selection in args.selections:
                cell = {"context": length, "rows": rows, "keys": keys, "selection": selection}
                record["cells"].append(cell | measure(found, pool, contexts, selection))
        save(args.name, record)
        del pool, contexts  # before the next ones are allocated
    print(plain(*table(record["cells"])))


if __name__ == "__main__":
    main()
