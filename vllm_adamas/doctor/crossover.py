"""From which context on sparse decode gains on this machine: attention of one layer, timed.

Every call finds its data in no cache, as in a server, where a step reads weights and other layers between
two visits to a layer. Keys are random, so the query heads of a group agree on few tokens: the worst case.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_adamas.backends.base import COUNTERS, Backend, DecodeBatch, Params
from vllm_adamas.config import AdamasConfig
from vllm_adamas.identity import Heads
from vllm_adamas.layout import PageLayout
from vllm_adamas.serving.dense.stock import Stock

DTYPE = torch.bfloat16
LLAMA = Heads(32, 8, 128)  #: of Llama-3.1-8B
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
BLOCK_SIZE = {"cpu": 128, "cuda": 64}  #: what a server takes unless told otherwise
ROUNDS = 9  #: per context; the calls take turns, and ratios are of one round
SECONDS = 15.0  #: for all contexts; those that would take longer are left out
CHUNK = 4096  #: tokens made at a time
MOST_SWEPT = 512 << 20  #: bytes
NOISE = 1.5  #: upper over lower quartile of a gain, from which on the machine counts as busy
Watch = Callable[[Callable[[], None]], float]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of the calls at one context, one per round.

    Args:
        stock: vLLM's own attention.
        dense, sparse: the backend's kernels over every token and over the token budget.
    """

    context: int
    stock: list[float]
    dense: list[float]
    sparse: list[float]

    def gain(self, over: str) -> tuple[float, float, float]:
        """Time of ``stock`` or ``dense`` over that of ``sparse``: lower quartile, median, upper quartile."""
        ratios = [a / b for a, b in zip(getattr(self, over), self.sparse, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, middle, high

    def record(self) -> dict[str, Any]:
        """Medians, and the gain over ``stock`` with its quartiles."""
        low, middle, high = self.gain("stock")
        medians = {
            f"{name}_ms": statistics.median(getattr(self, name))
            for name in ("stock", "dense", "sparse")
        }
        gain = {"median": middle, "q1": low, "q3": high}
        return {"context": self.context, **medians, "gain": gain}


class OneLayer:
    """One context of random keys and values in the pages of one layer and in the stock cache; it grows.

    Args:
        stock: class of the device's stock attention.
        config: of the layer.
        longest: tokens that it can hold.

    Attributes:
        output: ``[1, Hq, D]``, what the last call wrote.
    """

    def __init__(
        self,
        backend: Backend,
        stock: type[Stock],
        config: AdamasConfig,
        heads: Heads,
        device: str,
        longest: int,
    ):
        self._backend, self._heads, self._length = backend, heads, 0
        self._budget = config.budget
        layout = PageLayout(heads.size, BLOCK_SIZE[device], DTYPE)
        params = Params.of(
            config,
            layout,
            num_query_heads=heads.query,
            num_kv_heads=heads.kv,
            softmax_scale=heads.size**-0.5,
        )
        self._g = torch.Generator(device).manual_seed(0)
        blocks = -(-longest // layout.block_size)
        shape = (blocks, heads.kv, layout.block_size, layout.token_bytes // DTYPE.itemsize)
        self._pages = torch.zeros(shape, dtype=DTYPE, device=device)
        backend.prepare(self._pages)
        self._layer = backend.bind(params, self._pages)
        self.stock = stock(self._layer)
        self._table = torch.randperm(blocks, generator=self._g, device=device).to(torch.int32)[None]
        self._query = self._random(1, heads.query)
        self.output = torch.empty_like(self._query)
        self._stats = torch.zeros(COUNTERS, dtype=torch.int64, device=device)

    def _random(self, *shape: int) -> torch.Tensor:
        shape = (*shape, self._heads.size)
        return torch.randn(shape, generator=self._g, device=self._g.device).to(DTYPE)

    def grow(self, context: int) -> None:
        """Appends tokens until there are ``context``."""
        size, table = self._layer.params.layout.block_size, self._table[0].long()
        for first in range(self._length, context, CHUNK):
            token = torch.arange(first, min(first + CHUNK, context), device=table.device)
            slots = table[token // size] * size + token % size
            key, value = (self._random(len(token), self._heads.kv) for _ in range(2))
            self._backend.append(self._layer, key, value, slots)
            self.stock.append(key, value, slots)
        self._length = context

    def calls(self) -> dict[str, Callable[[], None]]:
        """Decode of one row over the whole context, by the names of :class:`Timing`."""
        lens = torch.full((1,), self._length, dtype=torch.int32, device=self._table.device)
        budgets = torch.full_like(lens, self._budget.most(self._length))
        sparse = DecodeBatch(self._table, lens, budgets, max_seq_len=self._length)
        dense = sparse.dense

        def decode(batch: DecodeBatch) -> None:
            self._backend.decode(self._layer, self._query, batch, self.output, self._stats)

        return {
            "stock": self.stock.attention(self._query, dense, self.output),
            "dense": lambda: decode(dense),
            "sparse": lambda: decode(sparse),
        }


class Stopwatch:
    """Milliseconds of a call whose data are in no cache."""

    def __init__(self, device: str):
        self._on_gpu = device == "cuda"
        size = 256 << 20 if self._on_gpu else min(last_level_cache(), MOST_SWEPT)
        self._swept = torch.zeros(size // 8, dtype=torch.int64, device=device)

    def __call__(self, call: Callable[[], None]) -> float:
        if self._on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._swept.zero_()  # takes longer than the host needs to launch the call
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)
        self._swept.sum()
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)


def last_level_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the processor's largest cache; 64 MiB where Linux does not tell."""
    sizes = [int(file.read_text().strip().rstrip("K")) << 10 for file in folder.glob("*/size")]
    return max(sizes, default=64 << 20)


def sparse_contexts(config: AdamasConfig) -> list[int]:
    """Those of ``CONTEXTS`` that are longer than their budget, whatever ``min_context`` is."""
    return [context for context in CONTEXTS if config.budget.most(context) < context]


def measure(layer: OneLayer, contexts: Iterable[int], watch: Watch, seconds: float) -> list[Timing]:
    """Times contexts, in ascending order, and none but the first if it would end after ``seconds``."""
    found: list[Timing] = []
    began = last = time.monotonic()
    for context in contexts:
        now = time.monotonic()
        if found and now + (now - last) > began + seconds:  # it takes longer than the one before
            break
        last = now
        layer.grow(context)
        calls = layer.calls()
        for call in calls.values():  # kernels are compiled, and workspaces are allocated
            call()
        rounds = [{name: watch(call) for name, call in calls.items()} for _ in range(ROUNDS)]
        found.append(Timing(context, **{name: [r[name] for r in rounds] for name in calls}))
    return found


def gains_from(timings: list[Timing], over: str) -> int | None:
    """The shortest context from which on sparse is faster than ``over`` in three quarters of the rounds."""
    found = None
    for timing in reversed(timings):
        if timing.gain(over)[0] <= 1:
            break
        found = timing.context
    return found


def is_noisy(timings: list[Timing]) -> bool:
    """Whether the gain at some context spreads more than on a quiet machine."""
    gains = [timing.gain("stock") for timing in timings]
    return any(high > NOISE * low for low, _, high in gains)


def suggested(options: dict[str, Any], timings: list[Timing]) -> dict[str, Any] | None:
    """Options with the ``min_context`` below which dense rows, which are exact, take no longer than sparse ones.

    Args:
        options: those that were timed.

    Returns:
        None if sparse decode gains over vLLM's own attention at no measured context.
    """
    if gains_from(timings, "stock") is None:
        return None
    found = {"token_budget": AdamasConfig.parse(options).token_budget, **options}
    least = gains_from(timings, "dense")
    if least is not None and least > timings[0].context:
        found["min_context"] = max(least, options.get("min_context", 0))
    return found
