"""Decode attention of every layer of a model on a CPU: sparse kernels against vLLM's dense kernel.

One process, one thread by default. Each layer has its own pages, keys and queries, by the name of their
distribution in ``keys.py``. All configurations take turns, each after dense attention: one step brings the
CPU caches into the state that decoding leaves them in, then STEPS steps are timed. Times are per decode step
over all layers; ratios are of adjacent turns, and that of the least times is given beside their median: other
load on the machine affects it least. One token set per KV head by `dot` is measured over all keys, the other
configurations over the first of them.

    python benchmarks/bench_decode_cpu.py --contexts 4096 8192 --keys gaussian real
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
KEYS = ("gaussian", "real", "repeat1", "sinks", "drift")  #: distributions of the record
#: How token sets are chosen: one per KV head by the maximum or the sum over its heads, or one per query head.
SETS = {
    "max": {"selection": "kv_head", "combine": "max"},
    "sum": {"selection": "kv_head", "combine": "sum"},
    "query_head": {"selection": "query_head", "combine": "sum"},
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192, 32768])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budgets", type=int, nargs="+", default=[256])
    shape = parser.add_argument_group("the model's shape", "default: SmolLM2-135M")
    for name, value in (
        ("layers", 30),
        ("query-heads", 9),
        ("kv-heads", 3),
        ("head-size", 64),
    ):
        shape.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dense-layers", type=int, help="first layers; default: as in a server")
    parser.add_argument("--keys", nargs="+", default=KEYS, help="distributions of keys.py")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--scores", nargs="+", default=["dot", "manhattan"])
    parser.add_argument(
        "--sets", nargs="+", choices=SETS, default=list(SETS), help="max is of dot alone"
    )
    parser.add_argument("--isa", default="auto", help="auto, avx512, avx2 or portable")
    parser.add_argument("--name", default="decode_cpu", help="result file; empty writes none")
    return parser.parse_args()


args = parse_args()
LAYERS, HEAD_SIZE = args.layers, args.head_size
QUERY_HEADS, KV_HEADS = args.query_heads, args.kv_heads
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch  # noqa: E402
from keys import Contexts, Heads  # noqa: E402
from records import environment, save, spread  # noqa: E402
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
    """The contexts and queries of every layer, and a shuffled block table, for one context length."""

    def __init__(self, context: int, keys: str):
        generator = torch.Generator().manual_seed(0)
        blocks = -(-context // BLOCK_SIZE)
        self.context, self.num_blocks = context, blocks * args.batch
        self.table = torch.randperm(self.num_blocks, generator=generator).to(torch.int32)
        self.table = self.table.view(args.batch, blocks)
        self.lens = torch.full((args.batch,), context, dtype=torch.int32)
        heads = Heads(QUERY_HEADS, KV_HEADS, HEAD_SIZE)
        self.contexts = Contexts(keys, heads, context, LAYERS * args.batch, generator)
        self.query = list(self.contexts.query.to(DTYPE).unflatten(0, (LAYERS, args.batch)))
        self.output = torch.empty(args.batch, QUERY_HEADS, HEAD_SIZE, dtype=DTYPE)

    def fill(self, *backends: Dense | Sparse) -> None:
        """Writes the keys of every context in the order of positions, with Gaussian values."""
        positions = torch.arange(self.context)
        slots = self.table.long()[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        for layer in range(LAYERS):
            for row in range(args.batch):
                start = 0
                for chunk in self.contexts.keys(layer * args.batch + row):
                    key, value = chunk.to(DTYPE), self.contexts.normal(*chunk.shape).to(DTYPE)
                    here = slots[row, start : start + len(key)]
                    for backend in backends:
                        backend.append(layer, key, value, here)
                    start += len(key)


class Dense:
    """vLLM's CPU_ATTN kernel over its own cache layout."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.isa = _get_attn_isa(DTYPE, BLOCK_SIZE, HEAD_SIZE)
        # One allocation for all layers, as in vLLM's LBHNC layout.
        shape = (LAYERS, batch.num_blocks, KV_HEADS, 2 * BLOCK_SIZE, HEAD_SIZE)
        self.caches = [cache.chunk(2, dim=2) for cache in torch.zeros(shape, dtype=DTYPE)]
        self.starts = torch.arange(args.batch + 1, dtype=torch.int32)

    def append(self, layer: int, key, value, slots):
        ops.cpu_attn_reshape_and_cache(key, value, *self.caches[layer], slots, self.isa)

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
    """The adamas kernels over pages, which all configurations share."""

    def __init__(self, batch: Batch):
        self.batch, self.backend = batch, CpuBackend(args.isa)
        self.layout = PageLayout(HEAD_SIZE, BLOCK_SIZE, DTYPE)
        content = self.layout.token_bytes // DTYPE.itemsize
        cache = torch.zeros(LAYERS, batch.num_blocks, KV_HEADS, BLOCK_SIZE, content, dtype=DTYPE)
        self.backend.prepare(cache)
        self.caches = list(cache)
        self.writer = Decoder(self, "dot", "query_head", 1)

    def append(self, layer: int, key, value, slots):
        self.backend.append(self.writer.layers[layer], key, value, slots)


class Decoder:
    """One configuration over the pages, with the budgets of layers that a server would give it."""

    def __init__(self, sparse: Sparse, score: str, sets: str, budget: int):
        self.batch, self.backend = sparse.batch, sparse.backend
        # One coding for both scores, so that pages need not be rewritten.
        config = AdamasConfig(
            score=score,
            **SETS[sets],
            token_budget=budget,
            num_dense_layers=args.dense_layers,
            thresholds="rms",
        ).resolved()
        self.params = Params.of(
            config,
            sparse.layout,
            num_query_heads=QUERY_HEADS,
            num_kv_heads=KV_HEADS,
            softmax_scale=HEAD_SIZE**-0.5,
        )
        self.layers = [self.backend.bind(self.params, cache) for cache in sparse.caches]
        self.stats = torch.zeros(COUNTERS, dtype=torch.int64)
        b = self.batch
        self.budgets = [
            b.context if config.is_dense(layer) else config.budget_of(layer).of(b.context)
            for layer in range(LAYERS)
        ]
        rows = {
            n: DecodeBatch(b.table, b.lens, torch.full_like(b.lens, n)) for n in set(self.budgets)
        }
        self.rows = [rows[n] for n in self.budgets]

    def step(self):
        b = self.batch
        for query, layer, rows in zip(b.query, self.layers, self.rows, strict=True):
            self.backend.decode(layer, query, rows, b.output, self.stats)

    def bytes_per_step(self) -> int:
        """Bytes that a step must at least read: K and V of dense layers, signatures, selected K and V."""
        context = self.batch.context
        scale = 2 if self.params.score == "dot" else 0
        signatures = context * KV_HEADS * (HEAD_SIZE // 4 + scale)
        pair = 2 * HEAD_SIZE * DTYPE.itemsize
        return args.batch * sum(
            context * KV_HEADS * pair
            if n == context
            else signatures + n * self.params.num_score_heads * pair
            for n in self.budgets
        )


def timed(step) -> float:
    step()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return 1e3 * (time.perf_counter() - start) / STEPS


def table(rows: list[dict]) -> str:
    """The cells of one context and distribution as a table."""
    headers = ["context", "keys", "budget", "score", "selection", "combine"]
    return plain(
        [*headers, "dense ms", "sparse ms", "speed-up", "q1", "q3", "of least", "GB/s"],
        [
            [
                *(row[key] for key in headers),
                *(f"{row[key]['median']:.2f}" for key in ("dense_ms", "sparse_ms")),
                *(f"{row['speedup'][key]:.2f}" for key in ("median", "q1", "q3")),
                f"{row['least_speedup']:.2f}",
                f"{row['sparse_gb_per_s']:.1f}",
            ]
            for row in rows
        ],
    )


def measure(batch: Batch, dense: Dense, sparse: Sparse) -> list[dict]:
    """The cells of one context and distribution, which take turns with dense attention."""
    cells = [
        (budget, score, sets, Decoder(sparse, score, sets, budget))
        for budget, score, sets in product(args.budgets, args.scores, args.sets)
        if (score == "dot" or sets != "max")
        and (batch.contexts.name == args.keys[0] or (score == "dot" and sets != "query_head"))
    ]
    for *_, decoder in cells:
        decoder.step()
    turns = [
        [(timed(dense.step), timed(decoder.step)) for *_, decoder in cells]
        for _ in range(args.repeats)
    ]
    dense_bytes = args.batch * LAYERS * batch.context * KV_HEADS * 2 * HEAD_SIZE * DTYPE.itemsize
    rows = []
    for (budget, score, sets, decoder), pairs in zip(cells, zip(*turns, strict=True), strict=True):
        dense_ms, sparse_ms = zip(*pairs, strict=True)
        row = {
            "context": batch.context, "keys": batch.contexts.name, "batch": args.batch, "budget": budget,
            "score": score, **SETS[sets], "dense_layers": decoder.budgets.count(batch.context),
            "budget_of_layer_0": decoder.budgets[0], "dense_ms": spread(dense_ms), "sparse_ms": spread(sparse_ms),
            "speedup": spread([d / s for d, s in pairs]), "least_dense_ms": min(dense_ms),
            "least_sparse_ms": min(sparse_ms), "least_speedup": min(dense_ms) / min(sparse_ms),
            "dense_bytes": dense_bytes, "sparse_bytes": decoder.bytes_per_step(),
        }  # fmt: skip
        row["sparse_gb_per_s"] = row["sparse_bytes"] / row["sparse_ms"]["median"] / 1e6
        row["dense_gb_per_s"] = dense_bytes / row["dense_ms"]["median"] / 1e6
        rows.append(row)
    return rows


def main():
    rows = []
    for context, keys in product(args.contexts, args.keys):
        batch = Batch(context, keys)
        dense, sparse = Dense(batch), Sparse(batch)
        batch.fill(dense, sparse)
        rows += (here := measure(batch, dense, sparse))
        print(table(here), end="\n\n", flush=True)
    if args.name:
        model = {"layers": LAYERS, "query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "head_size": HEAD_SIZE,
                 "dtype": "bfloat16", "block_size": BLOCK_SIZE}  # fmt: skip
        peers = {
            "dense": f"CPU_ATTN ({dense.isa})",
            "sparse": sparse.backend.description,
            "threads": args.threads,
        }
        print(
            "wrote",
            save(args.name, {"environment": environment(), "model": model, **peers, "rows": rows}),
        )


if __name__ == "__main__":
    main()
