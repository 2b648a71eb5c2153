"""``"vllm_xargs": {"adamas_token_budget": N}``: what requests may ask for, and that each gets its own."""

import json
import math
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from random import Random
from types import SimpleNamespace

import pytest
import torch
from common import MODEL, Changed, is_one_sentence, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checks import speculative

from vllm_adamas.config import AdamasConfig
from vllm_adamas.serving import checks, compat, request_budgets
from vllm_adamas.serving.launch import Server
from vllm_adamas.serving.plugin import register
from vllm_adamas.serving.shared import Shared

register()

from vllm import SamplingParams  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.v1.sample.logits_processor import (  # noqa: E402
    LogitsProcessors,
    validate_logits_processors_parameters,
)
from vllm.v1.worker.gpu.sample.logits_processor import (  # noqa: E402
    build_custom_logits_processors,
    build_custom_logits_processors_params_validator,
)
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch  # noqa: E402

LEAST, MOST = 128, 600
CONFIG = AdamasConfig(token_budget=LEAST, max_token_budget=MOST)
WRONG = [0, -1, LEAST - 1, MOST + 1, 2**31, 2**63, 300.0, 1e300, math.nan, True, "300", "", [300]]


def params(wanted=None) -> SamplingParams:
    extra = None if wanted is None else {request_budgets.ARGUMENT: wanted, "of another": 1}
    return SamplingParams(extra_args=extra)


def validator(runner: str):
    """What the server calls with the parameters of each request."""
    names = (request_budgets.processor(runner, CONFIG),)
    if runner == "V2":
        return build_custom_logits_processors_params_validator(names)
    return lambda given: validate_logits_processors_parameters(names, given)


def engine(runner: str):
    """A logits processor made as the runner makes it, and the budgets that metadata builders read."""
    shared = Shared(CONFIG, "cpu", 0)
    layers = {
        "other": SimpleNamespace(),
        "layer": SimpleNamespace(impl=SimpleNamespace(shared=shared)),
    }
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    name = request_budgets.processor(runner, CONFIG).partition(":")[2]
    arguments = (torch.device("cpu"), False) if runner == "V1" else (None,)
    return getattr(request_budgets, name)(config, *arguments), shared.requested


# Validation


@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize("wanted", [None, LEAST, 300, MOST])
def test_budgets_within_the_bounds_are_served(runner: str, wanted) -> None:
    validator(runner)(params(wanted))


@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize("wanted", WRONG, ids=str)
def test_others_are_refused_in_one_sentence(runner: str, wanted) -> None:
    with pytest.raises(VLLMValidationError) as error:
        validator(runner)(params(wanted))
    message = str(error.value)
    assert is_one_sentence(message), message
    assert all(part in message for part in (request_budgets.ARGUMENT, str(LEAST), str(MOST)))


def test_two_engines_of_one_process_have_their_own_bounds() -> None:
    wider = AdamasConfig(token_budget=0.5, min_token_budget=10, max_token_budget=5000)
    names = (request_budgets.processor("V1", wider),)
    for wanted in (10, 5000):
        validate_logits_processors_parameters(names, params(wanted))
        with pytest.raises(VLLMValidationError):
            validator("V1")(params(wanted))


# Slots


def requests_of(batch: InputBatch, states: dict) -> dict[int, int]:
    """What the requests of a batch ask for, by row."""
    asked = (states[name].sampling_params.extra_args for name in batch.req_ids)
    return {row: extra[request_budgets.ARGUMENT] for row, extra in enumerate(asked) if extra}


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_rows_of_model_runner_v1(seed: int) -> None:
    """Requests begin, end, are preempted, resume and change places; the runner's own batch says where."""
    rng, size = Random(seed), 8
    processor, requested = engine("V1")
    batch = InputBatch(
        max_num_reqs=size,
        max_model_len=64,
        max_num_batched_tokens=64,
        device=torch.device("cpu"),
        vocab_size=32,
        block_sizes=[16],
        max_num_blocks_per_req=[4],
        logitsprocs=LogitsProcessors([processor]),
    )
    states: dict[str, CachedRequestState] = {}
    for _ in range(30):
        for name in rng.sample(batch.req_ids, rng.randrange(len(batch.req_ids) + 1)):
            batch.remove_request(name)
        for _ in range(rng.randrange(size - batch.num_reqs + 1)):
            waiting = sorted(states.keys() - set(batch.req_ids))
            name = rng.choice([*waiting, str(len(states))])
            if name not in states:
                wanted = rng.choice([None, rng.randrange(LEAST, MOST)])
                states[name] = CachedRequestState(
                    req_id=name,
                    prompt_token_ids=[1, 2, 3],
                    mm_features=[],
                    sampling_params=params(wanted),
                    generator=None,
                    block_ids=([0],),
                    num_computed_tokens=0,
                    output_token_ids=[],
                )
            batch.add_request(states[name])
        batch.condense()
        for _ in range(rng.randrange(3) if batch.num_reqs > 1 else 0):
            batch.swap_states(*rng.sample(range(batch.num_reqs), 2))
        batch.refresh_metadata()
        assert requested == requests_of(batch, states)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from([None, 200, 500])), max_size=40))
def test_slots_of_model_runner_v2(admitted: list) -> None:
    """A request that takes a slot has its own budget there, and none if it asks for none."""
    processor, requested = engine("V2")
    last = {}
    for slot, wanted in admitted:
        assert processor.add_request(slot, params(wanted)) is False  # else vLLM copies all logits
        last[slot] = wanted
    assert requested == {slot: wanted for slot, wanted in last.items() if wanted}


def test_model_runner_v2_loads_its_class() -> None:
    states = SimpleNamespace(
        **dict.fromkeys(
            (
                "device",
                "max_num_reqs",
                "vocab_size",
                "all_token_ids",
                "prompt_len",
                "prefill_len",
                "total_len",
            )
        )
    )
    name = request_budgets.processor("V2", CONFIG)
    (processor,) = build_custom_logits_processors(None, states, False, [name])
    assert processor.bounds == (LEAST, MOST)


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_logits_stay_as_they_are(runner: str) -> None:
    processor, _ = engine(runner)
    logits = torch.randn(3, 5)
    assert processor.apply(logits, *([None] if runner == "V2" else [])) is logits


# A server

OPTIONS = {
    "token_budget": LEAST,
    "max_token_budget": MOST,
    "num_dense_layers": 1,
    "audit_interval": 3,
}
ARGS = [
    "--enforce-eager",
    "--dtype",
    "float32",
    "--block-size",
    "64",
    "--max-num-seqs",
    "8",
    "--max-model-len",
    "3200",
]
REFUSED = "vllm:adamas_refused_requests_total"
SPARSE_LAYERS, QUERY_HEADS, CONTEXT = 29, 9, 700


class Spec:
    """The server of this file."""

    @staticmethod
    def arguments() -> tuple:
        return MODEL, "adamas", OPTIONS, ARGS


@pytest.fixture
def server(serve) -> Server:
    return serve(Spec)


def prompt(seed: int) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(100, 40000) for _ in range(CONTEXT)]


def complete(server: Server, seed: int, tokens: int, **fields) -> dict:
    body = {"prompt": prompt(seed), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return server.post("/v1/completions", {**body, **fields})["choices"][0]


def asking(wanted) -> dict:
    return {} if wanted is None else {"vllm_xargs": {request_budgets.ARGUMENT: wanted}}


def attended(server: Server) -> int:
    return int(server.metrics()["vllm:adamas_decode_attended_tokens_total"])


@pytest.mark.supports("token budgets of requests")
@pytest.mark.serve
@pytest.mark.timeout(1200)
def test_requests_in_one_batch_attend_to_what_they_ask_for(server) -> None:
    """Of different lengths, so that those behind the ones that end change their rows."""
    requests = [(300, 9), (None, 16), (MOST, 12), (500, 20), (LEAST, 3)]
    before = attended(server)
    with ThreadPoolExecutor(len(requests)) as pool:
        jobs = [
            pool.submit(complete, server, seed, tokens, **asking(wanted))
            for seed, (wanted, tokens) in enumerate(requests)
        ]
        together = [job.result() for job in jobs]
    steps = sum((tokens - 1) * (wanted or LEAST) for wanted, tokens in requests)
    assert attended(server) - before == SPARSE_LAYERS * QUERY_HEADS * steps
    alone = [
        complete(server, seed, tokens, **asking(wanted))
        for seed, (wanted, tokens) in enumerate(requests)
    ]
    assert together == alone


@pytest.mark.serve
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("wanted", WRONG, ids=str)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_the_server_refuses_what_it_cannot_serve(server, path: str, wanted) -> None:
    body = {"max_tokens": 2, **asking(wanted)}
    body |= (
        {"prompt": "a"}
        if path == "completions"
        else {"messages": [{"role": "user", "content": "a"}]}
    )
    refused = server.metrics()[REFUSED]
    with pytest.raises(urllib.error.HTTPError) as error:
        server.post(f"/v1/{path}", body)
    assert error.value.code == 400
    assert server.metrics()[REFUSED] == refused + 1
    message = json.loads(error.value.read())["error"]["message"]
    assert is_one_sentence(message), message
    assert all(part in message for part in (request_budgets.ARGUMENT, str(LEAST), str(MOST)))


@pytest.mark.serve
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("wanted", [10**30, -(10**30), {"a": 1}, [[300]]], ids=str)
def test_vllm_refuses_what_no_argument_may_be(server, wanted) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        server.post("/v1/completions", {"prompt": "a", **asking(wanted)})
    assert error.value.code == 400


@pytest.mark.serve
@pytest.mark.timeout(1200)
def test_the_server_answers_as_before(server) -> None:
    before = attended(server)
    complete(server, 1, 5)
    assert attended(server) - before == SPARSE_LAYERS * QUERY_HEADS * 4 * LEAST


# Servers whose runner does not tell about requests


@pytest.fixture(scope="module")
def vllm_config():
    from vllm.engine.arg_utils import EngineArgs

    options = {"adamas": OPTIONS}
    args = {"attention_backend": "adamas", "additional_config": options, "enforce_eager": True}
    return EngineArgs(
        model=str(MODEL), logits_processors=["of.the:Operator"], **args
    ).create_engine_config()


@pytest.mark.supports("token budgets of requests")
def test_the_processor_is_added_once_to_those_of_the_operator(vllm_config) -> None:
    checks.check_config(vllm_config)
    config = checks.read_config(vllm_config)
    name = request_budgets.processor(compat.model_runner(vllm_config), config)
    assert vllm_config.model_config.logits_processors == ["of.the:Operator", name]


@pytest.mark.refuses("max_token_budget with some features")
@pytest.mark.parametrize(
    ("v2", "part", "changes", "named"),
    [
        (False, "speculative_config", {"method": "ngram"}, ("V1", "--speculative-config")),
        (True, "parallel_config", {"pipeline_parallel_size": 2}, ("--pipeline-parallel-size",)),
        (True, "model_config", {"return_sampling_mask": True}, ("--return-sampling-mask",)),
        (True, "model_config", {"is_hybrid": True}, ("state-space", "another model")),
    ],
)
def test_servers_that_cannot_tell_requests_apart(
    vllm_config, record_property, v2, part, changes, named
) -> None:
    if part == "speculative_config":
        changed = Changed(speculative(vllm_config, **changes), use_v2_model_runner=v2)
    else:
        changes = {part: Changed(getattr(vllm_config, part), **changes)}
        changed = Changed(vllm_config, use_v2_model_runner=v2, **changes)
    sentence = refused(lambda: checks.check_config(changed), "max_token_budget with", *named)
    record_property("sentence", sentence)
    other = Changed(changed, additional_config={"adamas": {"token_budget": LEAST}})
    assert checks.check_config(other).max_token_budget is None
