"""Decode of a dense layer on a Hopper GPU: the kernels' dense rows beside FlashAttention over the page.

Both read the same pages through the same block tables inside a CUDA graph that is valid for contexts
up to `MAX_CONTEXT`, as a server captures it. The third column is FlashAttention over a cache of its own
layout with the exact bound: what a dense layer can cost at best.
"""

from __future__ import annotations

import argparse

import torch
from bench_decode_gpu import HEAD_SIZE, KV_HEADS, QUERY_HEADS, Pool, bench_fa3, params_of, timed
from common import gpu_hardware, save

from vllm_adamas.backends.cuda import CudaBackend
from vllm_adamas.prefill_flash import FlashPrefill

CELLS = ("1024x1", "1024x32", "8192x1", "8192x8", "32768x1", "32768x8", "32768x22", "131072x5")
MAX_CONTEXT = 131072
WORKING_SET = 200 << 20  # bytes that one graph touches, several times the L2 cache


def measure(backend, flash, pool, length: int, rows: int) -> dict:
    params = params_of(pool.layout, "dot", "kv_head")
    lens = torch.full((rows,), length, dtype=torch.int32, device="cuda")
    starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
    stats = torch.zeros(4, dtype=torch.int64, device="cuda")
    dense_bytes = length * rows * KV_HEADS * HEAD_SIZE * 4
    copies = max(2, -(-WORKING_SET // dense_bytes))
    tables = pool.tables(length, rows, copies, pool.layout.block_size)
    queries = [
        torch.randn(rows, QUERY_HEADS, HEAD_SIZE, device="cuda").to(pool.layout.dtype)
        for _ in tables
    ]
    outputs = {name: [torch.empty_like(q) for q in queries] for name in ("kernels", "flash")}
    backend.reserve(params, rows, MAX_CONTEXT)
    args = list(zip(queries, tables, outputs["kernels"], outputs["flash"], strict=True))

    def kernels(q, t, o):
        backend.decode(params, q, pool.pages, t, lens, lens, o, stats, max_context_len=MAX_CONTEXT)

    def through_page(q, t, o):
        flash.decode(params, q, pool.pages, t, lens, starts, o, MAX_CONTEXT)

    cell = {"context": length, "rows": rows}
    cell["kernels"] = timed([lambda q=q, t=t, o=o: kernels(q, t, o) for q, t, o, _ in args])
    cell["flash"] = timed([lambda q=q, t=t, o=o: through_page(q, t, o) for q, t, _, o in args])
    cell["flash_own_layout"] = bench_fa3(pool, length, rows, copies)
    for a, b in zip(*outputs.values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-2)
    for name in ("kernels", "flash", "flash_own_layout"):
        cell[name]["GBps"] = round(dense_bytes / cell[name]["us"] / 1e3)
    shown = "  ".join(
        f"{n} {cell[n]['us']:.1f} us {cell[n]['GBps']} GB/s"
        for n in ("kernels", "flash", "flash_own_layout")
    )
    print(f"{length:>7} x {rows:<3} {shown}", flush=True)
    return cell


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", default=CELLS, help="CONTEXTxROWS")
    parser.add_argument("--name", default="dense_gpu", help="result file")
    args = parser.parse_args()
    torch.manual_seed(0)
    backend, flash = CudaBackend(), FlashPrefill()
    pool = Pool(backend)
    cells = [measure(backend, flash, pool, *map(int, cell.split("x"))) for cell in args.cells]
    result = {"hardware": gpu_hardware(), "max_context": MAX_CONTEXT, "cells": cells}
    print("wrote", save(args.name, result))


if __name__ == "__main__":
    main()
