"""Every option, and every way to get one wrong."""

import math

import pytest
import torch
from common import is_one_sentence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_adamas.backends.registry import get_backend
from vllm_adamas.budget import TokenBudget
from vllm_adamas.config import (
    MAX_LAYERS,
    MAX_SECONDS,
    MAX_STEPS,
    MAX_TOKENS,
    RMS_THRESHOLD,
    AdamasConfig,
    Coding,
)
from vllm_adamas.errors import AdamasError
from vllm_adamas.serving.metadata import row_budgets

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
DEFAULTS = {
    "score": "dot",
    "token_budget": 256,
    "min_token_budget": 64,
    "max_token_budget": None,
    "selection": "kv_head",
    "combine": None,
    "num_dense_layers": None,
    "layer_budgets": {},
    "num_sink_tokens": 0,
    "recent_window": 0,
    "min_context": 0,
    "thresholds": None,
    "profile": None,
    "kernels": "auto",
    "log_interval": 60.0,
    "metrics": True,
    "audit_interval": None,
    "audit_threshold": 0.3,
}
VALID = [
    ("score", "manhattan"),
    ("token_budget", 1),
    ("token_budget", MAX_TOKENS),
    ("token_budget", 0.001),
    ("token_budget", 1.0),
    ("min_token_budget", 1),
    ("max_token_budget", 256),
    ("max_token_budget", MAX_TOKENS),
    ("selection", "query_head"),
    ("combine", "max"),
    ("combine", "sum"),
    ("num_dense_layers", 0),
    ("num_dense_layers", MAX_LAYERS),
    ("layer_budgets", {}),
    ("layer_budgets", {0: 2048, 7: 0.5, MAX_LAYERS - 1: 1}),
    ("num_sink_tokens", 255),
    ("recent_window", 255),
    ("min_context", MAX_TOKENS),
    ("thresholds", "rms"),
    ("thresholds", "paper"),
    ("thresholds", 0.5),
    ("profile", "a.json"),
    ("kernels", "cpu"),
    ("kernels", "cuda"),
    ("kernels", "triton"),
    ("kernels", "reference"),
    ("thresholds", 1e-6),
    ("thresholds", 1e6),
    ("log_interval", 0),
    ("log_interval", MAX_SECONDS),
    ("metrics", False),
    ("audit_interval", 0),
    ("audit_interval", MAX_STEPS),
    ("audit_threshold", 0.05),
]
BUDGET_WAYS_OUT = ("token_budget", "whole number", "fraction")
INVALID = [
    ({"budget": 3}, ("budget", *DEFAULTS)),
    *[({"token_budget": x}, BUDGET_WAYS_OUT) for x in (0, -1, 1.5, True, "x", "64", math.nan)],
    *[({"token_budget": x}, BUDGET_WAYS_OUT) for x in (math.inf, 0.0, -0.5, False)],
    *[({"token_budget": x}, (*BUDGET_WAYS_OUT, "2^30")) for x in (MAX_TOKENS + 1, 2**31, 10**400)],
    *[({"token_budget": x}, ("token_budget",)) for x in (None, [1], {})],
    ({"min_token_budget": 0}, ("min_token_budget=0", "1")),
    ({"min_token_budget": 2.5}, ("min_token_budget=2.5", "integer")),
    *[
        ({"layer_budgets": {x: 64}}, ("layer_budgets", "not the number of a layer", '{"0": 2048}'))
        for x in ("a", "", "-1", "00", "1.0", "0x1", "99999", "9" * 5000, -1, MAX_LAYERS, True)
    ],
    *[
        ({"layer_budgets": {"3": x}}, ("layer_budgets", "budget of layer 3 is not a number"))
        for x in ("64", None, True, [64], {})
    ],
    *[
        ({"layer_budgets": {"3": x}}, ("layer_budgets[3]", "whole number", "fraction"))
        for x in (0, -1, MAX_TOKENS + 1, 10**400, 0.0, 1.5, math.nan, math.inf)
    ],
    *[({"layer_budgets": x}, ("layer_budgets", '{"0": 2048}')) for x in (None, 64, "0=64", [64])],
    ({"layer_budgets": {"3": 64, 3: 64}}, ("layer_budgets", "layer 3 is named twice")),
    ({"layer_budgets": {"3": 32}, "recent_window": 32}, ("layer_budgets[3]=32", "recent_window")),
    (
        {"layer_budgets": {"3": 0.5}, "recent_window": 64},
        ("min_token_budget=64", "recent_window"),
    ),
    ({"max_token_budget": 255}, ("max_token_budget=255", "256 tokens", "remove")),
    (
        {"max_token_budget": 63, "token_budget": 0.5},
        ("max_token_budget=63", "64 tokens", "remove"),
    ),
    *[
        ({"max_token_budget": x}, ("max_token_budget", "vllm_xargs"))
        for x in (0, -1, 0.5, True, "9")
    ],
    ({"score": "cosine"}, ("score='cosine'", "'dot'", "'manhattan'")),
    ({"selection": "head"}, ("selection='head'", "'query_head'", "'kv_head'")),
    ({"combine": "mean"}, ("combine='mean'", "'sum'", "'max'")),
    *[
        ({"combine": "max", **other}, ("combine='max'", "'dot'", "'kv_head'", "remove"))
        for other in ({"score": "manhattan"}, {"selection": "query_head"})
    ],
    ({"num_dense_layers": -1}, ("num_dense_layers=-1", "0")),
    ({"num_sink_tokens": -1}, ("num_sink_tokens=-1", "0")),
    ({"recent_window": "many"}, ("recent_window='many'", "integer")),
    ({"num_sink_tokens": True}, ("num_sink_tokens=True", "integer")),
    ({"num_dense_layers": "2"}, ("num_dense_layers='2'", "integer")),
    *[
        ({key: MAX_TOKENS + 1}, (f"{key}={MAX_TOKENS + 1}", f"equal to {MAX_TOKENS}"))
        for key in (
            "min_token_budget",
            "max_token_budget",
            "num_sink_tokens",
            "recent_window",
            "min_context",
        )
    ],
    ({"num_dense_layers": MAX_LAYERS + 1}, ("num_dense_layers=65537", f"equal to {MAX_LAYERS}")),
    *[
        ({"log_interval": x}, ("log_interval", f"equal to {MAX_SECONDS}"))
        for x in (math.inf, math.nan, 2 * MAX_SECONDS)
    ],
    ({"thresholds": True}, ("thresholds=True", "'rms'", "'paper'")),
    ({"min_context": -5}, ("min_context=-5", "0")),
    ({"thresholds": "lloyd"}, ("thresholds='lloyd'", "'rms'", "'paper'")),
    *[
        ({"thresholds": x}, ("thresholds", "'rms'", "'paper'", "> 0"))
        for x in (0.0, -1.0, math.inf, math.nan, 1e-7, 1e7)
    ],
    ({"profile": "a.json", "score": "manhattan"}, ("profile", "score='dot'", "remove")),
    ({"profile": 3}, ("profile=3", "string", "calibrate")),
    ({"log_interval": -1}, ("log_interval=-1", "0")),
    ({"kernels": "A-100"}, ("kernels='A-100'", "auto")),
    ({"metrics": "yes"}, ("metrics='yes'", "boolean")),
    *[({"audit_interval": x}, ("audit_interval", "0 for no audit")) for x in (-1, 0.5, True, "64")],
    ({"audit_interval": MAX_STEPS + 1}, ("audit_interval", f"equal to {MAX_STEPS}")),
    *[
        ({"audit_threshold": x}, ("audit_threshold", "the log warns"))
        for x in (0, -0.1, 101.0, math.nan, "0.3")
    ],
    ({"token_budget": 32, "num_sink_tokens": 4, "recent_window": 28}, ("token_budget=32", "32")),
    ({"token_budget": 0.5, "recent_window": 64}, ("min_token_budget=64", "recent_window")),
    ("token_budget=3", ("adamas", "object", "str")),
    ([256], ("adamas", "object", "list")),
]


def test_defaults() -> None:
    assert AdamasConfig.parse(None) == AdamasConfig.parse({}) == AdamasConfig()
    assert AdamasConfig().model_dump() == DEFAULTS


@pytest.mark.parametrize(("key", "value"), VALID)
def test_valid_options(key: str, value) -> None:
    config = AdamasConfig.parse({key: value})
    assert config.model_dump() == {**DEFAULTS, key: value}
    # An int where an int was given: 1 token is not the fraction 1.0.
    assert isinstance(getattr(config, key), float if key == "log_interval" else type(value))


def test_every_option_is_tried() -> None:
    assert {key for key, _ in VALID} == set(AdamasConfig.model_fields)


@pytest.mark.parametrize(("options", "named"), INVALID, ids=str)
def test_errors_are_one_sentence_that_names_key_and_values(options, named: tuple) -> None:
    with pytest.raises(AdamasError) as error:
        AdamasConfig.parse(options)
    message = str(error.value)
    assert is_one_sentence(message), message
    assert all(part in message for part in named), message


# Whatever JSON holds, NaN and numbers beyond int64 included. No full stops in texts: an option is quoted
# as it was written, and the sentence is to be counted without it.
TEXT = st.text(st.characters(exclude_characters=".!?"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(2**80), 2**80) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@UNHURRIED
@given(st.dictionaries(st.sampled_from(sorted(DEFAULTS)) | TEXT, JSON, max_size=4) | JSON)
def test_any_json_is_a_configuration_or_one_sentence(options) -> None:
    try:
        config = AdamasConfig.parse(options)
    except AdamasError as error:
        assert is_one_sentence(str(error))
        return
    # What was accepted fits the int32 tensors that hold lengths and budgets.
    lens = torch.tensor([0, 1, 2**31 - 1], dtype=torch.int32)
    out = torch.empty_like(lens)
    row_budgets(config.budget, lens, None, out)
    assert out.tolist() == [config.budget.of(n) for n in lens.tolist()]


@pytest.mark.parametrize("key", DEFAULTS)
@UNHURRIED
@given(JSON)
def test_any_value_of_any_option(key: str, value) -> None:
    try:
        assert key in AdamasConfig.parse({key: value}).model_fields_set
    except AdamasError as error:
        assert is_one_sentence(str(error))


@UNHURRIED
@given(st.integers(1, 10**6), st.integers(0, 2 * 10**6))
def test_budget_in_tokens(budget: int, context: int) -> None:
    """Within the budget a context is dense."""
    assert AdamasConfig(token_budget=budget).budget.of(context) == min(budget, context)


@UNHURRIED
@given(st.floats(1e-6, 1.0), st.integers(1, 1000), st.integers(0, 10**6))
def test_budget_as_a_fraction_has_a_floor(fraction: float, floor: int, context: int) -> None:
    config = AdamasConfig(token_budget=fraction, min_token_budget=floor)
    tokens = config.budget.of(context)
    assert min(floor, context) <= tokens <= context
    assert tokens >= fraction * context
    assert tokens < fraction * context + 1 or tokens == min(floor, context)


def test_the_whole_context_as_a_fraction_is_dense() -> None:
    assert AdamasConfig(token_budget=1.0).budget.of(5000) == 5000


def test_short_contexts_are_dense() -> None:
    config = AdamasConfig(token_budget=64, min_context=1000)
    assert [config.budget.of(n) for n in (999, 1000, 1001)] == [999, 64, 64]


@pytest.mark.parametrize(
    ("options", "coding"),
    [
        ({}, Coding(RMS_THRESHOLD, relative=True)),
        ({"score": "manhattan"}, Coding(1.25, relative=False)),
        ({"thresholds": "paper"}, Coding(1.25, relative=False)),
        ({"thresholds": "rms", "score": "manhattan"}, Coding(RMS_THRESHOLD, relative=True)),
        ({"thresholds": 2.0}, Coding(2.0, relative=False)),
    ],
    ids=str,
)
def test_thresholds(options: dict, coding: Coding) -> None:
    assert AdamasConfig.parse(options).coding(64) == coding


@pytest.mark.parametrize(
    "options",
    [{"token_budget": 100}, {"token_budget": 0.1}, {"token_budget": 0.3, "min_context": 300}],
    ids=str,
)
@UNHURRIED
@given(st.lists(st.tuples(st.integers(0, 10**6), st.booleans()), min_size=1))
def test_budgets_of_a_batch(options: dict, rows: list[tuple[int, bool]]) -> None:
    """The rows of a step at once; rows that belong to a prompt are dense."""
    config = AdamasConfig(**options)
    context = torch.tensor([n for n, _ in rows], dtype=torch.int32)
    out = torch.empty_like(context)
    row_budgets(config.budget, context, torch.tensor([prompt for _, prompt in rows]), out)
    assert out.tolist() == [n if prompt else config.budget.of(n) for n, prompt in rows]
    row_budgets(config.budget, context, None, out)
    assert out.tolist() == [config.budget.of(n) for n, _ in rows]


@pytest.mark.parametrize(
    ("name", "device"), [("cuda", "cpu"), ("triton", "cpu"), ("cpu", "cuda"), ("auto", "xpu")]
)
def test_kernels_of_another_device_are_refused(name: str, device: str) -> None:
    with pytest.raises(AdamasError, match=f"{name!r}.*{device}") as error:
        get_backend(name, device)
    assert is_one_sentence(str(error.value))


@pytest.mark.parametrize("tokens", [100, 0.25])
def test_launches_are_sized_for_what_requests_may_ask_for(tokens) -> None:
    """Their own budgets are what they were."""
    budget = AdamasConfig(token_budget=tokens, max_token_budget=700).budget
    assert [budget.of(n) for n in (60, 600, 1000, 4000)] == [
        TokenBudget(tokens, 64).of(n) for n in (60, 600, 1000, 4000)
    ]
    assert [budget.most(n) for n in (60, 600, 1000)] == [60, 600, 700]
    assert budget.most(4000) == max(700, budget.of(4000))


def test_layers_by_the_numbers_of_a_json_object() -> None:
    assert AdamasConfig.parse({"layer_budgets": {"0": 64, "12": 0.5}}).layer_budgets == {
        0: 64,
        12: 0.5,
    }


def test_a_layer_with_a_budget_of_its_own_is_sparse() -> None:
    """Also among the first, which are dense unless they are named."""
    config = AdamasConfig(num_dense_layers=3, layer_budgets={1: 512, 7: 0.5}, min_context=100)
    assert [n for n in range(9) if config.is_dense(n)] == [0, 2]
    assert [config.budget_of(n).of(2000) for n in (0, 1, 7, 8)] == [256, 512, 1000, 256]
    assert [config.budget_of(n).of(99) for n in (0, 1, 7, 8)] == [99] * 4
    assert config.budgets == [config.budget_of(n) for n in (0, 1, 7)]


def test_layers_with_one_budget_share_it() -> None:
    assert len(AdamasConfig(layer_budgets={0: 256, 1: 64, 2: 64}).budgets) == 2


def test_one_token_and_the_whole_context_are_two_budgets() -> None:
    """In Python 1 equals 1.0."""
    config = AdamasConfig(token_budget=1, layer_budgets={0: 1.0})
    assert [budget.of(100) for budget in config.budgets] == [1, 100]
    assert len(set(config.budgets)) == 2


def test_dense_layers_follow_the_score() -> None:
    assert AdamasConfig().dense_layers == 1
    assert AdamasConfig(score="manhattan").dense_layers == 2
    assert AdamasConfig(num_dense_layers=0).dense_layers == 0


def test_a_resolved_configuration_names_its_defaults() -> None:
    found = AdamasConfig().resolved()
    assert (found.combine, found.num_dense_layers, found.layer_budgets) == ("max", 1, {0: 2048})
    assert not found.is_dense(0)
    assert [found.budget_of(n).of(8192) for n in (0, 1)] == [2048, 256]
    assert found.budgets == [found.budget_of(1), found.budget_of(0)]


@pytest.mark.parametrize(
    ("options", "model", "combine"),
    [
        ({}, {}, "max"),
        ({}, {"qk_norm": True}, "sum"),
        ({"profile": "a.json"}, {"qk_norm": True}, "max"),
        ({"combine": "max"}, {"qk_norm": True}, "max"),
        ({"combine": "sum"}, {}, "sum"),
        ({"selection": "query_head"}, {}, "sum"),
        ({"score": "manhattan"}, {}, "sum"),
    ],
    ids=str,
)
def test_scores_are_combined_by_the_maximum_unless_codes_are_noise(
    options: dict, model: dict, combine: str
) -> None:
    assert AdamasConfig.parse(options).resolved(**model).combine == combine


@pytest.mark.parametrize(
    ("options", "model", "first"),
    [
        ({"token_budget": 100}, {}, 800),
        ({"token_budget": MAX_TOKENS}, {}, MAX_TOKENS),
        ({"token_budget": 0.1}, {}, 0.8),
        ({"token_budget": 0.2}, {}, 1.0),
        ({"layer_budgets": {"0": 64, "3": 512}}, {}, 64),
        ({"layer_budgets": {"3": 512}}, {}, 2048),
        ({"combine": "sum"}, {"qk_norm": True}, 2048),
        ({}, {"budgeted": False}, None),
        ({"num_dense_layers": 1}, {}, None),
        ({"num_dense_layers": 0}, {}, None),
        ({"selection": "query_head"}, {}, None),
        ({"score": "manhattan"}, {}, None),
        ({"score": "manhattan", "selection": "query_head"}, {}, None),
    ],
    ids=str,
)
def test_layer_0_has_eight_times_the_budget_where_it_was_dense(
    options: dict, model: dict, first: int | float | None
) -> None:
    config = AdamasConfig.parse(options)
    found = config.resolved(**model)
    assert found.layer_budgets == {**({} if first is None else {0: first}), **config.layer_budgets}
    assert type(found.layer_budgets.get(0)) is type(first)
    assert found.num_dense_layers == config.dense_layers
    assert found.is_dense(0) == (first is None and config.num_dense_layers != 0)


@pytest.mark.parametrize("model", [{}, {"qk_norm": True}, {"budgeted": False}], ids=str)
@pytest.mark.parametrize("options", [{}, {"score": "manhattan"}, {"token_budget": 0.1}], ids=str)
def test_what_is_resolved_stays_so(options: dict, model: dict) -> None:
    """Workers read what was resolved before the server started, and know no more of the model."""
    found = AdamasConfig.parse(options).resolved(**model)
    assert found.resolved() == found
    assert AdamasConfig.parse(found.model_dump(mode="json")) == found
