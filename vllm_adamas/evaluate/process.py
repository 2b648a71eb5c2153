"""An engine in a process of its own, which ends with it: the stock backend first, and adamas after it."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_adamas.evaluate.study import Arm
from vllm_adamas.worker import Worker, serve


class EngineProcess(Worker):
    """
    Args:
        arms: configurations of the whole run. They are checked first, for the stock backend too, so that a
            mistake does not wait for its answers.
        stock: whether it has the attention backend that vLLM chooses instead of adamas.
        model, max_model_len, engine_options: as of :class:`~vllm_adamas.evaluate.engine.StockEngine`.

    Raises:
        AdamasError: the model, an option or one of the configurations cannot be served.
        RuntimeError: as :class:`Worker` does.
    """

    def __init__(
        self, model: str, max_model_len: int, arms: Sequence[Arm], *, stock: bool, **engine_options
    ):
        engine = {"model": model, "max_model_len": max_model_len, **engine_options}
        asked = {"engine": engine, "check": [arm.options for arm in arms], "stock": stock}
        super().__init__(__name__, asked)

    @property
    def capacity(self) -> int:
        """Tokens that the KV cache holds."""
        return self.told["capacity"]

    def answers(
        self, arm: Arm | None, prompts: Sequence[Sequence[int]], tokens: int, stops: bool
    ) -> list[list[int]]:
        """Greedy continuations under a configuration, None for the stock backend."""
        how = None if arm is None else {"options": arm.options, "selector": arm.selector}
        asked = {"arm": how, "prompts": list(map(list, prompts)), "tokens": tokens, "stops": stops}
        return self.ask(asked)["tokens"]


# What follows runs in the engine's process.


def _serve() -> None:
    from vllm_adamas.evaluate import engine as engines
    from vllm_adamas.evaluate.study import use

    engine: engines.StockEngine | None = None

    def answer(asked: dict) -> dict:
        nonlocal engine
        if engine is None:
            engines.check(configurations=asked["check"], **asked["engine"])
            kind = engines.StockEngine if asked["stock"] else engines.Engine
            engine = kind(**asked["engine"])
            return {"capacity": engine.capacity}
        if asked["arm"] is not None:
            use(engine, asked["arm"]["options"], asked["arm"]["selector"])
        return {"tokens": engine.answers(asked["prompts"], asked["tokens"], asked["stops"])}

    serve(answer)
    if engine is not None:
        engine.close()


if __name__ == "__main__":
    _serve()
