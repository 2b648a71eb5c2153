"""Selection counters: kernels add to them in the worker, the API server exports them on /metrics.

The counters are a file of int64 that both processes map. The API server names a folder in the
environment before it starts the engine; each worker creates its file there.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch

from vllm_adamas.config import AdamasConfig

FOLDER = "VLLM_ADAMAS_METRICS_DIR"
NAMES = (
    ("sparse_rows", "Decode rows (query tokens times layers) that attended to selected tokens."),
    ("dense_rows", "Decode rows of sparse layers that attended to their whole context."),
    ("decode_context_tokens", "Context tokens of those rows, times query heads."),
    ("decode_attended_tokens", "Tokens that those rows attended to, times query heads."),
)


def announce() -> None:
    """In the process that serves HTTP: names the folder and exports what workers write into it."""
    if FOLDER in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="vllm-adamas-")
    os.environ[FOLDER] = folder
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    _export(Path(folder))


@cache
def _export(folder: Path) -> None:
    from prometheus_client import REGISTRY
    from prometheus_client.core import CounterMetricFamily

    class Collector:
        def collect(self):
            totals = read_counters(folder)
            for (name, text), total in zip(NAMES, totals, strict=True):
                yield CounterMetricFamily(f"vllm_adamas_{name}", text, value=int(total))

        def describe(self):
            return []

    REGISTRY.register(Collector())


def read_counters(folder: Path) -> np.ndarray:
    """The four counters summed over the workers of one server."""
    total = np.zeros(len(NAMES), dtype=np.int64)
    for file in sorted(folder.glob("worker-*.i64")):
        data = np.fromfile(file, dtype=np.int64)
        if data.size == len(NAMES):
            total += data
    return total


class SelectionStats:
    """The counters of one worker process, and its periodic log line.

    Dense layers count apart, so that the exported figures speak of sparse layers alone.
    """

    def __init__(self, config: AdamasConfig):
        folder = os.environ.get(FOLDER)
        if config.metrics and folder and os.path.isdir(folder):
            file = Path(folder) / f"worker-{os.getpid()}.i64"
            mapped = np.memmap(file, dtype=np.int64, mode="w+", shape=(len(NAMES),))
            self._sparse = torch.from_numpy(mapped)
        else:
            self._sparse = torch.zeros(len(NAMES), dtype=torch.int64)
        self._dense = torch.zeros(len(NAMES), dtype=torch.int64)
        self._interval = config.log_interval
        self._logged = self._sparse.tolist()
        self._next = time.monotonic() + self._interval

    @staticmethod
    @cache
    def shared(config: AdamasConfig) -> SelectionStats:
        """One instance per process."""
        return SelectionStats(config)

    def counters(self, dense_layer: bool) -> torch.Tensor:
        """The int64[4] that a kernel adds to."""
        return self._dense if dense_layer else self._sparse

    def tick(self) -> None:
        """Logs what was attended since the last line, when the interval has passed."""
        if not self._interval or time.monotonic() < self._next:
            return
        from vllm.logger import init_logger

        now = self._sparse.tolist()
        sparse, dense, context, attended = (a - b for a, b in zip(now, self._logged, strict=True))
        self._logged, self._next = now, time.monotonic() + self._interval
        if context:
            init_logger("vllm.adamas").info(
                "Selection: attended %.1f%% of context tokens; %.1f%% of decode rows sparse.",
                100 * attended / context,
                100 * sparse / max(1, sparse + dense),
            )
