"""The counters' way from a worker's kernels to a file of its own."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_adamas.backends.base import COUNTERS
from vllm_adamas.config import AdamasConfig
from vllm_adamas.serving import metrics


def read(folder: Path) -> dict[int, list[int]]:
    return {engine: counters.tolist() for engine, counters in metrics.read_counters(folder).items()}


def test_every_counter_has_a_name() -> None:
    assert len(metrics.NAMES) == COUNTERS


def test_counters_are_summed_over_workers(tmp_path) -> None:
    np.array([1, 2, 3, 4, 5]).tofile(tmp_path / "engine-0-0-11-a.i64")
    np.array([10, 20, 30, 40, 50]).tofile(tmp_path / "engine-0-0-12-b.i64")
    np.array([6, 7, 8, 9, 0]).tofile(tmp_path / "engine-1-0-13-c.i64")
    (tmp_path / "engine-0-0-14-d.i64").write_bytes(b"torn")  # just being made
    assert read(tmp_path) == {0: [11, 22, 33, 44, 55], 1: [6, 7, 8, 9, 0]}


def test_rows_whose_heads_are_shared_count_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    pid = os.getpid()
    for rank in range(2):
        monkeypatch.setattr(os, "getpid", lambda rank=rank: pid + rank)
        stats = metrics.SelectionStats(AdamasConfig(), "cpu", rank=rank)
        stats.counters(dense_layer=False).add_(torch.tensor([3, 2, 80, 8, 1]))
    assert read(tmp_path) == {0: [3, 2, 160, 16, 2]}


def test_what_kernels_add_is_in_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    stats = metrics.SelectionStats(AdamasConfig(), "cpu")
    stats.counters(dense_layer=False).add_(torch.tensor([1, 0, 80, 8, 1]))
    stats.counters(dense_layer=True).add_(torch.tensor([0, 1, 80, 80, 0]))
    assert read(tmp_path) == {0: [1, 0, 80, 8, 1]}
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_steps_that_warm_up_are_not_counted(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    stats = metrics.SelectionStats(AdamasConfig(), "cpu")
    stats.counters(dense_layer=False).add_(7)
    stats.warming_up = True
    stats.tick()
    stats.counters(dense_layer=False).add_(1)
    stats.tick()
    assert read(tmp_path) == {0: [1] * COUNTERS}


def test_refusals_are_summed_over_processes(tmp_path, monkeypatch) -> None:
    metrics.count_refused()  # without a folder
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    assert metrics.read_refused(tmp_path) == 0
    pid = os.getpid()
    for process, requests in ((pid, 3), (pid + 1, 1)):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        for _ in range(requests):
            metrics.count_refused()
    assert metrics.read_refused(tmp_path) == 4
    assert len(list(tmp_path.glob(metrics.REFUSED_FILES))) == 2
    assert metrics.read_counters(tmp_path) == {}


def test_nothing_is_written_when_turned_off(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    stats = metrics.SelectionStats(AdamasConfig(metrics=False), "cpu")
    stats.counters(dense_layer=False).add_(1)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_never_waits_for_the_gpu(tmp_path, monkeypatch) -> None:
    """CUDA raises an error where the host would wait."""
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    monkeypatch.setattr(metrics.Counters, "COPY_INTERVAL", 0.0)
    stats = metrics.SelectionStats(AdamasConfig(), "cuda")
    stats.counters(dense_layer=False).add_(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            stats.counters(dense_layer=False).tolist()
        stats.tick()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    stats.tick()  # brings what the step before has copied
    assert read(tmp_path) == {0: [1] * COUNTERS}
