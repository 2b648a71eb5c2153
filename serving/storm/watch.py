"""Monitors a server during a storm: restarts, health, counters and memory."""

from __future__ import annotations

from contextlib import suppress

from vllm_adamas.serving.launch import parse_metrics
from vllm_adamas.serving.storm.client import Endpoint, name_of

START = "process_start_time_seconds"
BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting")
COUNTERS = (
    "vllm:request_success_total",
    "vllm:num_preemptions_total",
    "vllm:spec_decode_num_drafts_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:adamas_sparse_rows_total",
    "vllm:adamas_dense_rows_total",
    "vllm:adamas_decode_context_tokens_total",
    "vllm:adamas_decode_attended_tokens_total",
    "vllm:adamas_reselected_token_sets_total",
)
MIB = 2**20


class Watch:
    """Polls `/health` and `/metrics`.

    A changed start time of the process reveals a restart, however short it was.
    """

    def __init__(self, server: Endpoint):
        self._server = server
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self.restarts = 0
        self.unhealthy: list[str] = []

    async def look(self) -> bool:
        """Polls the server once; returns whether it is healthy."""
        try:
            status, _ = await self._server.get("/health")
            problem = None if status == 200 else f"/health {status}"
            code, text = await self._server.get("/metrics")
            if code == 200:
                self._take(parse_metrics(text))
        except Exception as error:
            problem = name_of(error)
        if problem:
            self.unhealthy.append(problem)
        return problem is None

    def _take(self, now: dict[str, float]) -> None:
        if self._last and now.get(START) != self._last.get(START):
            self.restarts += 1
        self._first = self._first or now
        self._last = now

    def busy(self) -> int:
        """Requests that run or wait."""
        return int(sum(self._last.get(name, 0) for name in BUSY))

    def moved(self) -> dict[str, float]:
        """Increase of each counter that the server exports since the first look."""
        return {
            name: self._last[name] - self._first.get(name, 0)
            for name in COUNTERS
            if name in self._last
        }


def memory(pid: int) -> dict[str, float]:
    """Memory in MiB of a process and its descendants: ``rss`` and ``gpu``.

    Entries are left out if psutil, the process or the GPU driver is missing.
    """
    try:
        import psutil
    except ImportError:
        return {}
    tree = {}
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # a child that has just ended
                tree[process.pid] = process.memory_info().rss
    if not tree:
        return {}
    found = {"rss": sum(tree.values()) / MIB}
    if (gpu := _gpu_bytes(set(tree))) is not None:
        found["gpu"] = gpu / MIB
    return found


def _gpu_bytes(pids: set[int]) -> int | None:
    try:
        from vllm.third_party import pynvml

        pynvml.nvmlInit()
    except Exception:  # no vLLM here, or no driver
        return None
    total = 0
    for index in range(pynvml.nvmlDeviceGetCount()):
        device = pynvml.nvmlDeviceGetHandleByIndex(index)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device):
            if process.pid in pids:
                total += process.usedGpuMemory or 0
    return total
