"""Dense attention on a Hopper GPU: decode of a dense layer, and prefill over bf16 and fp8 pages.

Decode: the kernels' dense rows and FlashAttention over the page. Both read the same pages through the same
block tables inside a CUDA graph that is valid for contexts up to `MAX_CONTEXT`, as a server captures it.
The third column is FlashAttention over a cache in its own layout with the exact bound, the lower limit for
a dense layer.

Prefill: the last `NEW` tokens of a context, over bf16 pages in place, over fp8 pages that are first copied
out as real values, that copy alone, and FlashAttention in fp8 over a cache in its own layout.
"""

from __future__ import annotations

import argparse

import torch
from bench_decode_gpu import LLAMA, WORKING_SET, Pool, bench_peer, timed
from keys import Contexts
from peers import flash_attention
from peers.base import widened
from records import environment, save
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

from vllm_adamas.backends.base import COUNTERS, DecodeBatch
from vllm_adamas.backends.cuda.backend import CudaBackend
from vllm_adamas.serving.dense.base import PrefillPlan
from vllm_adamas.serving.dense.flash import FlashAttention
from vllm_adamas.tables import plain

CELLS = ("1024x1", "1024x32", "8192x1", "8192x8", "32768x1", "32768x8", "32768x22", "131072x5")
MAX_CONTEXT = 131072
NEW, CONTEXTS = 8192, (8192, 32768, 131072)  # new tokens and contexts of prefill


def filled(backend, length: int, rows: int, copies: int, **options) -> Pool:
    """A pool of Gaussian keys and values."""
    pool = Pool(LLAMA, length, rows, copies, **options)
    generator = torch.Generator("cuda").manual_seed(0)
    pool.fill(backend, Contexts("gaussian", LLAMA, length, copies * rows, generator))
    return pool


def measure(backend, flash, length: int, rows: int) -> dict:
    dense_bytes = length * rows * LLAMA.kv * LLAMA.size * 4
    pool = filled(backend, length, rows, max(2, -(-WORKING_SET // dense_bytes)))
    layer = pool.layer(backend, "dot", "kv_head")
    lens = torch.full((rows,), length, dtype=torch.int32, device="cuda")
    starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
    stats = torch.zeros(COUNTERS, dtype=torch.int64, device="cuda")
    tables = widened(pool.tables(), MAX_CONTEXT // pool.layout.block_size)
    shape = (rows, LLAMA.query, LLAMA.size)
    queries = [torch.randn(shape, device="cuda").to(pool.layout.dtype) for _ in tables]
    outputs = {name: [torch.empty_like(q) for q in queries] for name in ("kernels", "flash")}
    backend.reserve(layer.params, rows, MAX_CONTEXT)
    args = list(zip(queries, tables, outputs["kernels"], outputs["flash"], strict=True))

    def kernels(q, t, o):
        backend.decode(layer, q, DecodeBatch(t, lens, lens, MAX_CONTEXT), o, stats)

    def through_page(q, t, o):
        flash.decode(layer, q, DecodeBatch(t, lens, lens, MAX_CONTEXT), starts, o)

    cell = {"context": length, "rows": rows}
    cell["kernels"] = timed([lambda q=q, t=t, o=o: kernels(q, t, o) for q, t, o, _ in args])
    cell["flash"] = timed([lambda q=q, t=t, o=o: through_page(q, t, o) for q, t, _, o in args])
    cell["flash_own_layout"] = bench_peer(flash_attention.PEER, pool, length)
    for a, b in zip(*outputs.values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-2)
    for name in ("kernels", "flash"):
        cell[name] = pool.dense_rate(cell[name])
    return cell


def fp8_cache(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V in FlashAttention's own layout, ``[blocks, 64, Hkv, D]``."""
    shape = (2, tokens // 64, 64, LLAMA.kv, LLAMA.size)
    return torch.randn(shape, device="cuda").to(torch.float8_e4m3fn).unbind()


def prefill(backend, flash, pools: dict, length: int) -> dict:
    """Microseconds of a layer's attention for one request whose last NEW tokens are prefilled."""
    starts = torch.tensor([0, NEW], dtype=torch.int32)
    lens = torch.tensor([length], dtype=torch.int32)
    query = torch.randn(NEW, LLAMA.query, LLAMA.size, device="cuda").bfloat16()
    output, row = torch.empty_like(query), {"context": length, "new": NEW}
    for name, pool in pools.items():
        layer = pool.layer(backend, "dot", "kv_head")
        flash.reserve(layer.params, query.dtype, length)
        table = pool.tables()[0][:, : length // pool.layout.block_size]
        plan = PrefillPlan(0, NEW, starts.cuda(), lens.cuda(), table, starts, lens, NEW, length)
        args = (backend, layer, plan, query, None, None, output)
        row[name] = timed([lambda args=args: flash.prefill(*args)], replays=9)
    rows = torch.empty(2, length, LLAMA.kv, LLAMA.size, dtype=query.dtype, device="cuda")
    args = (layer, table, plan.seq_lens, *rows)  # of the last pool, fp8
    row["copy"] = timed([lambda: backend.gather(*args)], replays=9)
    k, v = fp8_cache(length)
    one, q = torch.ones(1, LLAMA.kv, device="cuda"), query.to(torch.float8_e4m3fn)
    batch = {
        "cu_seqlens_q": plan.query_start_loc,
        "max_seqlen_q": NEW,
        "seqused_k": plan.seq_lens,
        "max_seqlen_k": length,
        "block_table": torch.arange(len(k), dtype=torch.int32, device="cuda")[None],
        "causal": True,
        "fa_version": 3,
    }
    scales = {f"{x}_descale": one for x in "qkv"}
    row["flash_fp8"] = timed(
        [lambda: flash_attn_varlen_func(q, k, v, out=output, **batch, **scales)], replays=9
    )
    return row


def table(rows: list[dict], places: tuple[str, str], what: str) -> str:
    """The medians of measurements in µs, one column each after the two keys ``places``."""
    names = [name for name, one in rows[0].items() if isinstance(one, dict)]
    shown = [[*(row[p] for p in places), *(f"{row[n]['us']:.1f}" for n in names)] for row in rows]
    return f"{what}, us\n{plain([*places, *names], shown)}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", default=CELLS, help="CONTEXTxROWS")
    parser.add_argument("--name", default="dense_gpu", help="result file")
    args = parser.parse_args()
    torch.manual_seed(0)
    backend, flash = CudaBackend(), FlashAttention()
    cells = [measure(backend, flash, *map(int, cell.split("x"))) for cell in args.cells]
    print(table(cells, ("context", "rows"), "decode of a dense layer"), flush=True)
    pools = {
        name: filled(backend, MAX_CONTEXT, 1, 1, dense=False, fp8=fp8)
        for name, fp8 in (("bf16", None), ("fp8", "e4m3"))
    }
    result = {"environment": environment(), "max_context": MAX_CONTEXT, "cells": cells}
    result["prefill"] = [prefill(backend, flash, pools, length) for length in CONTEXTS]
    print(table(result["prefill"], ("context", "new"), "prefill of the last tokens"))
    print("wrote", save(args.name, result))


if __name__ == "__main__":
    main()
