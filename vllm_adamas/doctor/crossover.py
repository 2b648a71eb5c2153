"""From which context on sparse decode gains on this machine: attention of one layer, timed.

Every call finds its data in no cache, as in a server, where a step reads weights and other layers between
two visits to a layer. Keys are random, so the query heads of a group agree on few tokens: the worst case.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_adamas.backends.base import COUNTERS, Backend, DecodeBatch, Layer, Params
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
        return gain(getattr(self, over), self.sparse)

    def record(self) -> dict[str, Any]:
        """Medians, and the gain over ``stock`` with its quartiles."""
        low, middle, high = self.gain("stock")
        medians = {
            f"{name}_ms": statistics.median(getattr(self, name))
            for name in ("stock", "dense", "sparse")
        }
        gain = {"median": middle, "q1": low, "q3": high}
        return {"context": self.context, **medians, "gain": gain}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """The ratios of times of the same rounds, as :func:`quartiles`; above 1 ``after`` is faster."""
    return quartiles([a / b for a, b in zip(before, after, strict=True)])


class OneLayer:
    """Random keys and values in the pages of one layer and in the stock cache; the contexts grow.

    Args:
        stock: class of the device's stock attention.
        configs: of the layer, by the names of their calls; they differ in their budgets alone.
        longest: tokens that a context can hold.
        rows: requests of a decode step, with contexts of one length.
        copies: steps that share no page and no query.
        launch: tokens of the longest context that a step is launched for, as a captured graph is; 0 launches for
            that of the step.
        dtype: of queries, keys and values.

    Attributes:
        output: ``[rows, Hq, D]``, what the last call wrote.
    """

    def __init__(
        self,
        backend: Backend,
        stock: type[Stock],
        configs: Mapping[str, AdamasConfig],
        heads: Heads,
        device: str,
        longest: int,
        *,
        rows: int = 1,
        copies: int = 1,
        launch: int = 0,
        dtype: torch.dtype = DTYPE,
    ):
        self._backend, self._heads, self._length, self._dtype = backend, heads, 0, dtype
        self._budgets = {name: config.budget for name, config in configs.items()}
        self._launch = launch
        layout = PageLayout(heads.size, BLOCK_SIZE[device], dtype)
        self._g = torch.Generator(device).manual_seed(0)
        used = -(-longest // layout.block_size)
        blocks = copies * rows * used
        shape = (blocks, heads.kv, layout.block_size, layout.token_bytes // dtype.itemsize)
        self._pages = torch.zeros(shape, dtype=dtype, device=device)
        backend.prepare(self._pages)
        self._layers = {}
        for name, config in configs.items():
            params = Params.of(
                config,
                layout,
                num_query_heads=heads.query,
                num_kv_heads=heads.kv,
                softmax_scale=heads.size**-0.5,
            )
            backend.reserve(params, rows, max(launch, longest))
            self._layers[name] = backend.bind(params, self._pages)
        self._layer = next(iter(self._layers.values()))
        self.stock = stock(self._layer)
        order = torch.randperm(blocks, generator=self._g, device=device).to(torch.int32)
        columns = max(used, -(-launch // layout.block_size))
        self._table = order.new_zeros(copies, rows, columns)
        self._table[..., :used] = order.view(copies, rows, used)
        self._query = self._random(copies, rows, heads.query)
        self.output = torch.empty_like(self._query[0])
        self._stats = torch.zeros(COUNTERS, dtype=torch.int64, device=device)

    def _random(self, *shape: int) -> torch.Tensor:
        shape = (*shape, self._heads.size)
        return torch.randn(shape, generator=self._g, device=self._g.device).to(self._dtype)

    def grow(self, context: int) -> None:
        """Appends tokens until every context has ``context``."""
        size = self._layer.params.layout.block_size
        for table in self._table.flatten(0, 1).long():
            for first in range(self._length, context, CHUNK):
                token = torch.arange(first, min(first + CHUNK, context), device=table.device)
                slots = table[token // size] * size + token % size
                key, value = (self._random(len(token), self._heads.kv) for _ in range(2))
                self._backend.append(self._layer, key, value, slots)
                self.stock.append(key, value, slots)
        self._length = context

    def calls(self, copy: int = 0) -> dict[str, Callable[[], None]]:
        """Decode of the rows of a copy: ``stock``, ``dense`` over every token by our kernels, and each configuration."""
        table, query = self._table[copy], self._query[copy]
        lens = torch.full((len(table),), self._length, dtype=torch.int32, device=table.device)
        launch = max(self._launch, self._length)

        def decode(layer: Layer, batch: DecodeBatch) -> Callable[[], None]:
            return lambda: self._backend.decode(layer, query, batch, self.output, self._stats)

        sparse = {
            name: DecodeBatch(
                table,
                lens,
                torch.full_like(lens, budget.most(self._length)),
                max_seq_len=launch,
                overlap=self._launch > 0,  # projections precede decode in a captured step
            )
            for name, budget in self._budgets.items()
        }
        dense = next(iter(sparse.values())).dense
        return {
            "stock": self.stock.attention(query, dense, self.output),
            "dense": decode(self._layer, dense),
            **{name: decode(self._layers[name], batch) for name, batch in sparse.items()},
        }


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of calls, each of which has run once before, when kernels are compiled and tables made."""
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
    return faster_from([(timing.context, timing.gain(over)[0]) for timing in timings])


def faster_from(gains: Sequence[tuple[int, float]]) -> int | None:
    """The shortest context from which on the lower quartile of the gain is above 1; contexts ascend."""
    found = None
    for context, low in reversed(gains):
        if low <= 1:
            break
        found = context
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
