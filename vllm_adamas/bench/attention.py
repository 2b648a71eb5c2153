"""A decode step of one layer, timed on this device beside vLLM's own attention, in a process of its own.

On a GPU a step is launched as a server's captured graph is: for the longest context that the server admits. Every
step finds its data in no cache. Keys are random, so the query heads of a group agree on few tokens: the worst case.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_adamas.backends.base import Backend
from vllm_adamas.backends.registry import get_backend
from vllm_adamas.config import AdamasConfig
from vllm_adamas.doctor import host
from vllm_adamas.doctor.crossover import BLOCK_SIZE, OneLayer, Stopwatch, captured
from vllm_adamas.identity import Heads
from vllm_adamas.layout import PageLayout
from vllm_adamas.serving.dense.stock import STOCK
from vllm_adamas.worker import serve

ROUNDS, WARM_UP = 15, 3  #: measured rounds of a cell, and those before them; calls take turns
COPIES = 16  #: most steps of a graph, which share the time of its launch
POOL_BYTES = 4 << 30  #: of the pages of a graph with several steps
SHARE = 0.8  #: of the free memory that a cell may take
GIB = 1 << 30


class Cells:
    """
    Args:
        heads: of the layer.
        dtype: of queries, keys and values.
        launch: tokens of the longest context that a server admits.
        options: of the configurations by name.
    """

    def __init__(self, heads: list[int], dtype: str, launch: int, options: dict[str, dict]):
        self.heads, self.dtype = Heads(*heads), getattr(torch, dtype)
        self.device = host.device()
        self.launch = launch if self.device == "cuda" else 0
        self.configs = {name: AdamasConfig.parse(given) for name, given in options.items()}
        kernels = next(iter(self.configs.values())).kernels
        self.backend: Backend = get_backend(kernels, self.device)
        self.watch = Stopwatch(self.device)

    def told(self) -> dict[str, Any]:
        """The kernels, vLLM's attention and the threads on a CPU."""
        return {
            "kernels": self.backend.description,
            "attention": STOCK[self.device].name,
            "threads": torch.get_num_threads() if self.device == "cpu" else None,
        }

    def measure(self, context: int, batch: int, names: list[str]) -> dict[str, Any]:
        """Microseconds of ``ROUNDS`` rounds by call, ``stock`` among them, or why there are none.

        Args:
            batch: rows of a step, each with ``context`` tokens.
            names: of configurations.
        """
        size, free = self._bytes(context, batch), self._free()
        if size > SHARE * free:
            return {
                "left out": f"K and V of a layer take {size / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"
            }
        on_gpu = self.device == "cuda"
        most = max(1, min(COPIES, int(min(POOL_BYTES, SHARE * free) // size)))
        copies = most if on_gpu else 1
        layer = OneLayer(
            self.backend,
            STOCK[self.device],
            {name: self.configs[name] for name in names},
            self.heads,
            self.device,
            context,
            rows=batch,
            copies=copies,
            launch=self.launch,
            dtype=self.dtype,
        )
        layer.grow(context)
        steps = [layer.calls(copy) for copy in range(copies)]
        calls = {name: [step[name] for step in steps] for name in ("stock", *names)}
        if on_gpu:
            once = {name: captured(some).replay for name, some in calls.items()}
        else:
            once = {name: some[0] for name, some in calls.items()}
        found: dict[str, list[float]] = {name: [] for name in once}
        for number in range(WARM_UP + ROUNDS):
            for name in list(once)[:: 1 if number % 2 else -1]:
                found[name].append(round(1e3 * self.watch(once[name]) / copies, 3))
        return {"us": {name: times[WARM_UP:] for name, times in found.items()}, "copies": copies}

    def _bytes(self, context: int, batch: int) -> int:
        """Of the pages of a step, and of the stock cache where it is not the same."""
        layout = PageLayout(self.heads.size, BLOCK_SIZE[self.device], self.dtype)
        token = layout.token_bytes
        if self.device == "cpu":
            token += 2 * self.heads.size * self.dtype.itemsize
        tokens = -(-context // layout.block_size) * layout.block_size
        return batch * tokens * self.heads.kv * token

    def _free(self) -> int:
        if self.device == "cuda":
            torch.cuda.empty_cache()  # pages of the cell before
            return torch.cuda.mem_get_info()[0]
        return host.available_memory()


class Answers:
    """What the process answers: first :meth:`Cells.told`, then cells."""

    def __init__(self):
        self._cells: Cells | None = None

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self._cells is not None:
            return self._cells.measure(**asked)
        self._cells = Cells(**asked)
        return self._cells.told()


if __name__ == "__main__":
    serve(Answers())
