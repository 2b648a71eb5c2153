"""Selection counters of the workers: kernels add to them, and the server exports them (``export.py``).

Each worker maps a file of int64 counters, in a folder that the server names in the environment before it
starts the engine.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import torch

from vllm_adamas.config import AdamasConfig

FOLDER = "VLLM_ADAMAS_METRICS_DIR"
FILES = "engine-*.i64"  #: engine-{index of the engine}-{tensor parallel rank}-{process}-{random}
REFUSED_FILES = "refused-*.i64"  #: refused-{process}-{random}, of a process that takes requests
NAMES = (
    ("sparse_rows", "Decode rows (query tokens times layers) that attended to selected tokens."),
    ("dense_rows", "Decode rows of sparse layers that attended to their whole context."),
    ("decode_context_tokens", "Context tokens of those rows, times query heads."),
    ("decode_attended_tokens", "Tokens that those rows attended to, times query heads."),
    ("reselected_token_sets", "Token sets that the slow path of a GPU kernel selected again."),
)

REFUSED = ("refused_requests", "Requests that asked for a token budget that is not served.")
_refusing = threading.Lock()


def read_counters(folder: Path) -> dict[int, np.ndarray]:
    """The counters of each engine, by its index, summed over its workers.

    Workers of a tensor parallel group have the same rows but different heads, so only rank 0 counts rows.
    """
    totals: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(len(NAMES), dtype=np.int64))
    for file in sorted(folder.glob(FILES)):
        data = np.fromfile(file, dtype=np.int64)
        if data.size == len(NAMES):
            _, engine, rank, _ = file.name.split("-", 3)
            if rank != "0":
                data[:2] = 0
            totals[int(engine)] += data
    return dict(totals)


def read_refused(folder: Path) -> int:
    """Refused requests, summed over the processes that take requests."""
    return sum(int(np.fromfile(file, dtype=np.int64).sum()) for file in folder.glob(REFUSED_FILES))


def count_refused() -> None:
    """Counts a request that this process has refused."""
    with _refusing:
        _refused(os.getpid(), os.environ.get(FOLDER))[0] += 1


@cache
def _refused(process: int, folder: str | None) -> np.ndarray:
    """The count of a process, int64 ``[1]``; in the folder if there is one."""
    if not (folder and os.path.isdir(folder)):
        return np.zeros(1, dtype=np.int64)
    return _mapped(folder, f"refused-{process}-", 1)


def _mapped(folder: str, prefix: str, size: int) -> np.ndarray:
    """int64 zeros ``[size]`` in a new file, unique even for several engines in one process."""
    handle, file = tempfile.mkstemp(".i64", prefix, folder)
    os.close(handle)
    return np.memmap(file, dtype=np.int64, mode="w+", shape=(size,))


class Counters:
    """int64 counters of a worker, and their copy in a file that the server reads.

    Args:
        prefix: of the file's name.
        size: number of counters.
        device_type: where they are added to. On a CPU that is the mapped file itself. Counters of another
            device are copied into it, without a sync, at most once a second.
    """

    COPY_INTERVAL = 1.0

    def __init__(self, config: AdamasConfig, prefix: str, size: int, device_type: str):
        self.exported = self._open(config, f"{prefix}{os.getpid()}-", size)
        on_host = device_type == "cpu"
        self.counts = (
            self.exported if on_host else torch.zeros_like(self.exported, device=device_type)
        )
        self._staged = None if on_host else torch.zeros_like(self.exported, pin_memory=True)
        self._next_copy = 0.0

    @staticmethod
    def _open(config: AdamasConfig, prefix: str, size: int) -> torch.Tensor:
        folder = os.environ.get(FOLDER)
        if not (config.metrics and folder and os.path.isdir(folder)):
            return torch.zeros(size, dtype=torch.int64, device="cpu")  # vLLM sets a default
        return torch.from_numpy(_mapped(folder, prefix, size))

    def copy(self, now: float) -> None:
        """Called once per step; exports the counters when their interval has passed."""
        if self._staged is not None and now >= self._next_copy:
            self.exported.copy_(self._staged)  # the copy started a second ago
            self._staged.copy_(self.counts, non_blocking=True)
            self._next_copy = now + self.COPY_INTERVAL


class SelectionStats:
    """The counters of one engine in one worker process, and its periodic log line.

    Dense layers have separate counters, so the exported figures are those of sparse layers alone.

    Args:
        device_type: device of the kernels.
        engine: index of the engine among those of a data-parallel server.
        rank: tensor parallel rank of the worker.
    """

    def __init__(self, config: AdamasConfig, device_type: str, engine: int = 0, rank: int = 0):
        self._counters = Counters(config, f"engine-{engine}-{rank}-", len(NAMES), device_type)
        self._sparse = self._counters.counts
        self._dense = torch.zeros_like(self._sparse)
        self._interval = config.log_interval
        self._logged = self._counters.exported.tolist()
        self._next_log = time.monotonic() + self._interval
        self.warming_up = False

    def counters(self, dense_layer: bool) -> torch.Tensor:
        """The int64 ``[COUNTERS]`` counters that kernels add to, in the order of ``NAMES``."""
        return self._dense if dense_layer else self._sparse

    def tick(self) -> None:
        """Called once per step; exports and logs the counters when their intervals have passed."""
        if self.warming_up:  # the steps before this one captured graphs with made-up requests
            self._sparse.zero_()
            self._dense.zero_()
            self.warming_up = False
        now = time.monotonic()
        self._counters.copy(now)
        if self._interval and now >= self._next_log:
            self._next_log = now + self._interval
            self._log()

    def _log(self) -> None:
        from vllm.logger import init_logger

        total = self._counters.exported.tolist()
        sparse, dense, context, attended, _ = (
            a - b for a, b in zip(total, self._logged, strict=True)
        )
        self._logged = total
        if context:
            init_logger("vllm.adamas").info(
                "Selection: attended %.1f%% of context tokens; %.1f%% of decode rows sparse.",
                100 * attended / context,
                100 * sparse / max(1, sparse + dense),
            )
