"""`vllm-adamas` whose suites build both engines in the command's own process, which imports vLLM once and not thrice."""

import sys

from vllm_adamas.cli import main
from vllm_adamas.evaluate import engine as engines
from vllm_adamas.evaluate import suites
from vllm_adamas.evaluate.study import use


class EngineHere:
    """What an EngineProcess does, without a process."""

    def __init__(self, model, max_model_len, arms, *, stock, **engine_options):
        configurations = [arm.options for arm in arms]
        engines.check(model, max_model_len, configurations, **engine_options)
        kind = engines.StockEngine if stock else engines.Engine
        self.engine = kind(model, max_model_len, **engine_options)
        self.capacity = self.engine.capacity

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.engine.close()

    def answers(self, arm, prompts, tokens, stops):
        if arm is not None:
            use(self.engine, arm.options, arm.selector)
        return self.engine.answers(prompts, tokens, stops)


if __name__ == "__main__":
    suites.EngineProcess = EngineHere
    sys.exit(main())
