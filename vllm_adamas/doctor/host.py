"""What runs on this host, and what is wrong with it: each problem one sentence with the way out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

import torch

from vllm_adamas.backends.base import Backend
from vllm_adamas.backends.registry import find_kernels
from vllm_adamas.environment import Environment, package_versions
from vllm_adamas.errors import AdamasError
from vllm_adamas.serving import compat

#: Distributions whose versions are printed.
PACKAGES = ("vllm-adamas", "vllm", "torch", "triton", "apache-tvm-ffi")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NODES = Path("/sys/devices/system/node")
DRIVER = Path("/proc/driver/nvidia/version")
CGROUP = Path("/sys/fs/cgroup")
#: Limit and usage of a container's memory in bytes, in versions 2 and 1 of control groups.
CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
#: Share of a NUMA node's memory that a CPU server of vLLM asks for unless told otherwise
#: (the default of ``--gpu-memory-utilization``).
DEFAULT_SHARE = 0.92
GIB = 2**30


def versions() -> dict[str, str]:
    """Versions of ``PACKAGES``; vLLM's as it names itself, if it can be imported."""
    found = package_versions(PACKAGES)
    try:
        found["vllm"] = compat.vllm_version()
    except AdamasError:
        found.pop("vllm", None)
    except Exception:  # whatever a broken installation raises; vllm_problems tells it
        found.setdefault("vllm", "broken")
    return {name: found.get(name, "not installed") for name in PACKAGES}


def device() -> str:
    """Type of the device that kernels run on here, ``cuda`` or ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def hardware() -> dict[str, str]:
    """Processor and GPU in words."""
    here = Environment.capture()
    sets = " ".join(here.instruction_sets or ()) or "none that the kernels use"
    found = {
        "processor": f"{here.cpu}, {here.cores} cores, {here.memory_gib} GiB",
        "instruction sets": sets,
    }
    if here.gpu:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        driver = f", driver {here.driver}" if here.driver else ""
        found["GPU"] = f"{here.num_gpus} x {here.gpu}, compute capability {capability}{driver}"
    return found


def vllm_problems(device: str) -> list[str]:
    """What keeps vLLM from serving with the backend.

    Args:
        device: type of the device that PyTorch sees.
    """
    try:
        problem, served = compat.unsupported_vllm(), compat.device()
    except AdamasError as error:
        return [str(error)]
    except Exception as error:  # whatever a broken installation raises
        return [
            f"vLLM does not start ({type(error).__name__}: {error}): install vLLM {compat.SUPPORTED} again."
        ]
    found = [problem] if problem else []
    plugins = os.environ.get("VLLM_PLUGINS")
    if "adamas" not in entry_points(group="vllm.general_plugins").names:
        found.append(
            "vLLM does not see the plugin: install vllm-adamas into this environment again."
        )
    elif plugins is not None and "adamas" not in plugins.split(","):
        found.append(
            f"VLLM_PLUGINS={plugins} leaves adamas out, so vLLM does not know the backend: add adamas to it."
        )
    if not served:
        found.append(
            "vLLM finds no device that it was built for: install 'vllm-adamas[cuda]' on a host with an NVIDIA "
            "GPU, or run `make setup` on another, which also repairs vLLM's CPU package."
        )
    elif served != device:
        builds = {"cpu": "CPUs", "cuda": "NVIDIA GPUs"}
        found.append(
            f"vLLM serves on {builds[served]} here, and PyTorch computes on {builds[device]}: install builds of "
            "both for one device."
        )
    elif device == "cpu" and DRIVER.exists():
        found.append(
            "this host has an NVIDIA driver, but vLLM and PyTorch see no GPU: install 'vllm-adamas[cuda]' and "
            "look at CUDA_VISIBLE_DEVICES, or remove the driver to serve on the processor."
        )
    return found


def described(found: dict[str, Backend | AdamasError]) -> dict[str, str]:
    """Every set of kernels in words.

    Args:
        found: what is available on the device, by name.
    """
    return {
        name: f"not available: {one}" if isinstance(one, AdamasError) else one.description
        for name, one in found.items()
    }


def chosen(found: dict[str, Backend | AdamasError], kernels: str, device: str) -> Backend:
    """The backend that a value of the option ``kernels`` takes.

    Args:
        found: what is available on the device, by name.

    Raises:
        AdamasError: there is none.
    """
    backend = found[find_kernels(kernels, device).name]
    if isinstance(backend, AdamasError):
        raise backend
    return backend


def huge_pages(file: Path = HUGE_PAGES) -> tuple[str, list[str]]:
    """Linux's setting of transparent huge pages (always, madvise or never), and problems."""
    if not file.exists():
        return "not supported by this kernel", []
    setting = file.read_text().partition("[")[2].partition("]")[0]
    if setting != "never":
        return setting, []
    return setting, [
        "transparent huge pages are off, which slows decode on a CPU down: as root, write madvise to "
        f"{file}."
    ]


def memory_problems(
    environment: Mapping[str, str], nodes: Path = NODES, cgroup: Path = CGROUP
) -> list[str]:
    """Whether a CPU server finds the memory that it asks for; vLLM looks at the node of its first processor.

    Args:
        environment: variables of the process.
    """
    asked, found = environment.get("VLLM_CPU_KVCACHE_SPACE", ""), []
    if asked and not asked.isdecimal():
        return [f"VLLM_CPU_KVCACHE_SPACE={asked} is not a number: give whole GiB."]
    for node in sorted(nodes.glob("node[0-9]*/meminfo")):
        total, free = _memory(node, cgroup)
        where = f"NUMA node {node.parent.name.removeprefix('node')}"
        if asked and int(asked) * GIB > free:
            found.append(
                f"VLLM_CPU_KVCACHE_SPACE={asked} is more than the {free / GIB:.1f} GiB that {where} has available: "
                "lower it."
            )
        elif not asked and DEFAULT_SHARE * total > free:
            found.append(
                f"vLLM asks for {DEFAULT_SHARE:.0%} of {where}, {DEFAULT_SHARE * total / GIB:.1f} GiB, and "
                f"{free / GIB:.1f} are available: set VLLM_CPU_KVCACHE_SPACE to the GiB of the KV cache, or pass a "
                "lower --gpu-memory-utilization."
            )
    return found


def available_memory(file: Path = Path("/proc/meminfo")) -> int:
    """Bytes of this host that a process can take without swapping."""
    lines = dict(line.split(":") for line in file.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10


def _memory(node: Path, cgroup: Path) -> tuple[int, int]:
    """Bytes that a node has and that are available, as vLLM counts them."""
    kib = {}
    for line in node.read_text().splitlines():
        _, _, name, value, *_ = line.split()
        kib[name.rstrip(":")] = int(value)
    free = sum(kib[name] for name in ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable"))
    total, free = kib["MemTotal"] << 10, free << 10
    for limit, usage in CGROUP_FILES:
        text = (cgroup / limit).read_text().strip() if (cgroup / limit).exists() else "max"
        if text != "max" and int(text) < total:
            total = int(text)
            free = max(0, min(free, total - int((cgroup / usage).read_text())))
    return total, free
