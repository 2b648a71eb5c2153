"""Models whose layers or heads are divided among processes, against the same models in one process.

In float32, as in test_serve.
"""

import os
from pathlib import Path

import engines
import pytest
import torch
from common import random_llama

from vllm_adamas import profile as profiles
from vllm_adamas.identity import identify
from vllm_adamas.serving.histograms import GROUP, groups

CORES = sorted(os.sched_getaffinity(0))[:2]
pytestmark = [
    pytest.mark.serve,
    pytest.mark.slow,
    pytest.mark.skipif(len(CORES) < 2, reason="needs two cores"),
]

LAYERS = GROUP + 2  #: half of them on each rank, and the last two in an audit's group of their own
LAST = str(LAYERS - 1)
WHOLE = {"token_budget": engines.COMMON["max_model_len"]}
STOCK = {"attention_backend": "CPU_ATTN"}
#: An eager server's second rank has no place for what the first one sends, because vLLM makes it when it warms up.
COMPILED = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
STAGES = {"pipeline_parallel_size": 2, **COMPILED}


def adamas(options: dict) -> dict:
    return {"additional_config": {"adamas": options}}


def make_profile(model: Path, path: Path) -> str:
    """A profile with other mean keys and balances in every layer."""
    from vllm.engine.arg_utils import EngineArgs

    found = identify(EngineArgs(model=str(model)).create_model_config())
    shape, generator = (found.num_kv_heads, found.head_size), torch.Generator().manual_seed(0)
    layers = [
        profiles.LayerProfile(
            key_mean=profiles.encode_mean(torch.randn(shape, generator=generator)),
            balance=profiles.encode_balance(torch.randint(-2, 3, shape, generator=generator)),
            key_rms=[1.0] * found.num_kv_heads,
            mean_share=[0.5] * found.num_kv_heads,
        )
        for _ in range(found.num_layers)
    ]
    suggestion = profiles.Suggestion(
        wanted_recall=0.9, token_budget=128, num_dense_layers=1, reached=True
    )
    about = {"created_by": "a test", "tokens": 1, "texts": {}, "context": 1}
    profiles.Profile(model=found, suggestion=suggestion, layers=layers, **about).save(path)
    return str(path)


@pytest.fixture(scope="module")
def ranks():
    """The process of engines with two ranks, a core for each."""
    with engines.Engines({"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, CORES))}) as process:
        yield process


@pytest.fixture(scope="module")
def alone():
    """The process of engines with one rank."""
    with engines.Engines() as process:
        yield process


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return random_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=LAYERS)


@pytest.mark.supports("pipeline parallelism")
def test_stages_of_layers_give_stock_tokens(alone, ranks, model: Path) -> None:
    stock = alone.ask(model, STOCK)
    assert ranks.ask(model, {**STAGES, **adamas(WHOLE)}).tokens == stock.tokens
    assert all(len(set(answer)) > 4 for answer in stock.tokens), "attention decides nothing"


@pytest.mark.supports("pipeline parallelism")
def test_layers_of_the_second_stage_keep_their_numbers(
    alone, ranks, model: Path, tmp_path: Path
) -> None:
    """Dense layers, budgets of layers, profiles and the audit mean the layers of the model.

    Requests' own budgets reach both ranks. Both engines compile, whose rounding decides between codes of these keys.
    """
    options = {
        "token_budget": 256,
        "layer_budgets": {LAST: 64},
        "num_dense_layers": 1,
        "profile": make_profile(model, tmp_path / "profile.json"),
        "max_token_budget": 512,
        "audit_interval": 1,
    }
    asked = {"extra_args": {"adamas_token_budget": 512}}
    requests = [{"prompt": prompt} for prompt in engines.prompts()]
    requests.append({"prompt": engines.prompts()[3], "sampling": asked})
    one, two = (
        process.ask(model, {**arguments, **adamas(options)}, requests)
        for process, arguments in ((alone, COMPILED), (ranks, STAGES))
    )
    assert two.tokens == one.tokens
    assert two.counters == one.counters
    assert two.counters["sparse_rows"] > 0
    assert two.audited.keys() == set(groups(LAYERS))
    assert two.tokens[3] != two.tokens[len(requests) - 1]


@pytest.mark.supports("tensor parallelism with fewer KV heads than ranks")
def test_ranks_may_have_the_same_kv_head(alone, ranks, tmp_path: Path) -> None:
    """vLLM gives each rank a copy. Ranks select for their own query heads, so sets of single heads are compared."""
    model = random_llama(tmp_path / "model", num_key_value_heads=1)
    profile = make_profile(model, tmp_path / "profile.json")
    split = {"tensor_parallel_size": 2}
    stock = alone.ask(model, STOCK)
    assert ranks.ask(model, {**split, **adamas(WHOLE)}).tokens == stock.tokens
    assert all(len(set(answer)) > 4 for answer in stock.tokens), "attention decides nothing"

    few = adamas({"token_budget": 64, "selection": "query_head", "profile": profile})
    one, two = alone.ask(model, few), ranks.ask(model, {**split, **few})
    assert two.tokens == one.tokens != stock.tokens
    assert two.counters == one.counters
