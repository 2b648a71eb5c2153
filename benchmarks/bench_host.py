"""Host time of one eager decode of one row, by backend: argument checks, launch plan and launches.

On a GPU the calls are queued and not waited for. On a CPU a call computes the row itself, so its context is
short and attention takes little of the time.

    python benchmarks/bench_host.py
"""

from __future__ import annotations

import argparse
import time

import torch
from records import environment, save, spread

from vllm_adamas.backends.base import COUNTERS, Backend, DecodeBatch, Params
from vllm_adamas.backends.registry import get_backend
from vllm_adamas.config import AdamasConfig
from vllm_adamas.errors import AdamasError
from vllm_adamas.layout import PageLayout
from vllm_adamas.tables import plain

QUERY_HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, DTYPE = 32, 8, 128, 64, torch.bfloat16
CONTEXT = 64
CALLS, REPEATS = 200, 21  # few enough calls that a GPU's queue never fills
KEYS = ("median", "q1", "q3")
BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def host_time(backend: Backend, device: str) -> dict:
    """Microseconds per call: median and quartiles over repeats of ``CALLS`` calls."""
    layout = PageLayout(HEAD_SIZE, BLOCK_SIZE, DTYPE)
    params = Params.of(
        AdamasConfig(),
        layout,
        num_query_heads=QUERY_HEADS,
        num_kv_heads=KV_HEADS,
        softmax_scale=HEAD_SIZE**-0.5,
    )
    shape = (1, KV_HEADS, BLOCK_SIZE, layout.token_bytes // DTYPE.itemsize)
    pages = torch.zeros(shape, dtype=DTYPE, device=device)
    backend.prepare(pages)
    backend.reserve(params, 1, CONTEXT)
    layer = backend.bind(params, pages)
    lens = torch.full((1,), CONTEXT, dtype=torch.int32, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    batch = DecodeBatch(table, lens, lens, CONTEXT)
    query = torch.randn(1, QUERY_HEADS, HEAD_SIZE, device=device).to(DTYPE)
    output, stats = torch.empty_like(query), torch.zeros(COUNTERS, dtype=torch.int64, device=device)
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        for _ in range(CALLS):
            backend.decode(layer, query, batch, output, stats)
        times.append((time.perf_counter() - start) / CALLS * 1e6)
        if device == "cuda":
            torch.cuda.synchronize()
    return spread(times[1:])  # the first repeat compiles and allocates


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="host", help="result file; empty writes none")
    args = parser.parse_args()
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    found = {}
    for device in devices:
        for name in BACKENDS[device]:
            try:
                backend = get_backend(name, device)
            except AdamasError as error:  # not built, or not for this GPU
                print(f"{name} is left out: {error}")
                continue
            found[name] = host_time(backend, device) | {"description": backend.description}
    rows = [[name, *(f"{one[key]:.2f}" for key in KEYS)] for name, one in found.items()]
    print(plain(["us", *KEYS], rows))
    if args.name:
        result = {"environment": environment(), "context": CONTEXT, "calls": CALLS, "us": found}
        print("wrote", save(args.name, result))


if __name__ == "__main__":
    main()
