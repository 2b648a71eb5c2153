"""Exports the workers' counters at ``/metrics``, beside vLLM's own and with the same labels.

One process reads the workers' files: the one that the command started. Its collector reads them at each
scrape. With several API servers, ``/metrics`` is the sum of the files that prometheus_client's processes
write, and a collector would vanish; the process then copies the counters into such a file once a second.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from vllm_adamas.config import AdamasConfig
from vllm_adamas.serving.histograms import EXCEEDED, MEASURES, Histogram, read_audits
from vllm_adamas.serving.metrics import FOLDER, NAMES, REFUSED, read_counters, read_refused

PREFIX = "vllm-adamas-counters-"  #: of the folders with the workers' files
COPY_INTERVAL = 1.0  #: seconds between two copies for several API servers
SHARED_FOLDER = (
    "PROMETHEUS_MULTIPROC_DIR"  #: prometheus_client's variable, set with several API servers
)
LABELS = ("model_name", "engine")  #: as vLLM's own metrics have them
AUDIT_LABELS = (*LABELS, "layers")
INFINITY = "+Inf"  #: bound of the last bucket of a histogram
INFO = ("config_info", "The options that are in force, as labels.")
OVERHEAD = ("page_overhead_ratio", "Bytes of a page beyond keys and values, over those of these.")
_exported = False  # whether this process exports the counters


@dataclass(frozen=True)
class Metric:
    """One family of samples: ``kind`` is ``counter``, ``gauge`` or ``histogram``, without ``_total`` in the name."""

    kind: str
    name: str
    text: str
    labels: tuple[str, ...]
    samples: tuple[tuple[tuple[str, ...], float | Histogram], ...]


class Source:
    """What is exported: the counters of a folder, labelled, the options of the server and what its pages take."""

    def __init__(self, folder: Path, model_name: str, options: dict[str, str], overhead: float):
        self._folder = folder
        self._model_name = model_name
        self._options = options
        self._overhead = overhead

    def metrics(self, old_names: bool = False) -> Iterator[Metric]:
        """
        Args:
            old_names: the counters also as 0.1 called them, as sums without labels; the next release drops
                these.
        """
        totals = read_counters(self._folder)
        for at, (name, text) in enumerate(NAMES):
            samples = tuple(
                ((self._model_name, str(engine)), int(counters[at]))
                for engine, counters in sorted(totals.items())
            )
            yield Metric("counter", f"vllm:adamas_{name}", text, LABELS, samples)
        yield from self._audit()
        alone = (self._model_name,)
        name, text = REFUSED
        refused = (alone, read_refused(self._folder))
        yield Metric("counter", f"vllm:adamas_{name}", text, LABELS[:1], (refused,))
        name, text = OVERHEAD
        overhead = (alone, self._overhead)
        yield Metric("gauge", f"vllm:adamas_{name}", text, LABELS[:1], (overhead,))
        name, text = INFO
        labels = ("model_name", *self._options)
        values = (self._model_name, *self._options.values())
        yield Metric("gauge", f"vllm:adamas_{name}", text, labels, ((values, 1),))
        for at, (name, text) in enumerate(NAMES if old_names else ()):
            total = sum(int(counters[at]) for counters in totals.values())
            yield Metric("counter", f"vllm_adamas_{name}", text, (), (((), total),))

    def _audit(self) -> Iterator[Metric]:
        audits = {
            (self._model_name, str(engine), group): audit
            for (engine, group), audit in sorted(read_audits(self._folder).items())
        }
        for name, text, _ in MEASURES:
            samples = tuple((values, audit.measures[name]) for values, audit in audits.items())
            yield Metric("histogram", f"vllm:adamas_audit_{name}", text, AUDIT_LABELS, samples)
        name, text = EXCEEDED
        counts = tuple((values, audit.exceeded) for values, audit in audits.items())
        yield Metric("counter", f"vllm:adamas_{name}", text, AUDIT_LABELS, counts)


def export(model_name: str, options: dict[str, str], overhead: float) -> None:
    """In the process that the command started, names the folder and exports what is written there.

    Spawned engine and worker processes keep the folder that they inherit. A process started as a command
    creates its own, even if its environment names one.

    Args:
        model_name: the label of all metrics.
        options: labels of the metric that shows the configuration.
        overhead: bytes of a page beyond keys and values, over those of these.
    """
    global _exported
    if _exported or multiprocessing.parent_process() is not None:
        return
    _exported = True
    folder = _make_folder(Path(tempfile.gettempdir()))
    os.environ[FOLDER] = str(folder)
    source = Source(folder, model_name, options, overhead)
    if SHARED_FOLDER in os.environ:
        threading.Thread(target=_copy_forever, args=(source,), daemon=True).start()
    else:
        from prometheus_client import REGISTRY

        REGISTRY.register(Collector(source))


def options(config: AdamasConfig) -> dict[str, str]:
    """The options that decide what is attended to, as labels."""
    watching = {"log_interval", "metrics", "audit_interval", "audit_threshold"}
    values = config.model_dump(mode="json", exclude=watching)
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
    }


class Collector:
    """Reads the counters whenever the registry is scraped."""

    def __init__(self, source: Source):
        self._source = source

    def describe(self) -> list:
        return []  # so that registering does not read anything yet

    def collect(self) -> Iterable:
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        families = {
            "counter": CounterMetricFamily,
            "gauge": GaugeMetricFamily,
            "histogram": HistogramMetricFamily,
        }
        for metric in self._source.metrics(old_names=True):
            family = families[metric.kind](metric.name, metric.text, labels=metric.labels)
            for values, value in metric.samples:
                if isinstance(value, Histogram):
                    buckets = zip(bounds_of(value), accumulate(value.counts), strict=True)
                    family.add_metric(values, list(buckets), value.sum)
                else:
                    family.add_metric(values, value)
            yield family


class SharedFile:
    """A file of this process in the folder that the API servers' ``/metrics`` sums up."""

    def __init__(self) -> None:
        from prometheus_client.values import MultiProcessValue

        # Unlike those of prometheus_client itself in this process.
        self._make = MultiProcessValue(lambda: f"adamas-{os.getpid()}")
        self._values: dict = {}

    def write(self, metrics: Iterable[Metric]) -> None:
        for metric in metrics:
            for values, value in metric.samples:
                if isinstance(value, Histogram):
                    self._set(metric, "_sum", metric.labels, values, value.sum)
                    labels = (*metric.labels, "le")
                    for bound, count in zip(bounds_of(value), value.counts, strict=True):
                        self._set(metric, "_bucket", labels, (*values, bound), count)
                else:
                    suffix = "_total" if metric.kind == "counter" else ""
                    self._set(metric, suffix, metric.labels, values, value)

    def _set(self, metric: Metric, suffix: str, labels, values, value: float) -> None:
        sample = metric.name + suffix
        key = sample, values
        if key not in self._values:
            mode = "max" if metric.kind == "gauge" else ""
            self._values[key] = self._make(
                metric.kind, metric.name, sample, labels, values, metric.text, mode
            )
        self._values[key].set(value)


def bounds_of(histogram: Histogram) -> list[str]:
    """The labels ``le`` of its buckets."""
    return [*map(str, histogram.bounds), INFINITY]


def _copy_forever(source: Source) -> None:
    file, pause = SharedFile(), threading.Event()
    while True:
        file.write(source.metrics())
        pause.wait(COPY_INTERVAL)


def _make_folder(parent: Path) -> Path:
    """A new folder for the workers' files, removed when this process exits.

    Its owner locks it for as long as it lives, so folders that killed processes left behind are known by
    their free lock, and are removed here.
    """
    for left in parent.glob(f"{PREFIX}*"):
        if (lock := _lock(left)) is not None:
            # Another user could put a link to any folder in the place of one of theirs.
            if os.fstat(lock).st_uid == os.geteuid():
                _remove(left)
            os.close(lock)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    while _lock(folder) is None:  # another process found it before it was locked, and removes it
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and _remove(folder))
    return folder


def _remove(folder: Path) -> None:
    """Removes the workers' files, and the folder if it holds nothing else."""
    with contextlib.suppress(OSError):
        for file in folder.glob("*.i64"):
            file.unlink(missing_ok=True)
        folder.rmdir()


def _lock(folder: Path) -> int | None:
    """Locks a folder without waiting.

    Returns:
        a descriptor that holds the lock until it is closed; None if another process has the lock.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # gone, a link, or a folder that another user keeps private
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    os.close(descriptor)
    return None
