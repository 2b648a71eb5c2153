"""User options, read from ``--additional-config '{"adamas": {...}}'``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_adamas.errors import AdamasError

#: Step of a 4-level uniform quantiser for unit-variance data: thresholds at -t, 0 and t times the
#: RMS of the transformed key. The Lloyd-Max value for a normal distribution is 0.9816.
RMS_THRESHOLD = 0.9816

#: The thresholds (-10, 0, 10) of the paper's evaluation code belong to a Hadamard matrix with
#: entries +-1. In the orthonormal units used here they are +-10 / sqrt(head_size).
PAPER_THRESHOLD = 10.0


@dataclass(frozen=True)
class Coding:
    """How a transformed vector becomes 2-bit codes; the same for every token of a server.

    Args:
        threshold: the outer threshold t; codes change at -t, 0 and t.
        relative: t is in units of the vector's RMS, else in orthonormal units.
    """

    threshold: float
    relative: bool

    def __str__(self) -> str:
        return f"±{self.threshold:.4g}" + ("·rms" if self.relative else "")


class AdamasConfig(BaseModel):
    """Options of the backend. Units: every budget and window is in tokens.

    Raises:
        AdamasError: from :meth:`parse`, for an unknown key, an impossible value or combination.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    score: Literal["dot", "manhattan"] = Field(
        "dot", description="How a query is compared with the stored key codes."
    )
    token_budget: int | float = Field(
        256,
        description="Tokens attended per decode step, or a fraction of the context (0 < f <= 1).",
    )
    min_token_budget: int = Field(
        64, ge=1, description="Floor in tokens when token_budget is a fraction."
    )
    selection: Literal["query_head", "kv_head"] = Field(
        "kv_head", description="One set of tokens per KV head, or one per query head (the paper)."
    )
    num_dense_layers: int | None = Field(
        None,
        ge=0,
        description="First layers that attend to every token (default 1 for dot, 2 for manhattan).",
    )
    num_sink_tokens: int = Field(
        0, ge=0, description="First tokens always kept, inside the budget."
    )
    recent_window: int = Field(0, ge=0, description="Last tokens always kept, inside the budget.")
    min_context: int = Field(
        0, ge=0, description="Contexts shorter than this are attended densely."
    )
    thresholds: Literal["rms", "paper"] | float | None = Field(
        None,
        description="Code thresholds: 'rms' (default for dot), 'paper' (default for manhattan), "
        "or a fixed value in orthonormal units.",
    )
    profile: str | None = Field(
        None,
        description="A file that `vllm-adamas calibrate` made for this model, or a shipped name.",
    )
    kernels: Literal["auto", "cpu", "cuda", "triton", "reference"] = Field(
        "auto", description="Compute backend; auto takes the fastest one for the device."
    )
    log_interval: float = Field(
        60.0, ge=0, description="Seconds between log lines on selection; 0 turns them off."
    )
    metrics: bool = Field(True, description="Export counters on the server's /metrics.")

    @model_validator(mode="after")
    def _check(self) -> AdamasConfig:
        budget = self.token_budget
        if isinstance(budget, float):
            if not (math.isfinite(budget) and 0.0 < budget <= 1.0):
                raise ValueError(
                    f"token_budget={budget:g} is impossible: give a whole number of tokens >= 1, "
                    "or a fraction of the context with 0 < fraction <= 1"
                )
            floor, name = self.min_token_budget, "min_token_budget"
        else:
            if budget < 1:
                raise ValueError(
                    f"token_budget={budget} is impossible: give a whole number of tokens >= 1, "
                    "or a fraction of the context with 0 < fraction <= 1"
                )
            floor, name = budget, "token_budget"
        forced = self.num_sink_tokens + self.recent_window
        if forced >= floor and forced > 0:
            raise ValueError(
                f"num_sink_tokens + recent_window = {forced} leaves nothing of {name}={floor} to "
                f"select: raise {name} above {forced} or lower the other two"
            )
        if self.profile is not None and self.score == "manhattan":
            raise ValueError(
                "profile belongs to score='dot': a distance between codes is not kept by shifting and "
                "balancing keys, so take score='dot' or remove profile"
            )
        if isinstance(self.thresholds, float) and not (
            math.isfinite(self.thresholds) and self.thresholds > 0
        ):
            raise ValueError(
                f"thresholds={self.thresholds:g} is impossible: give 'rms', 'paper' or a value > 0"
            )
        return self

    @classmethod
    def parse(cls, options: Any) -> AdamasConfig:
        """Builds the configuration from the ``adamas`` entry of vLLM's ``additional_config``.

        Raises:
            AdamasError: one sentence naming the first offending key and its valid values.
        """
        if options is None:
            options = {}
        if not isinstance(options, dict):
            raise AdamasError(
                "additional_config['adamas'] must be an object of options, "
                f"not {type(options).__name__}: write --additional-config '{{\"adamas\": {{...}}}}'."
            )
        budget = options.get("token_budget")
        if isinstance(budget, (bool, str)):
            raise AdamasError(
                f"adamas.token_budget={budget!r} is not a number: give a whole number of tokens "
                ">= 1, or a fraction of the context with 0 < fraction <= 1."
            )
        try:
            return cls(**options)
        except ValidationError as err:
            raise AdamasError(_sentence(err)) from None

    @property
    def dense_layers(self) -> int:
        """``num_dense_layers``, or its default: by measurement for dot, the paper's for manhattan."""
        if self.num_dense_layers is not None:
            return self.num_dense_layers
        return 1 if self.score == "dot" else 2

    def coding(self, head_size: int) -> Coding:
        """The coding of keys (and, for manhattan, of queries) of one head size."""
        chosen = self.thresholds or ("rms" if self.score == "dot" else "paper")
        if chosen == "rms":
            return Coding(RMS_THRESHOLD, relative=True)
        if chosen == "paper":
            return Coding(PAPER_THRESHOLD / math.sqrt(head_size), relative=False)
        return Coding(float(chosen), relative=False)

    def budget(self, context_len: int) -> int:
        """Tokens that a sparse layer attends for one row with this context length.

        Returns ``context_len`` (every token) when the context is below ``min_context`` or not
        longer than the budget.
        """
        if context_len < self.min_context:
            return context_len
        if isinstance(self.token_budget, float):
            tokens = max(self.min_token_budget, math.ceil(self.token_budget * context_len))
        else:
            tokens = self.token_budget
        return min(tokens, context_len)

    def budget_text(self) -> str:
        """The token budget as a person would write it."""
        if isinstance(self.token_budget, float):
            return f"{self.token_budget:g} of the context, at least {self.min_token_budget} tokens"
        return f"{self.token_budget} tokens"


def _sentence(err: ValidationError) -> str:
    """Turns pydantic's first error into one sentence that names the key and the valid values."""
    first = err.errors()[0]
    key = ".".join(str(part) for part in first["loc"][:1])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"adamas.{key} is not an option: valid options are {', '.join(AdamasConfig.model_fields)}."
    if not key:
        return f"adamas.{message}."
    field = AdamasConfig.model_fields[key]
    return f"adamas.{key}={first['input']!r} is not valid ({message}): {field.description}"
