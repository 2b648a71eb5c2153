"""User options, read from ``--additional-config '{"adamas": {...}}'``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_adamas.budget import TokenBudget
from vllm_adamas.errors import AdamasError, shortened
from vllm_adamas.layout import coded_size

#: Step of a 4-level uniform quantiser for unit-variance data: thresholds at -t, 0 and t times the
#: RMS of the transformed key. The Lloyd-Max value for a normal distribution is 0.9816.
RMS_THRESHOLD = 0.9816

#: The paper's evaluation code has the thresholds (-10, 0, 10) for a Hadamard matrix with entries +-1.
#: In the orthonormal units used here they are +-10 / sqrt(S), with the S dimensions of a signature.
PAPER_THRESHOLD = 10.0

#: Bounds of the options. Lengths and budgets are int32 in vLLM and in the kernels: 2^30 tokens exceed
#: any context and leave room for sums. Thresholds outside their bounds are so far from any key's values
#: that only the sign would be coded.
MAX_TOKENS = 2**30
MAX_LAYERS = 2**16
MAX_SECONDS = 10**6  # eleven days
MAX_STEPS = 10**9
MAX_ERROR = 100.0
THRESHOLDS = (1e-6, 1e6)

BUDGET_WAY_OUT = (
    f"give a whole number of tokens from 1 to {MAX_TOKENS} (2^30), or a fraction of the context with "
    "0 < fraction <= 1"
)

Tokens = Annotated[int, Field(le=MAX_TOKENS)]
#: Default budget of layer 0 in multiples of ``token_budget``, for dot with one set per KV head. The layer
#: attends broadly: with 2048 tokens it errs as other layers do with 512 (docs/quality.md).
FIRST_LAYER_FACTOR = 8

#: Default ``audit_interval`` by the type of device: the audit takes less than 1 % of TPOT then (docs/audit.md).
AUDIT_INTERVALS = {"cpu": 128, "cuda": 1024}

LAYER_NUMBER = re.compile("0|[1-9][0-9]{0,4}")


@dataclass(frozen=True)
class Coding:
    """How a transformed vector is quantised to 2-bit codes; the same for every token of a server.

    Args:
        threshold: the outer threshold t; codes change at -t, 0 and t.
        relative: whether t is in units of the vector's RMS or, if false, in orthonormal units.
    """

    threshold: float
    relative: bool

    def __str__(self) -> str:
        return f"±{self.threshold:.4g}" + ("·rms" if self.relative else "")


class AdamasConfig(BaseModel):
    """Options of the backend. Every budget and window is in tokens.

    Raises:
        AdamasError: from :meth:`parse`, for an unknown key, an invalid value or an invalid combination.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    score: Literal["dot", "manhattan"] = Field(
        "dot", description="How a query is compared with the stored key codes."
    )
    token_budget: int | float = Field(
        256,
        description="Tokens attended per decode step, or a fraction of the context (0 < f <= 1).",
    )
    min_token_budget: Tokens = Field(
        64, ge=1, description="Floor in tokens when token_budget is a fraction."
    )
    max_token_budget: Tokens | None = Field(
        None,
        ge=1,
        description="Most tokens that a request may raise its budget to, with adamas_token_budget in vllm_xargs "
        "(default: requests have no say).",
    )
    selection: Literal["query_head", "kv_head"] = Field(
        "kv_head", description="One set of tokens per KV head, or one per query head (the paper)."
    )
    combine: Literal["sum", "max"] | None = Field(
        None,
        description="How the scores of a KV head's query heads become one, with selection='kv_head': "
        "'sum' or 'max' (default by model).",
    )
    num_dense_layers: int | None = Field(
        None,
        ge=0,
        le=MAX_LAYERS,
        description="First layers that attend to every token; named in layer_budgets they do not "
        "(default 1 for dot, 2 for manhattan).",
    )
    layer_budgets: dict[int, int | float] = Field(
        {},
        description='Layers with a budget of their own, such as {"0": 2048}: numbers from 0 and budgets '
        "as in token_budget.",
    )
    num_sink_tokens: Tokens = Field(
        0, ge=0, description="First tokens always kept, inside the budget."
    )
    recent_window: Tokens = Field(
        0, ge=0, description="Last tokens always kept, inside the budget."
    )
    min_context: Tokens = Field(
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
    kernels: str = Field(
        "auto",
        pattern=r"^[a-z0-9_]{1,32}$",
        description="Compute backend; auto takes the fastest one for the device.",
    )
    log_interval: float = Field(
        60.0,
        ge=0,
        le=MAX_SECONDS,
        description="Seconds between log lines on selection; 0 turns them off.",
    )
    metrics: bool = Field(True, description="Export counters on the server's /metrics.")
    audit_interval: int | None = Field(
        None,
        ge=0,
        le=MAX_STEPS,
        description="Decode steps from one audited step to the next, 0 for no audit (default 128 on CPUs, 1024 "
        "on GPUs).",
    )
    audit_threshold: float = Field(
        0.3,
        gt=0,
        le=MAX_ERROR,
        description="Relative error of the output above which an audited row is counted; the log warns when most rows "
        "are above it.",
    )

    @model_validator(mode="after")
    def _check(self) -> AdamasConfig:
        self._check_budget("token_budget", self.token_budget)
        for layer, budget in self.layer_budgets.items():
            self._check_budget(f"layer_budgets[{layer}]", budget)
        if self.max_token_budget is not None and self.max_token_budget < self.least_requested:
            least = self.least_requested
            raise ValueError(
                f"max_token_budget={self.max_token_budget} is below the {least} tokens that every request "
                f"has: give a whole number of at least {least}, or remove it"
            )
        if self.profile is not None and self.score == "manhattan":
            raise ValueError(
                "profile belongs to score='dot': a distance between codes is not kept by shifting and "
                "balancing keys, so take score='dot' or remove profile"
            )
        if self.combine == "max" and (self.score, self.selection) != ("dot", "kv_head"):
            raise ValueError(
                "combine='max' belongs to score='dot' with selection='kv_head', where it compares the "
                "logits of a KV head's query heads: set these two or remove combine"
            )
        low, high = THRESHOLDS
        if isinstance(self.thresholds, float) and not low <= self.thresholds <= high:
            raise ValueError(
                f"thresholds={self.thresholds:g} is impossible: give 'rms', 'paper' or a value > 0, "
                f"from {low:g} to {high:g}"
            )
        return self

    def _check_budget(self, name: str, budget: int | float) -> None:
        if isinstance(budget, float):
            possible = 0.0 < budget <= 1.0
            floor, raised = self.min_token_budget, "min_token_budget"
        else:
            possible = 1 <= budget <= MAX_TOKENS
            floor, raised = budget, name
        if not possible:
            raise ValueError(f"{name}={shortened(budget)} is impossible: {BUDGET_WAY_OUT}")
        forced = self.num_sink_tokens + self.recent_window
        if forced >= floor and forced > 0:
            raise ValueError(
                f"num_sink_tokens + recent_window = {forced} leaves nothing of {raised}={floor} to "
                f"select: raise {raised} above {forced} or lower the other two"
            )

    @field_validator("layer_budgets", mode="before")
    @classmethod
    def _number_layers(cls, given: Any) -> Any:
        """Budgets by layer number; the keys of a JSON object are strings."""
        if not isinstance(given, dict):
            return given
        numbered: dict[int, int | float] = {}
        for key, budget in given.items():
            is_text = isinstance(key, str) and LAYER_NUMBER.fullmatch(key)
            number = int(key) if is_text else key
            if type(number) is not int or not 0 <= number < MAX_LAYERS:
                raise ValueError(f"{shortened(key)} is not the number of a layer")
            if number in numbered:
                raise ValueError(f"layer {number} is named twice")
            if type(budget) not in (int, float):
                raise ValueError(f"the budget of layer {number} is not a number")
            numbered[number] = budget
        return numbered

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
                f"adamas.token_budget={shortened(budget)} is not a number: {BUDGET_WAY_OUT}."
            )
        try:
            return cls.model_validate(options)
        except ValidationError as err:
            raise AdamasError(_sentence(err)) from None

    def resolved(self, *, qk_norm: bool = False, budgeted: bool = True) -> AdamasConfig:
        """The configuration with its defaults that depend on other options or on the model.

        Resolving it again changes nothing.

        Args:
            qk_norm: whether the model normalises its keys. Without a profile their codes are mostly noise,
                which a sum averages and a maximum selects.
            budgeted: whether layer 0 of the model can have a budget; a sliding-window layer cannot.
        """
        shared_dot = (self.score, self.selection) == ("dot", "kv_head")
        noisy = qk_norm and self.profile is None
        combine, budgets = self.combine, self.layer_budgets
        if combine is None:
            combine = "max" if shared_dot and not noisy else "sum"
        if shared_dot and budgeted and self.num_dense_layers is None:
            most = 1.0 if isinstance(self.token_budget, float) else MAX_TOKENS
            budgets = {0: min(FIRST_LAYER_FACTOR * self.token_budget, most), **budgets}
        return self.model_copy(
            update={
                "combine": combine,
                "num_dense_layers": self.dense_layers,
                "layer_budgets": budgets,
            }
        )

    @property
    def dense_layers(self) -> int:
        """``num_dense_layers``, or its default: measured for dot, the paper's for manhattan."""
        if self.num_dense_layers is not None:
            return self.num_dense_layers
        return 1 if self.score == "dot" else 2

    def audited_every(self, device_type: str) -> int:
        """``audit_interval``, or its default on this type of device."""
        if self.audit_interval is not None:
            return self.audit_interval
        return AUDIT_INTERVALS.get(device_type, 0)

    def coding(self, head_size: int) -> Coding:
        """The coding of keys (and, for manhattan, of queries) at one head size."""
        chosen = self.thresholds or ("rms" if self.score == "dot" else "paper")
        if chosen == "rms":
            return Coding(RMS_THRESHOLD, relative=True)
        if chosen == "paper":
            return Coding(PAPER_THRESHOLD / math.sqrt(coded_size(head_size)), relative=False)
        return Coding(float(chosen), relative=False)

    def is_dense(self, layer: int) -> bool:
        """Whether a layer is dense by its number; one with a budget of its own is not."""
        return layer < self.dense_layers and layer not in self.layer_budgets

    @property
    def budget(self) -> TokenBudget:
        """The budget of a decode row in layers without one of their own."""
        return self._budget(self.token_budget)

    def budget_of(self, layer: int) -> TokenBudget:
        """The budget of a decode row in a layer."""
        return self._budget(self.layer_budgets.get(layer, self.token_budget))

    @property
    def least_requested(self) -> int:
        """The least budget that a request may ask for; it has as much anyway."""
        is_fraction = isinstance(self.token_budget, float)
        return self.min_token_budget if is_fraction else self.token_budget

    @property
    def budgets(self) -> list[TokenBudget]:
        """The distinct budgets of all layers, :attr:`budget` first."""
        own = map(self._budget, self.layer_budgets.values())
        return list(dict.fromkeys([self.budget, *own]))

    def _budget(self, tokens: int | float) -> TokenBudget:
        most = self.max_token_budget or 0
        return TokenBudget(tokens, self.min_token_budget, self.min_context, ceiling=most)


def _sentence(err: ValidationError) -> str:
    """Turns pydantic's first error into one sentence that names the key and the valid values."""
    first = err.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"adamas.{message}."
    key = first["loc"][0]
    field = AdamasConfig.model_fields.get(key)
    if field is None:
        name = key if str(key).isidentifier() else shortened(key)
        return f"adamas.{name} is not an option: valid options are {', '.join(AdamasConfig.model_fields)}."
    return f"adamas.{key}={shortened(first['input'])} is not valid ({message}): {field.description}"
