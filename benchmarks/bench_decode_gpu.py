"""Decode attention of one layer on a Hopper GPU: adamas and FlashAttention 3 in one run.

Every cell is a CUDA graph of several decode calls over different blocks and queries that together exceed
the L2 cache; the time of a call is the median over replays. `read` is the measured upper bound: a plain
read of the signature planes through the same block tables. Times of stages are differences between graphs
with one, two and three of the kernels. The fused kernel is measured as well; a star marks the policy's
choice.

The peers, one file each in `peers`, read a dense cache of the same keys and values. If a peer can be called
in several ways, the fastest counts. Speed-ups are relative to FlashAttention 3.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl
from common import environment
from peers import PEERS
from peers.base import Cell, Peer

from vllm_adamas.backends.base import DecodeBatch, Params
from vllm_adamas.backends.cuda.backend import CudaBackend, CudaLayer
from vllm_adamas.config import AdamasConfig
from vllm_adamas.layout import PageLayout
from vllm_adamas.tables import plain

RESULTS = Path(__file__).parent / "results" / "decode_gpu.json"
DTYPE = torch.bfloat16
QUERY_HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, BUDGET = 32, 8, 128, 64, 256
SELECTIONS = ("query_head", "kv_head")
K = 1024
#: (context, rows) of the cells in each part of the record.
CELLS = {
    "cells": [
        (n * K, rows) for n, r in ((8, (1, 8, 32)), (32, (1, 8, 32)), (128, (1, 8))) for rows in r
    ],
    "budgets": [(32 * K, 1), (32 * K, 8)],
    "contexts": [(n * K, 1) for n in (4, 16, 64, 256, 512, 1024)],
    "mha": [(n * K, 1) for n in (8, 16, 32)],
    "fp8": [(32 * K, 1), (32 * K, 8)],
}
BUDGETS = (64, 128, 512, 1024)
WORKING_SET = 200 << 20  # bytes that one graph touches, several times the L2 cache
POOL_TOKENS = 1 << 20
REPLAYS, WARMUP = 25, 5
BASELINE, *OTHERS = PEERS
HEADERS = ("context", "rows", "what", "us", "q1", "q3", "GB/s", "speed-up", "stages (us)")


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
    """Sums the signature planes of four blocks; the store never happens but keeps the loads alive."""
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


def captured(calls) -> torch.cuda.CUDAGraph:
    """A CUDA graph of calls, each of which has run once before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # until tables and queries are ready
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
    """Microseconds of one call: median and quartiles over replays."""
    graph = captured(calls)
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
    """Random keys and values in adamas pages, and in a dense cache ``[tokens, Hkv, D]``."""

    def __init__(self, backend, kv_heads=KV_HEADS, tokens=POOL_TOKENS, dense=True, fp8=None):
        self.kv_heads, self.tokens, self.fp8 = kv_heads, tokens, fp8
        self.layout = PageLayout(HEAD_SIZE, BLOCK_SIZE, torch.uint8 if fp8 else DTYPE)
        content = self.layout.token_bytes // self.layout.dtype.itemsize
        blocks = tokens // BLOCK_SIZE
        self.pages = torch.zeros(
            blocks, kv_heads, BLOCK_SIZE, content, dtype=self.layout.dtype, device="cuda"
        )
        shape = (tokens, kv_heads, HEAD_SIZE)
        if dense:
            self.k, self.v = (torch.empty(shape, dtype=DTYPE, device="cuda") for _ in range(2))
        layer, step = self.layer(backend, "dot", "query_head"), 1 << 15
        for start in range(0, tokens, step):
            key, value = (
                torch.randn(step, kv_heads, HEAD_SIZE, device="cuda").to(DTYPE) for _ in range(2)
            )
            slots = torch.arange(start, start + step, device="cuda")
            backend.append(layer, key, value, slots)
            if dense:
                self.k[start : start + step] = key
                self.v[start : start + step] = value

    def params(self, score: str, selection: str, budget: int = BUDGET) -> Params:
        return Params.of(
            AdamasConfig(score=score, selection=selection, token_budget=budget),
            self.layout,
            num_query_heads=QUERY_HEADS,
            num_kv_heads=self.kv_heads,
            softmax_scale=HEAD_SIZE**-0.5,
            fp8=self.fp8,
        )

    def layer(self, backend, score: str, selection: str, budget: int = BUDGET) -> CudaLayer:
        return backend.bind(self.params(score, selection, budget), self.pages)

    def signature_bytes(self, length: int, rows: int) -> int:
        return length * rows * self.kv_heads * (HEAD_SIZE // 4 + 2)

    def attended_bytes(self, rows: int, selection: str, budget: int) -> int:
        sets = QUERY_HEADS if selection == "query_head" else self.kv_heads
        return rows * sets * budget * 2 * HEAD_SIZE * self.layout.dtype.itemsize

    def dense_rate(self, result: dict, length: int, rows: int) -> dict:
        """A result of :func:`timed` with the rate of reading K and V of whole contexts."""
        moved = rows * length * self.kv_heads * HEAD_SIZE * 2 * DTYPE.itemsize
        return result | {"GBps": round(moved / result["us"] / 1e3)}

    def cell(self, length: int, rows: int, copies: int) -> Cell:
        """The dense cache and ``copies`` steps over it, for peers."""

        def block_tables(block_size: int) -> list[torch.Tensor]:
            return self.tables(length, rows, copies, block_size)

        return Cell(self.k, self.v, block_tables, QUERY_HEADS, length, rows)

    def tables(self, length: int, rows: int, copies: int, block_size: int) -> list[torch.Tensor]:
        """One shuffled block table per copy; copies are disjoint if the pool is large enough."""
        per_row = length // block_size
        order = torch.randperm(self.tokens // block_size, device="cuda").to(torch.int32)
        need = rows * per_row
        tables = []
        for i in range(copies):
            at = i * need % (len(order) - need + 1)
            tables.append(order[at : at + need].view(rows, per_row).contiguous())
        return tables


def bench_read(pool, length, rows, copies):
    """Times a plain read of the signature planes and the scales, which follow each other in a block."""
    layout = pool.layout
    runs = layout.runs(pool.pages).view(torch.int32)
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    words = BLOCK_SIZE * (HEAD_SIZE // 4 + 2) // 4
    blocks = length // BLOCK_SIZE
    grid = (triton.cdiv(blocks, 4), rows, pool.kv_heads)

    def call(table):
        _read_planes[grid](
            runs, table, out, runs.stride(0), runs.stride(1), table.stride(0), layout.hi_offset // 4,
            words, blocks, WORDS=triton.next_power_of_2(words), num_warps=4,
        )  # fmt: skip

    tables = pool.tables(length, rows, copies, BLOCK_SIZE)
    result = timed([lambda t=t: call(t) for t in tables])
    result["GBps"] = round(pool.signature_bytes(length, rows) / result["us"] / 1e3)
    return result


def bench_adamas(backend, pool, length, rows, copies, score, selection, budget, stages) -> dict:
    """Times the three kernels and the fused one; ``runs`` is the policy's choice."""
    layer = pool.layer(backend, score, selection, budget)
    lens = torch.full((rows,), length, dtype=torch.int32, device="cuda")
    budgets = torch.full((rows,), budget, dtype=torch.int32, device="cuda")
    stats = torch.zeros(4, dtype=torch.int64, device="cuda")
    tables = pool.tables(length, rows, copies, BLOCK_SIZE)
    queries = [torch.randn(rows, QUERY_HEADS, HEAD_SIZE, device="cuda").to(DTYPE) for _ in tables]
    outputs = [torch.empty_like(q) for q in queries]
    steps = [DecodeBatch(table, lens, budgets, length, overlap=True) for table in tables]
    backend.reserve(layer.params, rows, length)

    def calls(**how):
        return [
            lambda q=q, s=s, o=o: backend.decode(layer, q, s, o, stats, **how)
            for q, s, o in zip(queries, steps, outputs, strict=True)
        ]

    moved = pool.signature_bytes(length, rows) + pool.attended_bytes(rows, selection, budget)
    result = {"three": timed(calls(cluster=0))}
    chosen = backend.plan(layer, rows, DTYPE, length).cluster
    cluster = backend.largest_cluster(layer, rows, DTYPE, length)
    if cluster:
        result["fused"] = timed(calls(cluster=cluster)) | {"cluster": cluster}
    if stages:
        encode, encode_scan = (timed(calls(cluster=0, stages=n))["us"] for n in (1, 3))
        three = result["three"]
        three["encode_us"], three["scan_us"] = encode, round(encode_scan - encode, 2)
        three["attend_us"] = round(three["us"] - encode_scan, 2)
    for one in result.values():
        one["GBps"] = round(moved / one["us"] / 1e3)
    result["runs"] = "fused" if chosen else "three"
    return result


def bench_peer(peer: Peer, pool, length, rows, copies) -> dict:
    """Times a peer in its fastest way; also records the times of all ways if it has several."""
    ways = peer.prepare(pool.cell(length, rows, copies))
    times = {name: timed(make()) for name, make in ways.items()}
    name, best = min(times.items(), key=lambda item: item[1]["us"])
    if len(times) > 1:
        best |= {"variant": name, "all_us": {n: one["us"] for n, one in times.items()}}
    return pool.dense_rate(best, length, rows)


class Bench:
    """One run; the baseline is measured once per shape, in the same process."""

    def __init__(self, dense: bool, peers: list[str], scores: list[str]):
        self.backend, self.dense, self.scores = CudaBackend(), dense, scores
        self.peers = [PEERS[name] for name in peers if dense and PEERS[name].available()]
        self.baselines: dict[tuple[int, int, int], dict] = {}

    def cell(self, pool, length, rows, scores, budget=BUDGET, read=False) -> dict:
        copies = max(2, -(-WORKING_SET // pool.signature_bytes(length, rows)))
        cell = {"context": length, "rows": rows, "copies": copies, "budget": budget}
        if read:
            cell["read"] = bench_read(pool, length, rows, copies)
        key = (pool.kv_heads, length, rows)
        if self.dense and key not in self.baselines and not pool.fp8:
            self.baselines[key] = bench_peer(PEERS[BASELINE], pool, length, rows, copies)
        if key in self.baselines:
            cell[BASELINE] = self.baselines[key]
        for peer in list(self.peers) if read else ():
            try:
                cell[peer.name] = bench_peer(peer, pool, length, rows, copies)
            except Exception as error:  # third-party code, which may not run here
                print(f"{peer.title} is left out: {error}")
                self.peers.remove(peer)
            else:
                compare(cell, cell[peer.name])
        for score in scores:
            for selection in SELECTIONS:
                args = (self.backend, pool, length, rows, copies, score, selection, budget, read)
                result = cell[f"{score} {selection}"] = bench_adamas(*args)
                for kernels in ("three", "fused"):
                    if kernels in result:
                        compare(cell, result[kernels])
        print(plain(HEADERS, list(lines(cell))), end="\n\n", flush=True)
        return cell

    def part(self, name: str, cells: list[tuple[int, int]]) -> list[dict]:
        dense = self.dense and name != "fp8"
        tokens = max(POOL_TOKENS, *(length * rows for length, rows in cells))
        heads = QUERY_HEADS if name == "mha" else KV_HEADS
        pool = Pool(self.backend, heads, tokens, dense=dense, fp8="e4m3" if name == "fp8" else None)
        if name == "cells":
            return [self.cell(pool, *cell, self.scores, read=True) for cell in cells]
        budgets = BUDGETS if name == "budgets" else (BUDGET,)
        return [self.cell(pool, *cell, ["dot"], budget) for cell in cells for budget in budgets]


def compare(cell: dict, result: dict) -> None:
    """Adds the speed-up over the baseline to a result, if the baseline was measured."""
    if BASELINE in cell:
        result["speedup"] = round(cell[BASELINE]["us"] / result["us"], 2)


def lines(cell: dict) -> Iterator[list]:
    """The rows of a cell's table, under ``HEADERS``."""
    titles = {"read": "read signatures"} | {name: peer.title for name, peer in PEERS.items()}
    for key, result in cell.items():
        if key in titles:
            yield line(cell, titles[key], result)
        elif isinstance(result, dict):
            for kernels in ("three", "fused"):
                if kernels in result:
                    mark = " *" if kernels == result["runs"] else ""
                    name = f"{key} {cell['budget']} {kernels}{mark}"
                    yield line(cell, name, result[kernels])


def line(cell: dict, name: str, result: dict) -> list:
    stages = [
        f"{key.removesuffix('_us')} {result[key]}"
        for key in ("encode_us", "scan_us", "attend_us")
        if key in result
    ]
    if "cluster" in result:
        stages = [f"clusters of {result['cluster']}"]
    times = [f"{result[key]:.1f}" for key in ("us", "q1", "q3")]
    speedup = f"{result['speedup']:.2f}x" if "speedup" in result else ""
    place = [cell["context"], cell["rows"], name]
    return [*place, *times, result["GBps"], speedup, " ".join(stages)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-fa3", action="store_true", help="measure adamas alone, without vLLM")
    parser.add_argument(
        "--peers", nargs="*", default=OTHERS, choices=OTHERS, help="other peers, if installed"
    )
    parser.add_argument("--score", nargs="+", default=["dot", "manhattan"])
    parser.add_argument("--parts", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--cells", nargs="+", help="LENGTHxROWS of the part 'cells'; default: all")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.cells:
        CELLS["cells"] = [tuple(map(int, cell.split("x"))) for cell in args.cells]

    torch.manual_seed(0)
    bench = Bench(not args.no_fa3, args.peers, args.score)
    record = {
        "environment": environment([peer.distribution for peer in PEERS.values()]),
        "setting": {
            "dtype": "bf16", "query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "head_size": HEAD_SIZE,
            "block_size": BLOCK_SIZE, "budget": BUDGET, "replays": REPLAYS,
        },
    }  # fmt: skip
    print(json.dumps(record["environment"]))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.parts:
        record[name] = bench.part(name, CELLS[name])
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
