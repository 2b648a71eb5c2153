"""Learned sinks and soft-capped logits through the engine, against vLLM's own CPU backend."""

import engines
import pytest
from common import random_gemma2, random_gpt_oss

MODELS = {"soft-capped logits": random_gemma2, "learned sinks": random_gpt_oss}
SMALL = {"token_budget": 64}  #: of the contexts of up to 790 tokens in engines.prompts()
ENGINES = {
    "stock": {"attention_backend": "CPU_ATTN"},
    "every token": {"additional_config": {"adamas": {"token_budget": 4096}}},
    "sparse": {"additional_config": {"adamas": SMALL}},
    "reference": {"additional_config": {"adamas": {**SMALL, "kernels": "reference"}}},
}


@pytest.fixture(scope="module", params=MODELS)
def tokens(request, tmp_path_factory) -> dict[str, list[list[int]]]:
    """What each engine answers; in float32, as in test_serve."""
    model = MODELS[request.param](tmp_path_factory.mktemp("model"))
    with engines.Engines() as process:
        return {name: process.ask(model, arguments).tokens for name, arguments in ENGINES.items()}


@pytest.mark.supports("{tokens}")
@pytest.mark.serve
@pytest.mark.slow
def test_a_budget_beyond_the_context_gives_stock_tokens(tokens) -> None:
    assert tokens["every token"] == tokens["stock"]
    assert all(len(set(answer)) > 4 for answer in tokens["stock"]), "attention decides nothing"


@pytest.mark.supports("{tokens}")
@pytest.mark.serve
@pytest.mark.slow
def test_sparse_decode_gives_the_tokens_of_the_reference(tokens) -> None:
    assert tokens["sparse"] == tokens["reference"]
    assert tokens["sparse"] != tokens["stock"]
