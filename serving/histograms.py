"""Histograms of the audit: in a worker counts on the device of its kernels, for the server a file of int64.

A file has one row of counts per group of layers. For each measure a row holds the audited rows by bucket, then the
sum of their values in millionths; its last count is that of rows above the threshold.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vllm_adamas.config import AdamasConfig
from vllm_adamas.serving.metrics import Counters

FILES = "audit-*.i64"  #: audit-{index of the engine}-{layers of the model}-{process}-{random}
GROUP = 10  #: layers that share a histogram
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
ERRORS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 2.0)
MEASURES = (
    (
        "output_error",
        "||sparse - dense|| / ||dense|| of the output of audited decode rows.",
        ERRORS,
    ),
    ("kept_mass", "Softmax mass of the chosen tokens of audited decode rows.", SHARES),
    ("oracle_mass", "Softmax mass of as many tokens with the largest weights.", SHARES),
    ("recall", "Share of the tokens with the largest weights that are among the chosen.", SHARES),
)
EXCEEDED = ("audit_exceeded_rows", "Audited decode rows whose output error is above the threshold.")
BUCKETS = len(ERRORS) + 1
WIDTH = len(MEASURES) * (BUCKETS + 1) + 1
UNIT = 1e-6
LARGEST = 1e3  #: larger values and NaN count as this


def groups(num_layers: int) -> list[str]:
    """Names of the groups of layers: ``["0-9", "10-19", "20-23"]`` for 24 layers."""
    firsts = range(0, num_layers, GROUP)
    return [f"{first}-{min(first + GROUP, num_layers) - 1}" for first in firsts]


class Histogram(NamedTuple):
    """Counts of rows per bucket, the last one without a bound, and the sum of their values."""

    bounds: tuple[float, ...]
    counts: list[int]
    sum: float


class GroupAudit:
    """What was audited in one group of layers.

    Args:
        counts: int64 ``[WIDTH]``.
    """

    def __init__(self, counts: np.ndarray):
        table = counts[:-1].reshape(len(MEASURES), BUCKETS + 1)
        self.measures = {
            name: Histogram(bounds, table[at, :-1].tolist(), float(table[at, -1]) * UNIT)
            for at, (name, _, bounds) in enumerate(MEASURES)
        }
        self.rows = int(table[0, :-1].sum())
        self.exceeded = int(counts[-1])

    def mean(self, measure: str) -> float:
        return self.measures[measure].sum / self.rows


def read_audits(folder: Path) -> dict[tuple[int, str], GroupAudit]:
    """The audit of each engine, by its index, and group of layers, summed over its workers.

    Workers of a tensor parallel group audit their own heads, each for itself.
    """
    totals: dict[tuple[int, int], np.ndarray] = {}
    for file in sorted(folder.glob(FILES)):
        _, engine, layers, _ = file.name.split("-", 3)
        data = np.fromfile(file, dtype=np.int64)
        if data.size == len(groups(int(layers))) * WIDTH:
            key = int(engine), int(layers)
            totals[key] = totals.get(key, 0) + data.reshape(-1, WIDTH)
    return {
        (engine, group): GroupAudit(counts)
        for (engine, layers), table in totals.items()
        for group, counts in zip(groups(layers), table, strict=True)
    }


class Histograms:
    """The histograms of one worker.

    Args:
        device_type: where values are added from.
        engine: index of the engine among those of a data-parallel server.
        num_layers: layers of the model.
    """

    def __init__(self, config: AdamasConfig, device_type: str, engine: int, num_layers: int):
        self.groups = groups(num_layers)
        prefix = f"audit-{engine}-{num_layers}-"
        self._counters = Counters(config, prefix, len(self.groups) * WIDTH, device_type)
        self._bounds = torch.tensor([bounds for *_, bounds in MEASURES], device=device_type)
        self._threshold = config.audit_threshold
        self.copy = self._counters.copy

    def add(self, layer: int, values: torch.Tensor, valid: torch.Tensor) -> None:
        """Adds R rows of a layer, without a host sync.

        Args:
            values: float32 ``[measures, R]`` in the order of ``MEASURES``.
            valid: bool ``[R]``, rows to count.
        """
        values = values.nan_to_num(LARGEST).clamp(0, LARGEST)
        counts = self._counters.counts.view(-1, WIDTH)[layer // GROUP]  # [WIDTH]
        table = counts[:-1].view(len(MEASURES), BUCKETS + 1)
        buckets = torch.searchsorted(self._bounds, values)  # the first bound that is no smaller
        table.scatter_add_(1, buckets, valid.long().expand_as(buckets))
        table[:, -1] += ((values.double() / UNIT).round().long() * valid).sum(1)
        counts[-1] += ((values[0] > self._threshold) & valid).sum()

    def read(self) -> np.ndarray:
        """The counts of all groups as they were last copied, int64 ``[groups, WIDTH]``."""
        return self._counters.exported.view(-1, WIDTH).numpy().copy()
