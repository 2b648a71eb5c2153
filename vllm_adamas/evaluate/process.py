"""An engine in a process of its own, which ends with it: the stock backend first, and adamas after it.

The processes exchange lines of JSON. If the one that asks is killed, the engine's sees the end of its input and ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from vllm_adamas.errors import AdamasError
from vllm_adamas.evaluate.study import Arm


class EngineProcess:
    """A context manager; the arguments are those of :class:`~vllm_adamas.evaluate.engine.Engine`.

    Args:
        stock: whether it has the attention backend that vLLM chooses instead of adamas.

    Raises:
        AdamasError: the model or an option cannot be served.
        RuntimeError: the process ended or failed; what it said is on standard error.
    """

    def __init__(self, model: str, max_model_len: int, *, stock: bool, **engine_options):
        command = [sys.executable, "-m", __name__]
        self._process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, bufsize=1)
        try:
            given = {"model": model, "max_model_len": max_model_len, "stock": stock}
            #: Tokens that the KV cache holds.
            self.capacity: int = self._ask({**given, **engine_options})["capacity"]
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *error) -> None:
        self._end()

    def answers(
        self, arm: Arm | None, prompts: Sequence[Sequence[int]], tokens: int, stops: bool
    ) -> list[list[int]]:
        """Greedy continuations under a configuration, None for the stock backend."""
        how = None if arm is None else {"options": arm.options, "selector": arm.selector}
        asked = {"arm": how, "prompts": list(map(list, prompts)), "tokens": tokens, "stops": stops}
        return self._ask(asked)["tokens"]

    def check(self, arms: Sequence[Arm]) -> None:
        """
        Raises:
            AdamasError: the model cannot be served with the options of an arm.
        """
        self._ask({"check": [arm.options for arm in arms]})

    def _ask(self, question: dict) -> dict:
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            answer = json.loads(self._process.stdout.readline())
        except (ValueError, OSError):
            status = self._process.wait()
            raise RuntimeError(f"the engine's process ended with status {status}") from None
        if "refused" in answer:
            raise AdamasError(answer["refused"])
        return answer

    def _end(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


# What follows runs in the engine's process.


def _serve() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM logs to standard output
    from vllm_adamas.evaluate import engine as engines
    from vllm_adamas.evaluate.study import use

    engine = None
    for line in sys.stdin:
        asked = json.loads(line)
        found: dict = {}
        try:
            if engine is None:
                engines.check_length(asked["model"], asked["max_model_len"])
                kind = engines.StockEngine if asked.pop("stock") else engines.Engine
                engine = kind(**asked)
                found = {"capacity": engine.capacity}
            elif "check" in asked:
                for options in asked["check"]:
                    engine.check(options)
            else:
                if asked["arm"] is not None:
                    use(engine, asked["arm"]["options"], asked["arm"]["selector"])
                given = asked["prompts"], asked["tokens"], asked["stops"]
                found = {"tokens": engine.answers(*given)}
        except AdamasError as error:
            found = {"refused": str(error)}
        out.write(json.dumps(found) + "\n")
    if engine is not None:
        engine.close()


if __name__ == "__main__":
    _serve()
