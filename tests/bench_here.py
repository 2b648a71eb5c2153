"""`vllm-adamas` whose benchmark measures in the command's own process, which imports vLLM once and not thrice."""

import sys
from importlib import import_module

from vllm_adamas.bench import command
from vllm_adamas.cli import main


class WorkerHere:
    """What a Worker does, without a process."""

    def __init__(self, module, first):
        self.ask = import_module(module).Answers()
        self.told = self.ask(first)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if hasattr(self.ask, "close"):
            self.ask.close()


if __name__ == "__main__":
    command.Worker = WorkerHere
    sys.exit(main())
