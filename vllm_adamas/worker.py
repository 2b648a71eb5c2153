"""A process that answers lines of JSON, and ends with the one that asks.

If the one that asks is killed, the worker sees the end of its input and ends. Ctrl-C reaches the one that asks alone,
which then kills the worker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from vllm_adamas.errors import AdamasError


class Worker:
    """A context manager.

    Args:
        module: runs as the process's main program, which calls :func:`serve`.
        first: the first question; :attr:`told` is its answer.

    Raises:
        AdamasError: the worker refuses the question.
        RuntimeError: the process ended or failed; what it said is on standard error.
    """

    def __init__(self, module: str, first: dict[str, Any]):
        self._module, command = module, [sys.executable, "-m", module]
        self._process = subprocess.Popen(
            command, stdin=-1, stdout=-1, text=True, bufsize=1, start_new_session=True
        )
        try:
            self.told = self.ask(first)
        except BaseException:
            self._process.kill()
            self._end()
            raise

    def __enter__(self):
        return self

    def __exit__(self, kind, *error) -> None:
        if kind is not None:
            self._process.kill()
        self._end()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to a question; raises as the class does."""
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            answer = json.loads(self._process.stdout.readline())
        except (ValueError, OSError):
            status = self._process.wait()
            raise RuntimeError(
                f"the process of {self._module} ended with status {status}"
            ) from None
        if problem := answer.get("problem"):
            raise AdamasError(problem)
        return answer

    def _end(self) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers questions until there are no more; an AdamasError is an answer too. Runs in the worker."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM logs to standard output
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except AdamasError as error:
            found = {"problem": str(error)}
        out.write(json.dumps(found) + "\n")
