"""An engine in a process of its own, which ends with it: the stock backend first, and adamas after it.

The processes exchange lines of JSON. If the one that asks is killed, the engine's sees the end of its input and ends.
Ctrl-C reaches the one that asks alone, which then kills the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from vllm_adamas.errors import AdamasError
from vllm_adamas.evaluate.study import Arm


class EngineProcess:
    """A context manager.

    Args:
        arms: configurations of the whole run. They are checked first, for the stock backend too, so that a
            mistake does not wait for its answers.
        stock: whether it has the attention backend that vLLM chooses instead of adamas.
        model, max_model_len, engine_options: as of :class:`~vllm_adamas.evaluate.engine.StockEngine`.

    Raises:
        AdamasError: the model, an option or one of the configurations cannot be served.
        RuntimeError: the process ended or failed; what it said is on standard error.
    """

    def __init__(
        self, model: str, max_model_len: int, arms: Sequence[Arm], *, stock: bool, **engine_options
    ):
        command = [sys.executable, "-m", __name__]
        self._process = subprocess.Popen(
            command, stdin=-1, stdout=-1, text=True, bufsize=1, start_new_session=True
        )
        try:
            engine = {"model": model, "max_model_len": max_model_len, **engine_options}
            asked = {"engine": engine, "check": [arm.options for arm in arms], "stock": stock}
            #: Tokens that the KV cache holds.
            self.capacity: int = self._ask(asked)["capacity"]
        except BaseException:
            self._process.kill()
            self._end()
            raise

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, kind, *error) -> None:
        if kind is not None:
            self._process.kill()
        self._end()

    def answers(
        self, arm: Arm | None, prompts: Sequence[Sequence[int]], tokens: int, stops: bool
    ) -> list[list[int]]:
        """Greedy continuations under a configuration, None for the stock backend."""
        how = None if arm is None else {"options": arm.options, "selector": arm.selector}
        asked = {"arm": how, "prompts": list(map(list, prompts)), "tokens": tokens, "stops": stops}
        return self._ask(asked)["tokens"]

    def _ask(self, question: dict) -> dict:
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            answer = json.loads(self._process.stdout.readline())
        except (ValueError, OSError):
            status = self._process.wait()
            raise RuntimeError(f"the engine's process ended with status {status}") from None
        if problem := answer.get("problem"):
            raise AdamasError(problem)
        return answer

    def _end(self) -> None:
        with suppress(BrokenPipeError):
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
        try:
            if engine is None:
                engines.check(configurations=asked["check"], **asked["engine"])
                kind = engines.StockEngine if asked["stock"] else engines.Engine
                engine = kind(**asked["engine"])
                found = {"capacity": engine.capacity}
            else:
                if asked["arm"] is not None:
                    use(engine, asked["arm"]["options"], asked["arm"]["selector"])
                given = asked["prompts"], asked["tokens"], asked["stops"]
                found = {"tokens": engine.answers(*given)}
        except AdamasError as error:
            found = {"problem": str(error)}
        out.write(json.dumps(found) + "\n")
    if engine is not None:
        engine.close()


if __name__ == "__main__":
    _serve()
