"""Decode attention of one layer on a Hopper GPU: adamas and FlashAttention 3 in one run.

A step is launched as a server's CUDA graph is: for the longest context that the server admits, which is
longer than the contexts of the step (``--launch exact`` launches for these). Keys and queries come from
``keys.py``, by the name of their distribution.

Every cell is a CUDA graph of several decode calls over different contexts and queries that together exceed
the L2 cache; the time of a call is the median over replays. `read` is the measured upper bound: a plain
read of the signature planes through the same block tables. Times of stages are differences between graphs
with one, two and three of the kernels. The fused kernel is measured as well; a star marks the policy's
choice. `again` is the share of token sets that the slow path selected again.

The peers, one file each in `peers`, read a dense cache of the same keys and values. If a peer can be called
in several ways, the fastest counts. Speed-ups are relative to FlashAttention 3 at the same lengths and
launch. Dense attention reads everything whatever the keys are, so it is measured over one distribution.

    python benchmarks/bench_decode_gpu.py
    python benchmarks/bench_decode_gpu.py --quick
    python benchmarks/bench_decode_gpu.py --parts keys --heads 24x8x128 --cells 32768x8 --keys real sinks
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import triton
import triton.language as tl
from keys import DISTRIBUTIONS, Contexts, Heads, Recording
from peers import PEERS
from peers.base import Cell, Peer, widened

from vllm_adamas.backends.base import COUNTERS, DecodeBatch, Layer, Params
from vllm_adamas.backends.cuda.backend import CudaBackend
from vllm_adamas.backends.cuda.policy import THREE
from vllm_adamas.config import AdamasConfig
from vllm_adamas.doctor.crossover import captured
from vllm_adamas.environment import Environment
from vllm_adamas.errors import AdamasError
from vllm_adamas.layout import PageLayout
from vllm_adamas.tables import plain

RESULTS = Path(__file__).parent / "results" / "decode_gpu.json"
DTYPE = torch.bfloat16
LLAMA, BLOCK_SIZE, BUDGET = Heads(32, 8, 128), 64, 256
#: How token sets are chosen: one per query head, or one per KV head by the sum or the maximum over its heads.
SETS = {
    "query_head": {"selection": "query_head", "combine": "sum"},
    "kv_head": {"selection": "kv_head", "combine": "sum"},
    "max": {"selection": "kv_head", "combine": "max"},
}
SELECTIONS = tuple(SETS)
FORMS = ("three", "fused")  #: of a decode step: three kernels, or one
SCORES = ("dot", "manhattan")
LAUNCHES = ("server", "exact")
#: ``--max-model-len`` of the servers whose graphs are launched: the first that admits the context.
SERVED = (1 << 17, 1 << 20)
K = 1024
WORKING_SET = 200 << 20  # bytes that one graph touches, several times the L2 cache
REPLAYS, WARMUP = 25, 5
ROUNDING = 0.02  # of the largest output value
BASELINE, *OTHERS = PEERS
HEADERS = ("heads", "context", "rows", "launch", "keys", "what", "us", "q1", "q3", "GB/s", "speed-up", "again",
           "stages (us)")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A part of the record: all combinations of its fields.

    Args:
        cells: (context, rows).
        launches: of ``LAUNCHES``.
        thorough: whether the first keys and launch of every cell come with the plain read, the other
            peers and the times of stages.
        fp8: type of fp8 pages.
    """

    cells: tuple[tuple[int, int], ...]
    heads: tuple[Heads, ...] = (LLAMA,)
    keys: tuple[str, ...] = ("gaussian",)
    budgets: tuple[int, ...] = (BUDGET,)
    launches: tuple[str, ...] = ("server",)
    scores: tuple[str, ...] = ("dot",)
    selections: tuple[str, ...] = SELECTIONS
    thorough: bool = False
    fp8: str | None = None


CELLS = tuple(
    (n * K, rows) for n, r in ((8, (1, 8, 32)), (32, (1, 8, 32)), (128, (1, 8))) for rows in r
)
FEW = ((32 * K, 1), (32 * K, 8))
BOTH = ("gaussian", "real")
SHAPES = ("24x8x128", "28x4x128", "64x8x128", "9x3x64", "4x1x256")
PARTS = {
    "cells": Part(CELLS, launches=LAUNCHES, scores=SCORES, thorough=True),
    "keys": Part(
        CELLS,
        keys=tuple(name for name in DISTRIBUTIONS if name != "gaussian"),
        selections=("kv_head", "max"),
    ),
    "budgets": Part(FEW, keys=BOTH, budgets=(64, 128, 512, 1024)),
    "large_budgets": Part(
        (*(cell for cell in CELLS if cell not in FEW), (1024 * K, 1)),
        keys=BOTH,
        budgets=(512, 1024),
        selections=("kv_head", "max"),
    ),
    "contexts": Part(tuple((n * K, 1) for n in (4, 16, 64, 256, 512, 1024))),
    "heads": Part(FEW, heads=tuple(map(Heads.parse, SHAPES)), keys=BOTH),
    "mha": Part(tuple((n * K, 1) for n in (8, 16, 32)), heads=(Heads(32, 32, 128),)),
    "fp8": Part(FEW, fp8="e4m3"),
}
QUICK = {
    "keys": Part((*FEW, (8 * K, 8)), keys=tuple(DISTRIBUTIONS), selections=("kv_head",)),
}  # fmt: skip


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
    """Copies of the contexts of one cell, in adamas pages and in a dense cache ``[tokens, Hkv, D]``.

    Contexts lie in blocks of their own, through one shuffled block table per copy.

    Args:
        length, rows: of the cell; the length is a multiple of ``BLOCK_SIZE``.
        copies: number of steps that share no block.
        dense: whether peers will read it.
        fp8: type of fp8 pages.
    """

    def __init__(
        self,
        heads: Heads,
        length: int,
        rows: int,
        copies: int,
        *,
        dense=True,
        fp8=None,
        device="cuda",
    ):
        self.heads, self.length, self.rows, self.copies = heads, length, rows, copies
        self.fp8, self.dense = fp8, dense
        self.layout = PageLayout(heads.size, BLOCK_SIZE, torch.uint8 if fp8 else DTYPE)
        content = self.layout.token_bytes // self.layout.dtype.itemsize
        contexts, per_row = copies * rows, length // BLOCK_SIZE
        shape = (contexts * per_row, heads.kv, BLOCK_SIZE, content)
        self.pages = torch.zeros(shape, dtype=self.layout.dtype, device=device)
        order = torch.randperm(contexts * per_row, device=device).to(torch.int32)
        self._table = order.view(contexts, per_row)
        if dense:
            shape = (contexts * length, heads.kv, heads.size)
            self.k, self.v = (torch.empty(shape, dtype=DTYPE, device=device) for _ in range(2))

    def fill(self, backend, contexts: Contexts) -> None:
        """Writes every context in the order of its positions, with Gaussian values."""
        layer = self.layer(backend, "dot", "query_head")
        offsets = torch.arange(BLOCK_SIZE, device=self.pages.device)
        for row, blocks in enumerate(self._table.long()):
            slots = (blocks[:, None] * BLOCK_SIZE + offsets).flatten()
            start = 0
            for chunk in contexts.keys(row):
                key, value = chunk.to(DTYPE), contexts.normal(*chunk.shape).to(DTYPE)
                here = slots[start : start + len(key)]
                backend.append(layer, key, value, here)
                if self.dense:
                    self.k[here], self.v[here] = key, value
                start += len(key)

    def params(self, score: str, selection: str, budget: int = BUDGET) -> Params:
        return Params.of(
            AdamasConfig(score=score, **SETS[selection], token_budget=budget, thresholds="rms"),
            self.layout,
            num_query_heads=self.heads.query,
            num_kv_heads=self.heads.kv,
            softmax_scale=self.heads.size**-0.5,
            fp8=self.fp8,
        )

    def layer(self, backend, score: str, selection: str, budget: int = BUDGET) -> Layer:
        return backend.bind(self.params(score, selection, budget), self.pages)

    def signature_bytes(self) -> int:
        """Signatures that a step reads."""
        return signature_bytes(self.heads, self.length, self.rows)

    def attended_bytes(self, selection: str, budget: int) -> int:
        sets = self.heads.query if selection == "query_head" else self.heads.kv
        return self.rows * sets * budget * 2 * self.heads.size * self.layout.dtype.itemsize

    def dense_rate(self, result: dict) -> dict:
        """A result of :func:`timed` with the rate of reading K and V of whole contexts."""
        values = self.rows * self.length * self.heads.kv * self.heads.size * 2
        return result | {"GBps": round(values * DTYPE.itemsize / result["us"] / 1e3)}

    def cell(self, launch: int) -> Cell:
        """The dense cache and the steps over it, for peers; launched for ``launch`` tokens."""
        return Cell(self.k, self.v, self.tables, self.heads.query, self.length, self.rows, launch)

    def tables(self, block_size: int = BLOCK_SIZE) -> list[torch.Tensor]:
        """The block table of each copy, int32 ``[rows, length / block_size]``; it divides ``BLOCK_SIZE``."""
        parts = BLOCK_SIZE // block_size
        inner = torch.arange(parts, dtype=torch.int32, device=self._table.device)
        table = (self._table[..., None] * parts + inner).flatten(1)
        return list(table.view(self.copies, self.rows, -1))


class Steps:
    """A decode step over each copy of a pool, launched for ``launch`` tokens.

    Args:
        queries: ``[rows * positions, Hq, D]`` of each copy.
        positions: query tokens of each row; the last one attends to the whole context.
    """

    def __init__(
        self, backend, pool: Pool, layer: Layer, queries, launch: int, budget=BUDGET, positions=1
    ):
        device = pool.pages.device
        before = torch.arange(positions - 1, -1, -1, dtype=torch.int32, device=device)
        lens = (pool.length - before).repeat(pool.rows)
        budgets = torch.full_like(lens, budget)
        backend.reserve(layer.params, len(lens), launch)
        self._backend, self._layer, self._queries = backend, layer, queries
        places = torch.arange(positions, dtype=torch.int32, device=device).repeat(pool.rows)
        self._batches = [
            DecodeBatch(
                table.repeat_interleave(positions, 0),
                lens,
                budgets,
                launch,
                positions=places if positions > 1 else None,
                num_requests=pool.rows,
                overlap=True,
            )
            for table in widened(pool.tables(), launch // BLOCK_SIZE)
        ]
        self.outputs = [torch.empty_like(query) for query in queries]
        self.stats = torch.zeros(COUNTERS, dtype=torch.int64, device=device)

    def calls(self, **how) -> list:
        """One call for each copy; ``how`` goes to the backend's ``decode``."""
        return [
            lambda q=q, b=b, o=o: self._backend.decode(self._layer, q, b, o, self.stats, **how)
            for q, b, o in zip(self._queries, self._batches, self.outputs, strict=True)
        ]


def signature_bytes(heads: Heads, length: int, rows: int) -> int:
    return length * rows * heads.kv * (heads.size // 4 + 2)


def copies_of(heads: Heads, length: int, rows: int) -> int:
    """Steps whose signatures together exceed the L2 cache; at least two."""
    return max(2, -(-WORKING_SET // signature_bytes(heads, length, rows)))


def bench_read(pool: Pool) -> dict:
    """Times a plain read of the signature planes and the scales, which follow each other in a block."""
    layout = pool.layout
    runs = layout.runs(pool.pages).view(torch.int32)
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    words = BLOCK_SIZE * (pool.heads.size // 4 + 2) // 4
    blocks = pool.length // BLOCK_SIZE
    grid = (triton.cdiv(blocks, 4), pool.rows, pool.heads.kv)

    def call(table):
        _read_planes[grid](
            runs, table, out, runs.stride(0), runs.stride(1), table.stride(0), layout.hi_offset // 4,
            words, blocks, WORDS=triton.next_power_of_2(words), num_warps=4,
        )  # fmt: skip

    result = timed([lambda t=t: call(t) for t in pool.tables()])
    result["GBps"] = round(pool.signature_bytes() / result["us"] / 1e3)
    return result


def bench_adamas(
    backend, pool: Pool, queries, launch: int, score: str, selection: str, budget: int, stages: bool
) -> dict:
    """Times the forms of a step that can run; ``runs`` is the policy's choice.

    Args:
        queries: ``[rows, Hq, D]`` of each copy.
        launch: the longest context that a step is launched for.
        stages: whether to time the stages of the three kernels.
    """
    layer, rows = pool.layer(backend, score, selection, budget), pool.rows
    steps = Steps(backend, pool, layer, queries, launch, budget)
    calls, stats, outputs = steps.calls, steps.stats, steps.outputs
    result = {"three": measured(calls(form=THREE), stats, layer.params)}
    chosen = backend.plan(layer, rows, DTYPE, launch).form
    form = backend.fused_form(layer, rows, DTYPE, launch)
    if form != THREE:
        expected = torch.stack(outputs)
        result["fused"] = measured(calls(form=form), stats, layer.params) | form._asdict()
        # Both forms select the same tokens, so that only sums differ, by their order.
        error = (torch.stack(outputs) - expected).abs().max() / expected.abs().max()
        if not error < ROUNDING:
            raise AssertionError(f"one kernel and three kernels differ by {error:.3f}")
    if stages:
        encode, encode_scan = (timed(calls(form=THREE, stages=n))["us"] for n in (1, 3))
        three = result["three"]
        three["encode_us"], three["scan_us"] = encode, round(encode_scan - encode, 2)
        three["attend_us"] = round(three["us"] - encode_scan, 2)
    moved = pool.signature_bytes() + pool.attended_bytes(selection, budget)
    for one in result.values():
        one["GBps"] = round(moved / one["us"] / 1e3)
    result["runs"] = "three" if chosen == THREE else "fused"
    return result


def measured(calls, stats: torch.Tensor, params: Params) -> dict:
    """A result of :func:`timed`, with the share of token sets that the slow path selected ``again``."""
    stats.zero_()
    result = timed(calls)
    sparse_rows, *_, again = stats.tolist()
    return result | {"again": round(again / max(1, sparse_rows * params.num_score_heads), 4)}


def bench_peer(peer: Peer, pool: Pool, launch: int) -> dict:
    """Times a peer in its fastest way; also records the times of all ways if it has several."""
    ways = peer.prepare(pool.cell(launch))
    times = {name: timed(make()) for name, make in ways.items()}
    name, best = min(times.items(), key=lambda item: item[1]["us"])
    if len(times) > 1:
        best |= {"variant": name, "all_us": {n: one["us"] for n, one in times.items()}}
    return pool.dense_rate(best)


class Bench:
    """One run; the baseline is measured once per shape and launch, in the same process."""

    def __init__(self, backend, dense: bool, peers: list[str], device: str = "cuda"):
        self.backend, self.dense, self.device = backend, dense, device
        self.peers = [PEERS[name] for name in peers if dense and PEERS[name].available()]
        self.baselines: dict[tuple, dict] = {}

    def part(self, part: Part) -> list[dict]:
        """The cells of a part, each printed when it is measured."""
        found = []
        for heads, (length, rows) in product(part.heads, part.cells):
            copies = copies_of(heads, length, rows)
            dense = self.dense and not part.fp8
            pool = Pool(heads, length, rows, copies, dense=dense, fp8=part.fp8, device=self.device)
            launches = dict.fromkeys(launch_of(length, name) for name in part.launches)
            first = (part.keys[0], next(iter(launches)))
            for keys in part.keys:
                generator = torch.Generator(self.device).manual_seed(0)
                contexts = Contexts(keys, heads, length, copies * rows, generator)
                pool.fill(self.backend, contexts)
                for launch, budget in product(launches, part.budgets):
                    thorough = part.thorough and (keys, launch) == first
                    found.append(self.cell(pool, contexts, launch, budget, part, thorough))
            del pool, contexts  # before the next ones are allocated
        return found

    def cell(
        self, pool: Pool, contexts: Contexts, launch: int, budget: int, part: Part, thorough: bool
    ) -> dict:
        """One cell over the contexts that the pool holds."""
        cell = {
            "heads": str(pool.heads), "context": pool.length, "rows": pool.rows, "launch": launch,
            "keys": contexts.name, "copies": pool.copies, "budget": budget,
        }  # fmt: skip
        if thorough:
            cell["read"] = bench_read(pool)
        key = (pool.heads, pool.length, pool.rows, launch)
        if pool.dense and key not in self.baselines:
            self.baselines[key] = bench_peer(PEERS[BASELINE], pool, launch)
        if key in self.baselines:
            cell[BASELINE] = self.baselines[key]
        for peer in list(self.peers) if thorough else ():
            try:
                cell[peer.name] = bench_peer(peer, pool, launch)
            except Exception as error:  # third-party code, which may not run here
                print(f"{peer.title} is left out: {error}")
                self.peers.remove(peer)
            else:
                compare(cell, cell[peer.name])
        query = contexts.query.to(DTYPE).unflatten(0, (pool.copies, pool.rows))
        for score, selection in product(part.scores, part.selections):
            if (score, selection) == ("manhattan", "max"):
                continue  # the maximum is one of logits
            how = (launch, score, selection, budget, thorough)
            result = bench_adamas(self.backend, pool, list(query), *how)
            cell[f"{score} {selection}"] = result
            for kernels in FORMS:
                if kernels in result:
                    compare(cell, result[kernels])
        print(plain(HEADERS, list(lines(cell))), end="\n\n", flush=True)
        return cell


def launch_of(length: int, name: str) -> int:
    """The longest context that a step over ``length`` tokens is launched for."""
    return length if name == "exact" else next(tokens for tokens in SERVED if tokens >= length)


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
            for kernels in FORMS:
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
        stages = [f"{result['cluster']} blocks of {result['warps']} warps"]
    times = [f"{result[key]:.1f}" for key in ("us", "q1", "q3")]
    speedup = f"{result['speedup']:.2f}x" if "speedup" in result else ""
    again = f"{result['again']:.1%}" if "again" in result else ""
    place = [cell[key] for key in ("heads", "context", "rows", "launch", "keys")]
    return [*place, name, *times, result["GBps"], speedup, again, " ".join(stages)]


def cell_of(text: str) -> tuple[int, int]:
    """Context and rows of a text such as ``32768x8``.

    Raises:
        ValueError: it is none, or the kernels and peers have no such cell.
    """
    parts = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
    if len(parts) != 2 or 0 in parts or parts[0] % BLOCK_SIZE or parts[0] > SERVED[-1]:
        raise ValueError(
            f"{text!r} is not a cell: give CONTEXTxROWS, as in 32768x8, with a context of at most "
            f"{SERVED[-1]} tokens that is a multiple of {BLOCK_SIZE}."
        )
    return parts[0], parts[1]


def cells_of(parser: argparse.ArgumentParser, texts: list[str]) -> list[tuple[int, int]]:
    """The cells of a command line, which ends with a sentence if one is none."""
    try:
        return [cell_of(text) for text in texts]
    except ValueError as error:
        parser.error(str(error))


def parse_args() -> tuple[argparse.Namespace, dict[str, Part]]:
    """The arguments, and the parts that they ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-fa3", action="store_true", help="measure adamas alone, without vLLM")
    parser.add_argument(
        "--peers", nargs="*", default=OTHERS, choices=OTHERS, help="other peers, if installed"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="parts of the record; default: all"
    )
    parser.add_argument(
        "--quick", action="store_true", help="three cells over every distribution, in 90 seconds"
    )
    group = parser.add_argument_group("cells", "in place of those of every chosen part")
    group.add_argument("--cells", nargs="+", help="CONTEXTxROWS, as in 32768x8")
    group.add_argument(
        "--heads", nargs="+", help="query heads x KV heads x head size, as in 32x8x128"
    )
    group.add_argument("--keys", nargs="+", choices=DISTRIBUTIONS)
    group.add_argument("--budgets", nargs="+", type=int)
    group.add_argument("--launch", nargs="+", choices=LAUNCHES, dest="launches")
    group.add_argument("--score", nargs="+", choices=SCORES, dest="scores")
    group.add_argument("--selection", nargs="+", choices=SELECTIONS, dest="selections")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"record; default: {RESULTS.name} of the results, none if --quick",
    )
    args = parser.parse_args()
    if args.quick and args.parts:
        parser.error("--quick has parts of its own: leave out --parts.")
    parts = QUICK if args.quick else {name: PARTS[name] for name in args.parts or PARTS}
    names = ("keys", "budgets", "launches", "scores", "selections")
    changes = {name: tuple(vars(args)[name]) for name in names if vars(args)[name]}
    try:
        if args.cells:
            changes["cells"] = tuple(map(cell_of, args.cells))
        if args.heads:
            changes["heads"] = tuple(map(Heads.parse, args.heads))
        parts = {name: replace(part, **changes) for name, part in parts.items()}
        for part in parts.values():
            for budget in part.budgets:
                AdamasConfig.parse({"token_budget": budget})
            for heads in part.heads if "real" in part.keys else ():
                Recording.of(heads.size, torch.device("cpu"))
    except (ValueError, AdamasError) as error:
        parser.error(str(error))
    return args, parts


def main():
    args, parts = parse_args()
    torch.manual_seed(0)
    bench = Bench(CudaBackend(), not args.no_fa3, args.peers)
    packages = [peer.distribution for peer in PEERS.values()]
    record = {
        "environment": Environment.capture(Path(__file__).parent, packages).record(),
        "setting": {"dtype": "bf16", "block_size": BLOCK_SIZE, "replays": REPLAYS},
    }
    print(json.dumps(record["environment"]))
    output = args.output or (None if args.quick else RESULTS)
    for name, part in parts.items():
        record[name] = bench.part(part)
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(record, indent=1) + "\n")
    if output:
        print(f"wrote {output}")


if __name__ == "__main__":
    main()
