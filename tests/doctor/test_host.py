"""What the doctor says of a host; nothing here depends on the host of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from common import is_one_sentence

from vllm_adamas.backends import registry
from vllm_adamas.backends.reference import ReferenceBackend
from vllm_adamas.doctor import host
from vllm_adamas.environment import Environment
from vllm_adamas.errors import AdamasError
from vllm_adamas.serving import compat


@pytest.fixture
def sound(monkeypatch, tmp_path: Path) -> None:
    """A vLLM that serves on the CPU of a host without a GPU."""
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(compat, "device", lambda: "cpu")
    monkeypatch.setattr(host, "DRIVER", tmp_path / "driver")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


def test_a_sound_host_has_no_problem(sound, monkeypatch) -> None:
    assert host.vllm_problems("cpu") == []
    monkeypatch.setenv("VLLM_PLUGINS", "other,adamas")
    assert host.vllm_problems("cpu") == []


def raises(error: Exception):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"vllm_version": lambda: "0.31.2"}, "vLLM 0.31.2 is not supported"),
        (
            {"vllm_version": raises(AdamasError("vLLM is not installed: install it."))},
            "not installed",
        ),
        ({"device": lambda: ""}, "finds no device"),
        (
            {"device": lambda: "cuda"},
            "vLLM serves on NVIDIA GPUs here, and PyTorch computes on CPUs",
        ),
        ({"device": raises(ImportError("libcudart.so"))}, "ImportError: libcudart.so"),
        ({"vllm_version": raises(OSError("libtorch.so"))}, "OSError: libtorch.so"),
    ],
)
def test_problems_of_vllm(sound, monkeypatch, change: dict, found: str) -> None:
    for name, value in change.items():
        monkeypatch.setattr(compat, name, value)
    (problem,) = host.vllm_problems("cpu")
    assert found in problem
    assert is_one_sentence(problem), problem


def test_plugins_that_leave_the_backend_out(sound, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    (problem,) = host.vllm_problems("cpu")
    assert problem.startswith("VLLM_PLUGINS=other leaves adamas out")
    monkeypatch.setattr(host, "entry_points", lambda group: registry_of())
    (problem,) = host.vllm_problems("cpu")
    assert problem.startswith("vLLM does not see the plugin")


def registry_of(*names: str):
    from importlib.metadata import EntryPoint, EntryPoints

    return EntryPoints(EntryPoint(name, "module:name", "vllm.general_plugins") for name in names)


def test_a_gpu_that_nobody_sees(sound) -> None:
    host.DRIVER.write_text("NVRM version: 580\n")
    (problem,) = host.vllm_problems("cpu")
    assert "NVIDIA driver" in problem
    assert is_one_sentence(problem)


def test_versions_without_vllm(monkeypatch) -> None:
    monkeypatch.setattr(compat, "vllm_version", raises(AdamasError("vLLM is not installed.")))
    assert host.versions()["vllm"] == "not installed"
    assert host.versions()["torch"] != "not installed"
    monkeypatch.setattr(compat, "vllm_version", raises(OSError("libtorch.so")))
    assert host.versions()["vllm"] != "not installed"


def test_a_gpu_is_told_with_its_capability_and_driver(monkeypatch) -> None:
    seen = Environment(cpu="Some CPU", cores=4, memory_gib=8.0, gpu="Some GPU", num_gpus=2)
    monkeypatch.setattr(
        host.Environment, "capture", lambda: seen.model_copy(update={"driver": "580.1"})
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    told = host.hardware()
    assert told["GPU"] == "2 x Some GPU, compute capability 9.0, driver 580.1"
    assert told["processor"] == "Some CPU, 4 cores, 8.0 GiB"
    monkeypatch.setattr(host.Environment, "capture", lambda: seen.model_copy(update={"gpu": None}))
    assert "GPU" not in host.hardware()


@pytest.mark.parametrize(
    ("text", "setting", "problems"),
    [
        ("always [madvise] never\n", "madvise", 0),
        ("[always] madvise never\n", "always", 0),
        ("always madvise [never]\n", "never", 1),
    ],
)
def test_huge_pages(tmp_path: Path, text: str, setting: str, problems: int) -> None:
    file = tmp_path / "enabled"
    file.write_text(text)
    told, found = host.huge_pages(file)
    assert (told, len(found)) == (setting, problems)
    assert all(map(is_one_sentence, found))
    assert host.huge_pages(tmp_path / "none") == ("not supported by this kernel", [])


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    """One NUMA node of 100 GiB of which 60 are available."""
    kib = {
        "MemTotal": 100,
        "MemFree": 10,
        "Active(file)": 20,
        "Inactive(file)": 25,
        "SReclaimable": 5,
    }
    (tmp_path / "nodes" / "node0").mkdir(parents=True)
    lines = [f"Node 0 {name}:  {size << 20} kB" for name, size in kib.items()]
    lines.append("Node 0 HugePages_Total:  0")
    (tmp_path / "nodes" / "node0" / "meminfo").write_text("\n".join(lines))
    return tmp_path / "nodes"


def test_memory_of_a_cpu_server(nodes: Path, tmp_path: Path) -> None:
    def problems(**environment: str) -> list[str]:
        found = host.memory_problems(environment, nodes, tmp_path)
        assert all(map(is_one_sentence, found)), found
        return found

    assert problems(VLLM_CPU_KVCACHE_SPACE="60") == []
    assert "61 is more than the 60.0 GiB" in problems(VLLM_CPU_KVCACHE_SPACE="61")[0]
    assert "92% of NUMA node 0, 92.0 GiB, and 60.0 are available" in problems()[0]
    assert "is not a number" in problems(VLLM_CPU_KVCACHE_SPACE="2.5")[0]
    # A container has what its limit leaves.
    (tmp_path / "memory.max").write_text(f"{20 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 30}\n")
    assert problems() == []
    (tmp_path / "memory.current").write_text(f"{5 << 30}\n")
    assert "18.4 GiB, and 15.0 are available" in problems()[0]
    (tmp_path / "memory.max").write_text("max\n")
    assert "60.0 are available" in problems()[0]
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{10 << 30}\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text(f"{3 << 30}\n")
    assert "9.2 GiB, and 7.0 are available" in problems()[0]


def test_the_default_share_is_that_of_vllm() -> None:
    from vllm.config import CacheConfig

    assert CacheConfig().gpu_memory_utilization == host.DEFAULT_SHARE


def test_kernels_that_do_not_load_are_told(monkeypatch) -> None:
    def make(name: str, device: str):
        if name == "cpu":
            raise OSError("libadamas_cpu.so: undefined symbol")
        return ReferenceBackend()

    monkeypatch.setattr(registry, "get_backend", make)
    found = registry.available("cpu")
    told = host.described(found)
    assert list(told) == ["cpu", "reference"]
    assert "OSError: libadamas_cpu.so: undefined symbol" in told["cpu"]
    assert host.chosen(found, "reference", "cpu").name == "reference"
    with pytest.raises(AdamasError, match="do not load") as error:
        host.chosen(found, "auto", "cpu")
    assert is_one_sentence(str(error.value))
    with pytest.raises(AdamasError, match="choose one of auto, cpu, reference"):
        host.chosen(found, "cuda", "cpu")
