"""A `vllm serve` process as a context manager."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

LOG_LINES = 40


class Server:
    """A server on a free loopback port, ready to answer once the constructor returns.

    Args:
        model: a local folder or a model name.
        backend: the value of ``--attention-backend``.
        adamas_config: options of the ``adamas`` backend.
        extra_args: further arguments of ``vllm serve``.
        env: environment variables on top of this process's own.
        log_path: file for the server's output; a temporary file by default.
        timeout: seconds within which ``/health`` must answer.

    Raises:
        RuntimeError: the server ended or was not ready in time; the message includes the end of its log.
    """

    def __init__(
        self,
        model: str | Path,
        backend: str,
        adamas_config: Mapping[str, Any] | None = None,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log_path: str | Path | None = None,
        timeout: float = 600.0,
    ) -> None:
        if log_path is None:
            handle, log_path = tempfile.mkstemp(prefix=f"vllm-{backend}-", suffix=".log")
            os.close(handle)
        self.model = str(model)
        self.log_path = Path(log_path)
        with _free_port() as port:  # until the server itself listens there
            self.url = f"http://127.0.0.1:{port}"
            command = self._command(port, backend, adamas_config)
            self._process = self._start([*command, *extra_args], env)
            try:
                self._wait(timeout)
            except BaseException:
                self.stop()
                raise

    def _command(
        self, port: int, backend: str, adamas_config: Mapping[str, Any] | None
    ) -> list[str]:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.model]
        command += ["--host", "127.0.0.1", "--port", str(port), "--attention-backend", backend]
        if adamas_config is not None:
            command += ["--additional-config", json.dumps({"adamas": dict(adamas_config)})]
        return command

    def _start(self, command: Sequence[str], env: Mapping[str, str] | None) -> subprocess.Popen:
        environment = {
            # In GiB, read on CPUs only: vLLM's default does not fit into a small NUMA node.
            "VLLM_CPU_KVCACHE_SPACE": "2",
            **os.environ,
            # torch.compile calls the compiler and ninja that are installed next to the interpreter.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            **(env or {}),
        }
        with self.log_path.open("wb") as log:
            # A new session, so that stop() reaches the worker processes too.
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def _wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            self.raise_if_ended()
            try:
                self.get("/health", timeout=5)
                return
            except OSError:
                pass
            if time.monotonic() > deadline:
                raise RuntimeError(self._failure(f"was not ready after {timeout:g} s"))
            time.sleep(0.5)

    def raise_if_ended(self) -> None:
        """Raises RuntimeError with the end of the log if the process has ended."""
        if self._process.poll() is not None:
            raise RuntimeError(self._failure(f"ended with status {self._process.returncode}"))

    def _failure(self, what: str) -> str:
        cause = root_cause(self.log())
        what = f"{what}: {cause}" if cause else what
        return f"The server {what}. The end of {self.log_path}:\n{self.log_tail()}"

    @property
    def pid(self) -> int:
        """Pid of the first process; all others descend from it."""
        return self._process.pid

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def log_tail(self, lines: int = LOG_LINES) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def get(self, path: str, timeout: float = 60.0) -> str:
        """The body of a GET; raises urllib.error.HTTPError for a status of 400 and above."""
        with urllib.request.urlopen(self.url + path, timeout=timeout) as response:
            return response.read().decode()

    def post(self, path: str, body: Mapping[str, Any], timeout: float = 600.0) -> Any:
        """The decoded JSON answer to a POST of a JSON body."""
        with urllib.request.urlopen(self._request(path, body), timeout=timeout) as response:
            return json.load(response)

    def stream(self, path: str, body: Mapping[str, Any], timeout: float = 600.0) -> Iterator[Any]:
        """The decoded events of a streamed POST, as they arrive."""
        request = self._request(path, {**body, "stream": True})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data:").strip()
                if data and data != "[DONE]":
                    yield json.loads(data)

    def _request(self, path: str, body: Mapping[str, Any]) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        data = json.dumps({"model": self.model, **body}).encode()
        return urllib.request.Request(self.url + path, data, headers)

    def metrics(self) -> dict[str, float]:
        """The samples of ``/metrics``, each name summed over its labels."""
        return parse_metrics(self.get("/metrics"))

    def stop(self) -> None:
        """Ends the server and all processes that it started; safe to call again."""
        for sign, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
            if not _signal_group(self._process.pid, sign):
                break
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                self._process.poll()
                if not _signal_group(self._process.pid, 0):
                    break
                time.sleep(0.1)
        self._process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def root_cause(log: str) -> str | None:
    """The error in another process of vLLM's to which its last one refers as "root cause above"; None without one."""
    above, refers, _ = log.partition("See root cause above")
    errors = re.findall(r"\b(\w*(?:Error|Exception): .+)", above)
    return errors[-2] if refers and len(errors) > 1 else None


def parse_metrics(text: str) -> dict[str, float]:
    """Samples of the Prometheus text format as ``{name: value}``, summed over labels.

    Raises:
        ValueError: the text is not in that format.
    """
    totals: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] += sample.value
    return dict(totals)


@contextmanager
def _free_port() -> Iterator[int]:
    """A loopback port that no other process is given inside the context.

    The port stays bound, so the kernel gives it to no connection and to no search for a free port. Linux
    lets a second socket bind it and listen if both set SO_REUSEADDR, as vLLM's does.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def _signal_group(group: int, sign: int) -> bool:
    """Signals a process group; False when none of it is left."""
    try:
        os.killpg(group, sign)
    except ProcessLookupError:
        return False
    return True
