"""Decode attention of one layer on a Hopper GPU: adamas beside FlashAttention 3, in one run.

Every cell is a CUDA graph of several decode calls over different blocks and queries, together larger
than the L2 cache; the time of a call is the median over replays. `read` is the measured ceiling: a
plain read of the signature planes through the same block tables. Stages are differences between
graphs with one, two and three of the kernels. The fused kernel is measured beside them; a star marks
what the policy takes.

FlashAttention 3 comes from an installed vLLM and is called as vLLM calls it for decode, on a cache of
its own layout, with and without a prepared schedule; the faster one counts. vLLM's Triton attention and, where
they are installed, FlashInfer's decode and xformers' split-K operator read the same cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
import triton
import triton.language as tl
from peers import xformers

from vllm_adamas.backends.base import DecodeBatch, Params
from vllm_adamas.backends.cuda.backend import CudaBackend, CudaLayer
from vllm_adamas.config import AdamasConfig
from vllm_adamas.layout import PageLayout

RESULTS = Path(__file__).parent / "results" / "decode_gpu.json"
DTYPE = torch.bfloat16
QUERY_HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, BUDGET = 32, 8, 128, 64, 256
SELECTIONS = ("query_head", "kv_head")
K = 1024
#: Contexts and rows of each part of the record.
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
    side.wait_stream(torch.cuda.current_stream())  # tables and queries are ready
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

    def __init__(
        self, backend, kv_heads=KV_HEADS, tokens=POOL_TOKENS, fa_block=16, dense=True, fp8=None
    ):
        self.kv_heads, self.tokens, self.fa_block, self.fp8 = kv_heads, tokens, fa_block, fp8
        self.layout = PageLayout(HEAD_SIZE, BLOCK_SIZE, torch.uint8 if fp8 else DTYPE)
        content = self.layout.token_bytes // self.layout.dtype.itemsize
        blocks = tokens // BLOCK_SIZE
        self.pages = torch.zeros(
            blocks, kv_heads, BLOCK_SIZE, content, dtype=self.layout.dtype, device="cuda"
        )
        shape = (tokens // fa_block, fa_block, kv_heads, HEAD_SIZE)
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
                self.k.view(-1, kv_heads, HEAD_SIZE)[start : start + step] = key
                self.v.view(-1, kv_heads, HEAD_SIZE)[start : start + step] = value

    def params(self, score: str, selection: str, budget: int = BUDGET) -> Params:
        return params_of(self.layout, score, selection, self.kv_heads, self.fp8, budget)

    def layer(self, backend, score: str, selection: str, budget: int = BUDGET) -> CudaLayer:
        return backend.bind(self.params(score, selection, budget), self.pages)

    def signature_bytes(self, length: int, rows: int) -> int:
        return signature_bytes(length, rows, self.kv_heads)

    def attended_bytes(self, rows: int, selection: str, budget: int) -> int:
        sets = QUERY_HEADS if selection == "query_head" else self.kv_heads
        return rows * sets * budget * 2 * HEAD_SIZE * self.layout.dtype.itemsize

    def dense_rate(self, result: dict, length: int, rows: int) -> dict:
        """A result of :func:`timed` with the rate at which K and V of whole contexts were read."""
        moved = rows * length * self.kv_heads * HEAD_SIZE * 2 * DTYPE.itemsize
        return result | {"GBps": round(moved / result["us"] / 1e3)}

    def tables(self, length: int, rows: int, copies: int, block_size: int) -> list[torch.Tensor]:
        """One shuffled block table per copy; copies are disjoint as long as the pool lasts."""
        per_row = length // block_size
        order = torch.randperm(self.tokens // block_size, device="cuda").to(torch.int32)
        need = rows * per_row
        tables = []
        for i in range(copies):
            at = i * need % (len(order) - need + 1)
            tables.append(order[at : at + need].view(rows, per_row).contiguous())
        return tables


def params_of(layout, score: str, selection: str, kv_heads=KV_HEADS, fp8=None, budget=BUDGET):
    return Params.of(
        AdamasConfig(score=score, selection=selection, token_budget=budget),
        layout,
        num_query_heads=QUERY_HEADS,
        num_kv_heads=kv_heads,
        softmax_scale=HEAD_SIZE**-0.5,
        fp8=fp8,
    )


def signature_bytes(length: int, rows: int, kv_heads: int = KV_HEADS) -> int:
    return length * rows * kv_heads * (HEAD_SIZE // 4 + 2)


def bench_read(pool, length, rows, copies):
    """The signature planes of a block lie back to back, the scales behind them."""
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
    """The three kernels and the fused one; ``runs`` is what the policy takes."""
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


def bench_fa3(pool, length, rows, copies):
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    lens = torch.full((rows,), length, dtype=torch.int32, device="cuda")
    starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
    tables = pool.tables(length, rows, copies, pool.fa_block)
    queries = [torch.randn(rows, QUERY_HEADS, HEAD_SIZE, device="cuda").to(DTYPE) for _ in tables]
    outputs = [torch.empty_like(q) for q in queries]
    plan = get_scheduler_metadata(
        batch_size=rows, max_seqlen_q=1, max_seqlen_k=length, num_heads_q=QUERY_HEADS,
        num_heads_kv=pool.kv_heads, headdim=HEAD_SIZE, cache_seqlens=lens, qkv_dtype=DTYPE,
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
    return pool.dense_rate(fastest(variants), length, rows)


def fastest(variants: dict[str, dict]) -> dict:
    """The fastest way to call a peer, with its name and the times of all."""
    name, best = min(variants.items(), key=lambda item: item[1]["us"])
    return best | {"variant": name, "all_us": {n: v["us"] for n, v in variants.items()}}


def bench_triton(pool, length, rows, copies):
    """vLLM's Triton attention, called as its TRITON_ATTN backend calls it for decode."""
    from vllm.v1.attention.backends.triton_attn import (
        MIN_LAUNCH_GRID_SIZE_2D,
        NUM_PAR_SOFTMAX_SEGMENTS,
    )
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    lens = torch.full((rows,), length, dtype=torch.int32, device="cuda")
    starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
    threshold, segments = MIN_LAUNCH_GRID_SIZE_2D // pool.kv_heads, NUM_PAR_SOFTMAX_SEGMENTS
    output, most, total = (
        torch.empty(threshold, QUERY_HEADS, segments, *tail, device="cuda")
        for tail in ((HEAD_SIZE,), (), ())
    )
    one = torch.ones(1, device="cuda").expand(rows, pool.kv_heads)
    tables = pool.tables(length, rows, copies, pool.fa_block)
    queries = [torch.randn(rows, QUERY_HEADS, HEAD_SIZE, device="cuda").to(DTYPE) for _ in tables]
    outputs = [torch.empty_like(q) for q in queries]
    calls = [
        lambda q=q, t=t, o=o: unified_attention(
            q=q, k=pool.k, v=pool.v, out=o, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=lens,
            max_seqlen_k=length, softmax_scale=HEAD_SIZE**-0.5, causal=True, window_size=(-1, -1),
            block_table=t, softcap=0.0, q_descale=None, k_descale=one, v_descale=one,
            seq_threshold_3D=threshold, num_par_softmax_segments=segments,
            softmax_segm_output=output, softmax_segm_max=most, softmax_segm_expsum=total,
        )
        for q, t, o in zip(queries, tables, outputs, strict=True)
    ]  # fmt: skip
    return pool.dense_rate(timed(calls), length, rows)


def bench_xformers(pool, length, rows, copies):
    """xformers' split-K operator over the dense cache, in pages of BLOCK_SIZE tokens."""
    key, value = (x.view(-1, BLOCK_SIZE, pool.kv_heads, HEAD_SIZE) for x in (pool.k, pool.v))
    tables = pool.tables(length, rows, copies, BLOCK_SIZE)
    queries = [torch.randn(rows, QUERY_HEADS, HEAD_SIZE, device="cuda").to(DTYPE) for _ in tables]
    biases = [xformers.attention_bias([length] * rows, t, BLOCK_SIZE) for t in tables]
    calls = [
        lambda q=q, b=b: xformers.dense_decode(q, key, value, b, HEAD_SIZE**-0.5)
        for q, b in zip(queries, biases, strict=True)
    ]
    return pool.dense_rate(timed(calls), length, rows)


def bench_flashinfer(pool, length, rows, copies):
    """FlashInfer's paged decode over the dense cache, in pages of BLOCK_SIZE tokens: on tensor cores or CUDA
    cores, planned outside of the graph for any lengths, as engines do, or for exactly these."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    key, value = (x.view(-1, BLOCK_SIZE, pool.kv_heads, HEAD_SIZE) for x in (pool.k, pool.v))
    tables = pool.tables(length, rows, copies, BLOCK_SIZE)
    queries = [torch.randn(rows, QUERY_HEADS, HEAD_SIZE, device="cuda").to(DTYPE) for _ in tables]
    outputs = [torch.empty_like(q) for q in queries]
    # What a plan reads lies on the host.
    starts = torch.arange(rows + 1, dtype=torch.int32) * (length // BLOCK_SIZE)
    last = torch.full((rows,), BLOCK_SIZE, dtype=torch.int32)
    # Partial results of one call at a time: the calls follow each other on one stream.
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")

    def planned(table, tensor_cores, any_lengths):
        indices = table.view(-1)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_cuda_graph=any_lengths, use_tensor_cores=tensor_cores,
            paged_kv_indptr_buffer=starts.to(device="cuda"),
            paged_kv_indices_buffer=torch.empty_like(indices),
            paged_kv_last_page_len_buffer=last.to(device="cuda"),
        )  # fmt: skip
        # A plan takes less than 1 KiB of its own 8 MiB, on the GPU and again in pinned memory.
        plan_memory = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
        wrapper.reset_workspace_buffer(workspace, plan_memory)
        wrapper.plan(
            starts, indices, last, QUERY_HEADS, pool.kv_heads, HEAD_SIZE, BLOCK_SIZE,
            q_data_type=DTYPE, kv_data_type=DTYPE, sm_scale=HEAD_SIZE**-0.5,
        )  # fmt: skip
        return wrapper

    def calls(*how):
        wrappers = [planned(table, *how) for table in tables]
        return [
            lambda w=w, q=q, o=o: w.run(q, (key, value), out=o)
            for w, q, o in zip(wrappers, queries, outputs, strict=True)
        ]

    variants = {
        f"{cores} cores, {plan} plan": timed(calls(cores == "tensor", plan == "general"))
        for cores in ("tensor", "CUDA")
        for plan in ("general", "exact")
    }
    return pool.dense_rate(fastest(variants), length, rows)


#: Other dense decode kernels, by the package that they come from.
PEERS = {
    "triton": ("vLLM's Triton attention", "vllm", bench_triton),
    "flashinfer": ("FlashInfer", "flashinfer", bench_flashinfer),
    "xformers": ("xformers split-K", "xformers", bench_xformers),
}


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
    for package in ("vllm", "flashinfer-python", "xformers"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"gpu": smi.split(",")[0], "driver": smi.split(",")[-1].strip(), **versions}


class Bench:
    """One run: FlashAttention is measured once per shape, beside what is compared with it."""

    def __init__(self, fa3: bool, peers: list[str], scores: list[str]):
        self.backend, self.fa3, self.scores = CudaBackend(), fa3, scores
        self.peers = [name for name in peers if fa3 and find_spec(PEERS[name][1])]
        self.dense: dict[tuple[int, int, int], dict] = {}

    def cell(self, pool, length, rows, scores, budget=BUDGET, read=False) -> dict:
        copies = max(2, -(-WORKING_SET // pool.signature_bytes(length, rows)))
        cell = {"context": length, "rows": rows, "copies": copies, "budget": budget}
        if read:
            cell["read"] = bench_read(pool, length, rows, copies)
            show(length, rows, "read signatures", cell["read"])
        key = (pool.kv_heads, length, rows)
        if self.fa3 and key not in self.dense and not pool.fp8:
            self.dense[key] = bench_fa3(pool, length, rows, copies)
            show(length, rows, "FlashAttention 3", self.dense[key])
        if key in self.dense:
            cell["fa3"] = self.dense[key]
        for name in list(self.peers) if read else ():
            label, _, bench_peer = PEERS[name]
            try:
                cell[name] = bench_peer(pool, length, rows, copies)
                show(length, rows, label, cell[name], cell)
            except Exception as error:  # code of others, which may not run here
                print(f"{label} is left out: {error}")
                self.peers.remove(name)
        for score in scores:
            for selection in SELECTIONS:
                name = f"{score} {selection}"
                args = (self.backend, pool, length, rows, copies, score, selection, budget, read)
                result = cell[name] = bench_adamas(*args)
                for kernels in ("three", "fused"):
                    if kernels in result:
                        mark = " *" if kernels == result["runs"] else ""
                        show(
                            length, rows, f"{name} {budget} {kernels}{mark}", result[kernels], cell
                        )
        return cell

    def part(self, name: str, cells: list[tuple[int, int]]) -> list[dict]:
        dense = self.fa3 and name != "fp8"
        tokens = max(POOL_TOKENS, *(length * rows for length, rows in cells))
        heads = QUERY_HEADS if name == "mha" else KV_HEADS
        pool = Pool(self.backend, heads, tokens, dense=dense, fp8="e4m3" if name == "fp8" else None)
        if name == "cells":
            return [self.cell(pool, *cell, self.scores, read=True) for cell in cells]
        budgets = BUDGETS if name == "budgets" else (BUDGET,)
        return [self.cell(pool, *cell, ["dot"], budget) for cell in cells for budget in budgets]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-fa3", action="store_true", help="measure adamas alone, without vLLM")
    parser.add_argument(
        "--peers", nargs="*", default=list(PEERS), choices=PEERS, help="beside it, if installed"
    )
    parser.add_argument("--score", nargs="+", default=["dot", "manhattan"])
    parser.add_argument("--parts", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--cells", nargs="+", help="LENGTHxROWS of the part 'cells', default: all")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.cells:
        CELLS["cells"] = [tuple(map(int, cell.split("x"))) for cell in args.cells]

    torch.manual_seed(0)
    bench = Bench(not args.no_fa3, args.peers, args.score)
    record = {
        "environment": environment(),
        "setting": {
            "dtype": "bf16", "query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "head_size": HEAD_SIZE,
            "block_size": BLOCK_SIZE, "budget": BUDGET, "replays": REPLAYS,
        },
    }  # fmt: skip
    print(json.dumps(record["environment"]))
    print(
        f"{'context':>8} {'rows':>4} {'what':32} {'us':>8} {'q1..q3':>17} {'GB/s':>6} {'speed-up':>8}  stages (us)"
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.parts:
        record[name] = bench.part(name, CELLS[name])
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.output}")


def show(length, rows, name, r, cell=None):
    stages = " ".join(f"{k[:-3]} {r[k]}" for k in ("encode_us", "scan_us", "attend_us") if k in r)
    if "cluster" in r:
        stages = f"clusters of {r['cluster']}"
    if cell and "fa3" in cell:
        r["speedup"] = round(cell["fa3"]["us"] / r["us"], 2)
    speedup = f"{r['speedup']:7.2f}x" if "speedup" in r else " " * 8
    print(
        f"{length:8} {rows:4} {name:32} {r['us']:8.1f} {r['q1']:8.1f}{r['q3']:9.1f} {r['GBps']:6} "
        f"{speedup}  {stages}",
        flush=True,
    )


if __name__ == "__main__":
    main()
