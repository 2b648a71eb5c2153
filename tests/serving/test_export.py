"""The counters' way from the workers' files to /metrics."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from prometheus_client.parser import text_string_to_metric_families

from vllm_adamas.config import AdamasConfig
from vllm_adamas.serving import export, histograms
from vllm_adamas.serving.metrics import FOLDER, NAMES

COUNTERS = {0: [1, 2, 3, 4, 5], 1: [10, 20, 30, 40, 50]}


@pytest.fixture
def source(tmp_path) -> export.Source:
    folder = tmp_path / "counters"
    folder.mkdir()
    for engine, counters in COUNTERS.items():
        np.array(counters).tofile(folder / f"engine-{engine}-0-7-x.i64")
    table = np.arange(2 * histograms.WIDTH).reshape(2, -1)
    table.tofile(folder / "audit-1-12-7-x.i64")
    for process, refused in ((7, 2), (8, 3)):
        np.array([refused]).tofile(folder / f"refused-{process}-x.i64")
    options = export.options(AdamasConfig(token_budget=99))
    return export.Source(folder, "some/model", options, overhead=0.07)


def samples(registry) -> dict[str, dict[tuple, float]]:
    """Values by the name of a sample and its labels."""
    found: dict = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def collected(source: export.Source) -> dict:
    registry = CollectorRegistry()
    registry.register(export.Collector(source))
    return samples(registry)


def labelled(at: int) -> dict:
    return {
        (("engine", str(engine)), ("model_name", "some/model")): counters[at]
        for engine, counters in COUNTERS.items()
    }


def check_audit(found: dict) -> None:
    """Those of one engine's two groups of layers, whose counts are 0, 1, 2 ... in their order."""
    common = {"engine": "1", "model_name": "some/model"}
    for first, layers in ((0, "0-9"), (histograms.WIDTH, "10-11")):
        labels = tuple(sorted({**common, "layers": layers}.items()))
        last = first + histograms.WIDTH - 1
        assert found["vllm:adamas_audit_exceeded_rows_total"][labels] == last
        for at, (name, _, bounds) in enumerate(histograms.MEASURES):
            start = first + at * (histograms.BUCKETS + 1)
            counts = range(start, start + histograms.BUCKETS)
            name = f"vllm:adamas_audit_{name}"
            assert found[f"{name}_count"][labels] == sum(counts)
            assert found[f"{name}_sum"][labels] == pytest.approx(1e-6 * (counts[-1] + 1))
            for bucket, bound in enumerate([*map(str, bounds), "+Inf"]):
                within = tuple(sorted({**dict(labels), "le": bound}.items()))
                assert found[f"{name}_bucket"][within] == sum(counts[: bucket + 1])


def check(found: dict) -> None:
    check_audit(found)
    for at, (name, _) in enumerate(NAMES):
        assert found[f"vllm:adamas_{name}_total"] == labelled(at)
    model = (("model_name", "some/model"),)
    assert found["vllm:adamas_refused_requests_total"] == {model: 5}
    assert found["vllm:adamas_page_overhead_ratio"] == {model: 0.07}
    ((labels, value),) = found["vllm:adamas_config_info"].items()
    assert value == 1
    labels = dict(labels)
    assert labels["model_name"] == "some/model"
    assert labels["token_budget"] == "99"
    assert set(AdamasConfig.model_fields) - set(labels) == {
        "log_interval",
        "metrics",
        "audit_interval",
        "audit_threshold",
    }


def test_counters_have_the_labels_of_vllm(source) -> None:
    check(collected(source))


def test_the_old_names_are_sums_over_engines(source) -> None:
    found = collected(source)
    for at, (name, _) in enumerate(NAMES):
        assert found[f"vllm_adamas_{name}_total"] == {(): sum(c[at] for c in COUNTERS.values())}


def test_several_api_servers_export_the_same(source, tmp_path, monkeypatch) -> None:
    """What vLLM does there: /metrics sums the files in a folder, the one of this process among them."""
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv(export.SHARED_FOLDER, str(shared))
    file = export.SharedFile()
    for _ in range(2):  # a copy replaces the one before
        file.write(source.metrics())
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    check(samples(registry))


COMMAND = """
import os, sys, time
from vllm_adamas.serving import export
export.export("some/model", {}, 0.07)
folder = os.environ[export.FOLDER]
open(os.path.join(folder, "engine-0-0-1-x.i64"), "w").close()
export.export("some/model", {}, 0.07)
assert os.environ[export.FOLDER] == folder
print(folder, flush=True)
if sys.argv[1:]:
    sys.stdin.read()
"""


class Command:
    """A process that exports, with a folder for temporary files of its own."""

    def __init__(self, tmp_path: Path, *args: str):
        self.env = {**os.environ, "TMPDIR": str(tmp_path), FOLDER: "inherited"}
        command = [sys.executable, "-c", COMMAND, *args]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=self.env, **pipes)
        self.folder = Path(self.process.stdout.readline().strip())

    def end(self, sign: int | None = None) -> None:
        if sign is not None:
            self.process.send_signal(sign)
        self.process.communicate()


def test_a_command_names_a_folder_of_its_own_and_removes_it(tmp_path) -> None:
    command = Command(tmp_path)
    assert command.folder.parent == tmp_path
    command.end()
    assert command.process.returncode == 0
    assert not list(tmp_path.iterdir())


def test_what_a_killed_command_left_is_removed_by_the_next(tmp_path) -> None:
    """But neither the folder of a live one, nor anything that only has a similar name."""
    mine = tmp_path / f"{export.PREFIX}notes"
    mine.mkdir()
    (mine / "notes.txt").touch()
    live, killed = Command(tmp_path, "wait"), Command(tmp_path, "wait")
    killed.end(signal.SIGKILL)
    assert killed.folder.is_dir()
    Command(tmp_path).end()
    assert set(tmp_path.iterdir()) == {mine, live.folder}
    assert list(live.folder.iterdir())
    live.end()
    assert set(tmp_path.iterdir()) == {mine}


def test_links_are_not_followed(tmp_path) -> None:
    counters = tmp_path / "elsewhere" / "engine-0-0-7-x.i64"
    counters.parent.mkdir()
    counters.touch()
    (tmp_path / f"{export.PREFIX}link").symlink_to(counters.parent)
    export._make_folder(tmp_path)
    assert counters.exists()


def test_folders_of_other_users_stay(tmp_path, monkeypatch) -> None:
    """Even those that may be opened: their owner could put a link in their place."""
    theirs = Path(tempfile.mkdtemp(prefix=export.PREFIX, dir=tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: theirs.stat().st_uid + 1)
    own = export._make_folder(tmp_path)
    assert set(tmp_path.iterdir()) == {theirs, own}
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    monkeypatch.undo()
    export._remove(own)
    assert export._make_folder(tmp_path).is_dir()
    assert not theirs.exists()
