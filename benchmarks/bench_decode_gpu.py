"""Decode attention of one layer on a Hopper GPU: adamas beside FlashAttention 3, in one run.

Every cell is a CUDA graph of several decode calls over different blocks and queries, together larger
than the L2 cache; the time of a call is the median over replays. `read` is the measured ceiling: a
plain read of the signature planes through the same block tables. Stages are differences between
graphs with one, two and three of the kernels.

FlashAttention 3 comes from an installed vLLM and is called as vLLM calls it for decode, on a cache of
its own layout, with and without a prepared schedule; the faster one counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path

import torch
import triton
import triton.language as tl

from vllm_adamas.backends.base import Params
from vllm_adamas.backends.cuda import CudaBackend
from vllm_adamas.config import AdamasConfig
from vllm_adamas.layout import PageLayout

RESULTS = Path(__file__).parent / "results" / "decode_gpu.json"
DTYPE = torch.bfloat16
QUERY_HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, BUDGET = 32, 8, 128, 64, 256
CELLS = [
    (8192, 1),
    (8192, 8),
    (8192, 32),
    (32768, 1),
    (32768, 8),
    (32768, 32),
    (131072, 1),
    (131072, 8),
]
SELECTIONS = ("query_head", "kv_head")
WORKING_SET = 200 << 20  # bytes that one graph touches, several times the L2 cache
POOL_TOKENS = 1 << 20
REPLAYS, WARMUP = 25, 5


@triton.jit
def _read_planes(
    pages,
    table,
    out,
    stride_block,
    stride_head,
    stride_row,
    first,
    words,
    blocks,
    WORDS: tl.constexpr,
):
    """Sums the signature planes of four blocks; the sum is never the value that would be stored."""
    row, head = tl.program_id(1), tl.program_id(2)
    at = tl.arange(0, WORDS)
    total = tl.zeros((WORDS,), tl.int32)
    for i in tl.static_range(4):
        block = tl.program_id(0) * 4 + i
        index = tl.load(table + row * stride_row + block, mask=block < blocks, other=0).to(tl.int64)
        run = pages + index * stride_block + head * stride_head + first
        total += tl.load(run + at, mask=(at < words) & (block < blocks), other=0)
    result = tl.sum(total)
    if result == 123456789:
        tl.store(out, result)


def graph_of(calls) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def timed(calls, replays: int = REPLAYS) -> dict:
    """Median microseconds of one call, and the quartiles over replays."""
    graph = graph_of(calls)
    times = []
    for i in range(WARMUP + replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= WARMUP:
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    low, median, high = statistics.quantiles(times, n=4)
    return {"us": round(median, 2), "q1": round(low, 2), "q3": round(high, 2)}


class Pool:
    """Random keys and values in adamas pages and in a dense cache of FlashAttention's layout."""

    def __init__(self, backend, fa_block: int = 16, dense: bool = True):
        self.layout = PageLayout(HEAD_SIZE, BLOCK_SIZE, DTYPE)
        blocks = POOL_TOKENS // BLOCK_SIZE
        content = self.layout.token_bytes // DTYPE.itemsize
        self.pages = torch.zeros(blocks, KV_HEADS, BLOCK_SIZE, content, dtype=DTYPE, device="cuda")
        shape = (POOL_TOKENS // fa_block, fa_block, KV_HEADS, HEAD_SIZE)
        if dense:
            self.k, self.v = (torch.empty(shape, dtype=DTYPE, device="cuda") for _ in range(2))
        self.fa_block = fa_block
        params = params_of(self.layout, "dot", "query_head")
        step = 1 << 16
        for start in range(0, POOL_TOKENS, step):
            key, value = (
                torch.randn(step, KV_HEADS, HEAD_SIZE, device="cuda").to(DTYPE) for _ in range(2)
            )
            slots = torch.arange(start, start + step, device="cuda")
            backend.append(params, key, value, self.pages, slots)
            if dense:
                self.k.view(-1, KV_HEADS, HEAD_SIZE)[start : start + step] = key
                self.v.view(-1, KV_HEADS, HEAD_SIZE)[start : start + step] = value

    def tables(self, length: int, rows: int, copies: int, block_size: int) -> list[torch.Tensor]:
        """One shuffled block table per copy; copies are disjoint as long as the pool lasts."""
        per_row = length // block_size
        order = torch.randperm(POOL_TOKENS // block_size, device="cuda").to(torch.int32)
        need = rows * per_row
        tables = []
        for i in range(copies):
            at = i * need % (len(order) - need + 1)
            tables.append(order[at : at + need].view(rows, per_row).contiguous())
        return tables


def params_of(layout: PageLayout, score: str, selection: str) -> Params:
    config = AdamasConfig(score=score, selection=selection, token_budget=BUDGET)
    return Params.of(
        config,
        layout,
        num_query_heads=QUERY_HEADS,
        num_kv_heads=KV_HEADS,
        softmax_scale=HEAD_SIZE**-0.5,
    )


def signature_bytes(length: int, rows: int) -> int:
    return length * rows * KV_HEADS * (HEAD_SIZE // 4 + 2)


def attended_bytes(rows: int, selection: str) -> int:
    sets = QUERY_HEADS if selection == "query_head" else KV_HEADS
    return rows * sets * BUDGET * 2 * HEAD_SIZE * DTYPE.itemsize


def bench_read(pool, length, rows, copies):
    """The signature planes of a block lie back to back, the scales behind them."""
    layout = pool.layout
    runs = layout.runs(pool.pages).view(torch.int32)
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    words = BLOCK_SIZE * (HEAD_SIZE // 4 + 2) // 4
    blocks = length // BLOCK_SIZE
    grid = (triton.cdiv(blocks, 4), rows, KV_HEADS)

    def call(table):
        _read_planes[grid](
            runs, table, out, runs.stride(0), runs.stride(1), table.stride(0), layout.hi_offset // 4,
            words, blocks, WORDS=triton.next_power_of_2(words), num_warps=4,
        )  # fmt: skip

    tables = pool.tables(length, rows, copies, BLOCK_SIZE)
    return timed([lambda t=t: call(t) for t in tables])


def bench_adamas(backend, pool, length, rows, copies, score, selection):
    params = params_of(pool.layout, score, selection)
    lens = torch.full((rows,), length, dtype=torch.int32, device="cuda")
    budgets = torch.full((rows,), BUDGET, dtype=torch.int32, device="cuda")
    stats = torch.zeros(4, dtype=torch.int64, device="cuda")
    tables = pool.tables(length, rows, copies, BLOCK_SIZE)
    queries = [torch.randn(rows, QUERY_HEADS, HEAD_SIZE, device="cuda").to(DTYPE) for _ in tables]
    outputs = [torch.empty_like(q) for q in queries]
    backend.reserve(params, rows, length)

    def calls(stages):
        return [
            lambda q=q, t=t, o=o: backend.decode(
                params,
                q,
                pool.pages,
                t,
                lens,
                budgets,
                o,
                stats,
                max_context_len=length,
                stages=stages,
            )
            for q, t, o in zip(queries, tables, outputs, strict=True)
        ]

    whole = timed(calls(7))
    encode, encode_scan = timed(calls(1))["us"], timed(calls(3))["us"]
    whole["encode_us"] = encode
    whole["scan_us"] = round(encode_scan - encode, 2)
    whole["attend_us"] = round(whole["us"] - encode_scan, 2)
    whole["GBps"] = round(
        (signature_bytes(length, rows) + attended_bytes(rows, selection)) / whole["us"] / 1e3
    )
    return whole


def bench_fa3(pool, length, rows, copies):
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    lens = torch.full((rows,), length, dtype=torch.int32, device="cuda")
    starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
    tables = pool.tables(length, rows, copies, pool.fa_block)
    queries = [torch.randn(rows, QUERY_HEADS, HEAD_SIZE, device="cuda").to(DTYPE) for _ in tables]
    outputs = [torch.empty_like(q) for q in queries]
    plan = get_scheduler_metadata(
        batch_size=rows, max_seqlen_q=1, max_seqlen_k=length, num_heads_q=QUERY_HEADS,
        num_heads_kv=KV_HEADS, headdim=HEAD_SIZE, cache_seqlens=lens, qkv_dtype=DTYPE,
        cu_seqlens_q=starts, page_size=pool.fa_block, causal=True, num_splits=32,
    )  # fmt: skip

    def calls(**extra):
        return [
            lambda q=q, t=t, o=o: flash_attn_varlen_func(
                q=q, k=pool.k, v=pool.v, out=o, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=lens,
                max_seqlen_k=length, softmax_scale=HEAD_SIZE**-0.5, causal=True, block_table=t,
                fa_version=3, **extra,
            )
            for q, t, o in zip(queries, tables, outputs, strict=True)
        ]  # fmt: skip

    variants = {
        "own schedule": timed(calls()),
        "prepared schedule": timed(calls(scheduler_metadata=plan, num_splits=32)),
    }
    name = min(variants, key=lambda n: variants[n]["us"])
    best = variants[name]
    best["variant"] = name
    best["all_us"] = {n: v["us"] for n, v in variants.items()}
    dense = rows * length * KV_HEADS * HEAD_SIZE * 2 * DTYPE.itemsize
    best["GBps"] = round(dense / best["us"] / 1e3)
    return best


def environment() -> dict:
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    versions = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }
    try:
        import vllm

        versions["vllm"] = vllm.__version__
    except ImportError:
        pass
    return {"gpu": smi.split(",")[0], "driver": smi.split(",")[-1].strip(), **versions}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-fa3", action="store_true", help="measure adamas alone")
    parser.add_argument("--score", nargs="+", default=["dot", "manhattan"])
    parser.add_argument("--cells", nargs="+", help="LENGTHxROWS, default: all")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    cells = CELLS if not args.cells else [tuple(map(int, c.split("x"))) for c in args.cells]

    torch.manual_seed(0)
    backend = CudaBackend()
    pool = Pool(backend, dense=not args.no_fa3)
    record = {
        "environment": environment(),
        "setting": {
            "dtype": "bf16", "query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "head_size": HEAD_SIZE,
            "block_size": BLOCK_SIZE, "budget": BUDGET, "replays": REPLAYS,
        },
        "cells": [],
    }  # fmt: skip
    print(json.dumps(record["environment"]))
    print(
        f"{'context':>8} {'rows':>4} {'what':24} {'us':>8} {'q1..q3':>17} {'GB/s':>6} {'speed-up':>8}  stages (us)"
    )
    for length, rows in cells:
        copies = max(2, -(-WORKING_SET // signature_bytes(length, rows)))
        cell = {"context": length, "rows": rows, "copies": copies}
        cell["read"] = bench_read(pool, length, rows, copies)
        cell["read"]["GBps"] = round(signature_bytes(length, rows) / cell["read"]["us"] / 1e3)
        show(length, rows, "read signatures", cell["read"])
        if not args.no_fa3:
            cell["fa3"] = bench_fa3(pool, length, rows, copies)
            show(length, rows, "FlashAttention 3", cell["fa3"])
        for score in args.score:
            for selection in SELECTIONS:
                name = f"{score} {selection}"
                cell[name] = bench_adamas(backend, pool, length, rows, copies, score, selection)
                if "fa3" in cell:
                    cell[name]["speedup"] = round(cell["fa3"]["us"] / cell[name]["us"], 2)
                show(length, rows, name, cell[name])
        record["cells"].append(cell)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.output}")


def show(length, rows, name, r):
    stages = " ".join(f"{k[:-3]} {r[k]}" for k in ("encode_us", "scan_us", "attend_us") if k in r)
    speedup = f"{r['speedup']:7.2f}x" if "speedup" in r else " " * 8
    print(
        f"{length:8} {rows:4} {name:24} {r['us']:8.1f} {r['q1']:8.1f}{r['q3']:9.1f} {r['GBps']:6} "
        f"{speedup}  {stages}",
        flush=True,
    )


if __name__ == "__main__":
    main()
