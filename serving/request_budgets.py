"""Token budgets that requests ask for, as ``"vllm_xargs": {"adamas_token_budget": 512}``.

vLLM tells an attention backend nothing of a request's parameters. It tells logits processors, under both model
runners, and lets them refuse a request. Those here leave logits as they are. They refuse budgets out of bounds
and keep the others where the metadata builder reads them.

A request may only raise its budget. The prefix cache shares the keys and values of its answer with other
requests, and they must not be worse than the operator's ``token_budget`` makes them.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from vllm_adamas.config import AdamasConfig
from vllm_adamas.errors import shortened
from vllm_adamas.serving import compat
from vllm_adamas.serving.metrics import count_refused

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

ARGUMENT = "adamas_token_budget"
CLASS = re.compile("(V[12])_([0-9]+)_([0-9]+)")


def processor(runner: str, config: AdamasConfig) -> str:
    """The name by which a model runner, ``V1`` or ``V2``, loads the logits processor for a configuration."""
    return f"{__name__}:{runner}_{config.least_requested}_{config.max_token_budget}"


@cache
def __getattr__(name: str) -> type:
    """The class for a runner and two bounds: when vLLM validates a request, it gives a class no configuration."""
    found = CLASS.fullmatch(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    runner, *bounds = found.groups()
    base = {"V1": RequestBudgetsV1, "V2": RequestBudgetsV2}[runner]
    return type(name, (base,), {"bounds": tuple(map(int, bounds))})


class RequestBudgets:
    """What the logits processors of both model runners share.

    A slot is where a runner keeps a request.
    """

    bounds: ClassVar[tuple[int, int]]  #: least and most tokens

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """
        Raises:
            ValueError: the request asks for an impossible budget; the server answers with status 400.
        """
        (least, most), budget = cls.bounds, requested_by(sampling_params)
        if budget is None or (type(budget) is int and least <= budget <= most):
            return
        count_refused()
        raise ValueError(
            f"{ARGUMENT}={shortened(budget)} is not served: give a whole number of tokens from {least} to "
            f"{most}."
        )


class RequestBudgetsV1(RequestBudgets, LogitsProcessorV1):
    """A slot is a row of the batch. Rows move, and the runner reports every move before the step."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self._vllm_config = vllm_config

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        budgets = budgets_of(self._vllm_config)
        process_dict_updates(budgets, batch_update, lambda params, *tokens: requested_by(params))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


class RequestBudgetsV2(RequestBudgets, LogitsProcessorV2):
    """A slot is an index that a request keeps until it ends or is preempted."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState):
        self._vllm_config = vllm_config

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        budgets, budget = budgets_of(self._vllm_config), requested_by(sampling_params)
        budgets.pop(req_idx, None)  # of the request that had the slot before
        if budget is not None:
            budgets[req_idx] = budget
        return False  # logits need no processing

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        return logits


def requested_by(sampling_params: SamplingParams) -> Any:
    """What a request asks for, None if it does not ask."""
    return (sampling_params.extra_args or {}).get(ARGUMENT)


def budgets_of(vllm_config: VllmConfig) -> dict[int, int]:
    """The engine's budgets by slot. They are kept with its layers, which V1 builds after its processors."""
    from vllm_adamas.serving.shared import Shared  # not in the frontend, which only validates

    shared = Shared.find(compat.layers_of(vllm_config).values())
    return {} if shared is None else shared.requested
