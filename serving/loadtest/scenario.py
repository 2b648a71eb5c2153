"""Scenarios: what traffic a load test sends, as YAML files."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from vllm_adamas.errors import AdamasError

CHUNK = 16  #: tokens that requests share as one; shared prefixes are multiples of it
LEAST = 2  #: tokens of a part of a prompt: one alone would be computed as a decode row
SHIPPED = files("vllm_adamas.serving.loadtest").joinpath("scenarios")


def _ordered(span: tuple[int, int]) -> tuple[int, int]:
    if span[0] > span[1]:
        raise ValueError(f"{span[0]} is above {span[1]}")
    return span


#: A number, or the lower and the upper bound of one that is drawn per request: ``64`` or ``[32, 128]``.
Span = Annotated[
    tuple[PositiveInt, PositiveInt],
    BeforeValidator(lambda value: (value, value) if isinstance(value, int) else value),
    AfterValidator(_ordered),
]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Objectives(Model):
    """Service level objectives of a request, in milliseconds; a request is good if it meets all."""

    ttft_ms: PositiveFloat | None = None
    tpot_ms: PositiveFloat | None = None
    e2e_ms: PositiveFloat | None = None


class Traffic(Model):
    """
    Args:
        concurrency: most requests in flight; None for no limit.
    """

    #: Fields that ``--scale`` multiplies, in tokens, and those that ``--load`` multiplies.
    PROMPTS: ClassVar[tuple[str, ...]] = ()
    LOADS: ClassVar[tuple[str, ...]] = ()

    concurrency: PositiveInt | None = None

    def scaled(self, scale: float, load: float) -> Traffic:
        """A copy with prompts ``scale`` times as long and ``load`` times as many requests."""

        def times(value: Any, factor: float, least: int) -> Any:
            if isinstance(value, tuple):
                return tuple(times(one, factor, least) for one in value)
            if isinstance(value, int):
                return max(least, round(factor * value))
            return value if value is None else factor * value

        changed = {name: times(getattr(self, name), scale, LEAST) for name in self.PROMPTS}
        for name in {*self.LOADS, "concurrency"}:
            changed[name] = times(getattr(self, name), load, 1)
        return self.model_copy(update=changed)

    def longest(self) -> int:
        """Tokens of the longest context, output included."""
        raise NotImplementedError


class Arrivals(Traffic):
    """
    Args:
        rate: requests per second; None sends as many as ``concurrency`` admits.
        burstiness: shape of the gamma distribution of the times between requests, as in `vllm bench
            serve`: 1 is a Poisson process, less is burstier.
    """

    rate: PositiveFloat | None = None
    burstiness: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _limited(self) -> Arrivals:
        if self.rate is None and self.concurrency is None:
            raise ValueError("neither rate nor concurrency is given")
        return self


class SharedPrefix(Arrivals):
    """Chats that begin with one of a few system prompts."""

    PROMPTS = ("prefix_tokens", "message_tokens")
    LOADS = ("requests", "rate")

    kind: Literal["shared_prefix"]
    requests: PositiveInt
    prefixes: PositiveInt
    prefix_tokens: PositiveInt
    message_tokens: Span
    output_tokens: Span

    def longest(self) -> int:
        return self.prefix_tokens + self.message_tokens[1] + self.output_tokens[1]


class Documents(Arrivals):
    """Questions about long documents; the first question about each finds nothing cached."""

    PROMPTS = ("document_tokens", "question_tokens")
    LOADS = ("documents", "rate")

    kind: Literal["documents"]
    documents: PositiveInt
    document_tokens: tuple[PositiveInt, ...] = Field(min_length=1)
    questions: PositiveInt
    question_tokens: Span
    output_tokens: Span

    def longest(self) -> int:
        return max(self.document_tokens) + self.question_tokens[1] + self.output_tokens[1]


class Bursts(Traffic):
    """Many requests at once, and then a pause."""

    PROMPTS = ("prompt_tokens",)
    LOADS = ("requests",)

    kind: Literal["bursts"]
    bursts: PositiveInt
    requests: PositiveInt = Field(description="requests of a burst")
    every_s: PositiveFloat
    prompt_tokens: Span
    output_tokens: Span

    def longest(self) -> int:
        return self.prompt_tokens[1] + self.output_tokens[1]


class Agents(Traffic):
    """Agents that append their own answer and the result of a tool to their context at each turn."""

    PROMPTS = ("first_tokens", "result_tokens")
    LOADS = ("agents",)

    kind: Literal["agents"]
    agents: PositiveInt
    turns: PositiveInt
    first_tokens: Span
    result_tokens: Span
    output_tokens: Span
    pause_s: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.0, 0.0)

    def longest(self) -> int:
        grown = (self.turns - 1) * (self.result_tokens[1] + self.output_tokens[1])
        return self.first_tokens[1] + grown + self.output_tokens[1]


class Trace(Traffic):
    """Recorded traffic, in the format of Mooncake's traces.

    Args:
        file: JSON lines with ``timestamp``, ``input_length``, ``output_length`` and ``hash_ids``.
        requests: most requests, from the first line on.
        chunk_tokens: tokens that one hash stands for.
        time_unit_s: unit of the timestamps in seconds.
        scale: factor on the lengths of prompts.
        pace: factor on the speed of arrivals.
    """

    PROMPTS = ("scale",)
    LOADS = ("requests", "pace")

    kind: Literal["trace"]
    file: str
    requests: PositiveInt
    chunk_tokens: PositiveInt = 512
    time_unit_s: PositiveFloat = 0.001
    scale: PositiveFloat = 1.0
    pace: PositiveFloat = 1.0

    def lines(self) -> list[dict[str, Any]]:
        """The requests, scaled: ``timestamp`` in seconds from the first, ``input_length``, ``output_length``
        and ``hash_ids``.

        Raises:
            AdamasError: the file is not such a trace.
        """
        try:
            text = Path(self.file).read_text().splitlines()[: self.requests]
            found = [TraceLine.model_validate_json(line) for line in text]
            if not found:
                raise ValueError("it is empty")
        except (OSError, ValueError) as error:
            raise AdamasError(
                f"traffic.file {self.file} is not a trace in Mooncake's format "
                f"({type(error).__name__}): correct it."
            ) from None
        seconds = self.time_unit_s / self.pace
        return [
            {
                "timestamp": (line.timestamp - found[0].timestamp) * seconds,
                "input_length": max(LEAST, round(line.input_length * self.scale)),
                "output_length": line.output_length,
                "hash_ids": line.hash_ids,
            }
            for line in found
        ]

    def longest(self) -> int:
        return max(line["input_length"] + line["output_length"] for line in self.lines())


class TraceLine(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    timestamp: float
    input_length: PositiveInt
    output_length: PositiveInt
    hash_ids: list[int]


class Soak(Traffic):
    """A storm (docs/storm.md): requests of all kinds, answers checked, memory watched."""

    PROMPTS = ("prompt_tokens",)
    LOADS = ("requests", "burst")

    kind: Literal["soak"]
    requests: PositiveInt
    concurrency: PositiveInt
    prompt_tokens: PositiveInt
    output_tokens: PositiveInt
    burst: PositiveInt
    check: int = Field(ge=0)
    growth_mib: PositiveFloat = 512.0

    def longest(self) -> int:
        return self.prompt_tokens + self.output_tokens


Kind = Annotated[
    SharedPrefix | Documents | Bursts | Agents | Trace | Soak,
    Field(discriminator="kind"),
]
KINDS = get_args(get_args(Kind)[0])


class Scenario(Model):
    """
    Args:
        repeats: times that each backend's server is started; the backends alternate.
        seed: the same seed gives the same requests; each repeat adds 1.
        server_args: arguments of both servers.
    """

    description: str
    traffic: Kind
    slo: Objectives = Objectives()
    repeats: PositiveInt = 1
    seed: int = 0
    server_args: tuple[str, ...] = ()

    def scaled(self, scale: float, load: float) -> Scenario:
        return self.model_copy(update={"traffic": self.traffic.scaled(scale, load)})


def check_fits(traffic: Traffic, max_model_len: int) -> None:
    """
    Raises:
        AdamasError: the longest context is longer than the server admits.
    """
    if (longest := traffic.longest()) > max_model_len:
        raise AdamasError(
            f"the scenario's longest context has {longest} tokens, and the server admits {max_model_len}: "
            "give a smaller --scale, or a larger --max-model-len."
        )


def shipped() -> list[str]:
    """Names of the scenarios that come with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in SHIPPED.iterdir())


def load(name: str) -> Scenario:
    """The scenario of a file, or a shipped one by its name.

    Raises:
        AdamasError: there is none, or it is not valid; one sentence names the first problem.
    """
    import yaml

    file = SHIPPED.joinpath(f"{name}.yaml") if name in shipped() else Path(name)
    try:
        found = yaml.safe_load(file.read_bytes())
    except OSError:
        raise AdamasError(
            f"{name} is neither a scenario nor a file that can be read: give a YAML file or one of "
            f"{', '.join(shipped())}."
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a date that does not exist
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise AdamasError(f"{name} is not YAML from line {line} on: correct it there.") from None
    if not isinstance(found, dict):
        raise AdamasError(f"{name} has no keys: see docs/loadtest.md for those of a scenario.")
    try:
        return Scenario.model_validate(found)
    except ValidationError as error:
        raise AdamasError(_sentence(name, error)) from None


def _sentence(name: str, error: ValidationError) -> str:
    """The first error of a file, with the key's place in the file and the way out."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    kinds = {model.model_fields["kind"].annotation.__args__[0]: model for model in KINDS}
    model = Scenario
    if place[:1] == ["traffic"] and len(place) > 1:
        model = kinds[place.pop(1)]
    elif place[:1] == ["slo"]:
        model = Objectives
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        return f"{name}: {key} is not a key: valid are {', '.join(model.model_fields)}."
    if first["type"] == "missing":
        return f"{name}: {key} is missing: add it."
    if first["type"].startswith("union_tag"):
        return f"{name}: {key}.kind must be one of {', '.join(kinds)}: correct it."
    message = first["msg"].removeprefix("Value error, ")
    return f"{name}: {key} is not valid ({message[:1].lower()}{message[1:]}): correct it."
