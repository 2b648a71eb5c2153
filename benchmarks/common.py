"""What every benchmark shares: environment facts, statistics, and the file that keeps the result."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def hardware() -> dict:
    """Processor, cores and versions, as a result file records them."""
    import torch

    import vllm_adamas
    from vllm_adamas.serving import compat

    model, flags = platform.machine(), set()
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            if key.strip() == "flags":
                flags = set(value.split())
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=RESULTS.parent,
    ).stdout.strip()
    interesting = ("avx2", "avx512f", "avx512_vpopcntdq", "avx512_vnni", "avx512_bf16", "amx_tile")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "instruction_sets": [f for f in interesting if f in flags],
        "torch": torch.__version__,
        "vllm": compat.vllm_version(),
        "vllm_adamas": vllm_adamas.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def gpu_hardware() -> dict:
    """As :func:`hardware`, for a benchmark that runs on a GPU."""
    import torch

    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    first = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
    name, _, driver = first.partition(",")
    gpu = {"gpu": name.strip(), "driver": driver.strip(), "cuda": torch.version.cuda}
    return gpu | hardware()


def spread(samples: list[float]) -> dict:
    """Median and quartiles of a list of times or ratios."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "n": len(samples)}


def save(name: str, result: dict) -> Path:
    """Writes ``benchmarks/results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def update_document(document: Path, script: str, lines: list[str]) -> int:
    """Writes ``lines`` between the markers that name the script; the exit status of a command.

    With ``--check`` on the command line nothing is written, and it is 1 when the document differs.
    """
    begin = f"<!-- results: begin (benchmarks/{script}.py writes this part) -->"
    end = "<!-- results: end -->"
    text = document.read_text()
    start, stop = text.index(begin), text.index(end) + len(end)
    new = text[:start] + "\n".join([begin, *lines, end]) + text[stop:]
    if "--check" in sys.argv:
        return int(new != text)
    document.write_text(new)
    return 0
