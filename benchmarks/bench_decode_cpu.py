"""Decode attention of every layer of a model on a CPU: sparse kernels against vLLM's dense kernel.

One process, one thread by default. Each layer has its own pages. The two alternate: one step brings the
CPU caches into the state that decoding leaves them in, then STEPS steps are timed. Times are per decode
step over all layers; ratios are of adjacent turns.

    python benchmarks/bench_decode_cpu.py --contexts 4096 8192
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

BLOCK_SIZE = 128
STEPS = 3


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budgets", type=int, nargs="+", default=[256])
    shape = parser.add_argument_group("the model's shape", "default: SmolLM2-135M")
    for name, value in (
        ("layers", 30),
        ("dense-layers", 1),
        ("query-heads", 9),
        ("kv-heads", 3),
        ("head-size", 64),
    ):
        shape.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--scores", nargs="+", default=["dot", "manhattan"])
    parser.add_argument("--selections", nargs="+", default=["query_head", "kv_head"])
    parser.add_argument("--combine", help="sum or max, of dot for kv_head; default: as in a server")
    parser.add_argument("--isa", default="auto", help="auto, avx512, avx2 or portable")
    parser.add_argument("--name", default="decode_cpu", help="result file; empty writes none")
    return parser.parse_args()


args = parse_args()
LAYERS, DENSE_LAYERS, HEAD_SIZE = args.layers, args.dense_layers, args.head_size
QUERY_HEADS, KV_HEADS = args.query_heads, args.kv_heads
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch  # noqa: E402
from common import environment, save, spread  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from vllm_adamas.backends.base import COUNTERS, DecodeBatch, Params  # noqa: E402
from vllm_adamas.backends.cpu.backend import CpuBackend  # noqa: E402
from vllm_adamas.config import AdamasConfig  # noqa: E402
from vllm_adamas.layout import PageLayout  # noqa: E402
from vllm_adamas.tables import plain  # noqa: E402

torch.set_num_threads(args.threads)
current_platform.import_kernels()
torch.cpu._init_amx()  # asks Linux for permission to use tiles, as a vLLM worker does
from vllm import _custom_ops as ops  # noqa: E402
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa  # noqa: E402

DTYPE = torch.bfloat16


class Batch:
    """Queries, contexts and a shuffled block table for one context length."""

    def __init__(self, context: int):
        blocks = -(-context // BLOCK_SIZE)
        self.context, self.num_blocks = context, blocks * args.batch
        self.table = torch.randperm(self.num_blocks).to(torch.int32).view(args.batch, blocks)
        self.lens = torch.full((args.batch,), context, dtype=torch.int32)
        self.query = list(torch.randn(LAYERS, args.batch, QUERY_HEADS, HEAD_SIZE).to(DTYPE))
        self.output = torch.empty(args.batch, QUERY_HEADS, HEAD_SIZE, dtype=DTYPE)
        positions = torch.arange(context)
        self.slots = (
            self.table.long()[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        ).flatten()

    def key_value(self):
        shape = (args.batch * self.context, KV_HEADS, HEAD_SIZE)
        return torch.randn(shape).to(DTYPE), torch.randn(shape).to(DTYPE)


class Dense:
    """vLLM's CPU_ATTN kernel over its own cache layout."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.isa = _get_attn_isa(DTYPE, BLOCK_SIZE, HEAD_SIZE)
        # One allocation for all layers, as in vLLM's LBHNC layout.
        shape = (LAYERS, batch.num_blocks, KV_HEADS, 2 * BLOCK_SIZE, HEAD_SIZE)
        self.caches = [cache.chunk(2, dim=2) for cache in torch.zeros(shape, dtype=DTYPE)]
        for k_cache, v_cache in self.caches:
            ops.cpu_attn_reshape_and_cache(
                *batch.key_value(), k_cache, v_cache, batch.slots, self.isa
            )
        self.starts = torch.arange(args.batch + 1, dtype=torch.int32)

    def step(self):
        b = self.batch
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=args.batch, num_heads=QUERY_HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_SIZE,
            seq_lens=b.lens, dtype=DTYPE, query_start_loc=self.starts, causal=True,
            sliding_window_size=-1, isa=self.isa, enable_kv_split=True,
        )  # fmt: skip
        for query, (k_cache, v_cache) in zip(b.query, self.caches, strict=True):
            ops.cpu_attention_with_kv_cache(
                query, k_cache, v_cache, b.output, self.starts, b.lens, HEAD_SIZE**-0.5, True,
                None, -1, b.table, 0, schedule, None,
            )  # fmt: skip


class Sparse:
    """The adamas kernels over pages; the first layers are dense, and the others have one budget."""

    def __init__(self, batch: Batch):
        self.batch, self.backend = batch, CpuBackend(args.isa)
        self.layout = PageLayout(HEAD_SIZE, BLOCK_SIZE, DTYPE)
        content = self.layout.token_bytes // DTYPE.itemsize
        cache = torch.zeros(LAYERS, batch.num_blocks, KV_HEADS, BLOCK_SIZE, content, dtype=DTYPE)
        self.backend.prepare(cache)
        self.caches = list(cache)
        self.configure("dot", "query_head", args.budgets[0])
        for layer in self.layers:
            self.backend.append(layer, *batch.key_value(), batch.slots)
        self.stats = torch.zeros(COUNTERS, dtype=torch.int64)

    def configure(self, score: str, selection: str, budget: int):
        # One coding for both scores, so that pages need not be rewritten.
        shared = selection == "kv_head" and score == "dot"
        config = AdamasConfig(
            score=score,
            selection=selection,
            combine=args.combine if shared else None,
            token_budget=budget,
            thresholds="rms",
        )
        self.params = Params.of(
            config,
            self.layout,
            num_query_heads=QUERY_HEADS,
            num_kv_heads=KV_HEADS,
            softmax_scale=HEAD_SIZE**-0.5,
        )
        self.layers = [self.backend.bind(self.params, cache) for cache in self.caches]
        b = self.batch
        self.budgets = torch.full_like(b.lens, config.budget.of(b.context))
        self.rows = DecodeBatch(b.table, b.lens, self.budgets)

    def step(self):
        b = self.batch
        for i, (query, layer) in enumerate(zip(b.query, self.layers, strict=True)):
            rows = self.rows.dense if i < DENSE_LAYERS else self.rows
            self.backend.decode(layer, query, rows, b.output, self.stats)

    def bytes_per_step(self) -> int:
        """Bytes that a step must at least read: K and V of dense layers, signatures, selected K and V."""
        element, sets = DTYPE.itemsize, self.params.num_score_heads
        context, budget = self.batch.context, int(self.budgets[0])
        dense = context * KV_HEADS * 2 * HEAD_SIZE * element
        scale = 2 if self.params.score == "dot" else 0
        sparse = (
            context * KV_HEADS * (HEAD_SIZE // 4 + scale) + budget * sets * 2 * HEAD_SIZE * element
        )
        return args.batch * (DENSE_LAYERS * dense + (LAYERS - DENSE_LAYERS) * sparse)


def timed(step) -> float:
    step()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return 1e3 * (time.perf_counter() - start) / STEPS


def table(rows: list[dict]) -> str:
    """The cells of one context as a table."""
    headers = ["context", "budget", "score", "selection", "dense ms", "sparse ms", "speed-up"]
    return plain(
        [*headers, "q1", "q3", "GB/s"],
        [
            [
                *(row[key] for key in headers[:4]),
                *(f"{row[key]['median']:.2f}" for key in ("dense_ms", "sparse_ms")),
                *(f"{row['speedup'][key]:.2f}" for key in ("median", "q1", "q3")),
                f"{row['sparse_gb_per_s']:.1f}",
            ]
            for row in rows
        ],
    )


def main():
    rows = []
    for context in args.contexts:
        torch.manual_seed(0)
        batch = Batch(context)
        dense, sparse = Dense(batch), Sparse(batch)
        dense_bytes = args.batch * LAYERS * context * KV_HEADS * 2 * HEAD_SIZE * DTYPE.itemsize
        cells = product(args.budgets, args.scores, args.selections)
        for budget, score, selection in cells:
            sparse.configure(score, selection, budget)
            for _ in range(2):
                dense.step(), sparse.step()
            pairs = [(timed(dense.step), timed(sparse.step)) for _ in range(args.repeats)]
            ratio = spread([d / s for d, s in pairs])
            row = {
                "context": context, "batch": args.batch, "budget": budget, "score": score,
                "selection": selection, "dense_ms": spread([d for d, _ in pairs]),
                "sparse_ms": spread([s for _, s in pairs]), "speedup": ratio,
                "dense_bytes": dense_bytes, "sparse_bytes": sparse.bytes_per_step(),
            }  # fmt: skip
            row["sparse_gb_per_s"] = row["sparse_bytes"] / row["sparse_ms"]["median"] / 1e6
            row["dense_gb_per_s"] = dense_bytes / row["dense_ms"]["median"] / 1e6
            rows.append(row)
        print(table([row for row in rows if row["context"] == context]), end="\n\n", flush=True)
    if args.name:
        model = {"layers": LAYERS, "dense_layers": DENSE_LAYERS, "query_heads": QUERY_HEADS, "kv_heads": KV_HEADS,
                 "head_size": HEAD_SIZE, "dtype": "bfloat16", "block_size": BLOCK_SIZE}  # fmt: skip
        peers = {
            "dense": f"CPU_ATTN ({dense.isa})",
            "sparse": sparse.backend.description,
            "combine": args.combine or AdamasConfig().resolved().combine,
            "threads": args.threads,
        }
        print(
            "wrote",
            save(args.name, {"environment": environment(), "model": model, **peers, "rows": rows}),
        )


if __name__ == "__main__":
    main()
