"""Chunked local attention (Llama 4) through the real engine: steps that cross the end of a chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from agreement import NEAR_TIE, agreed
from architectures import ALL_EXPERTS, SERVED, VOCABULARY
from checkpoints import write_model
from engines import TOKENS, Engine, Engines, prompts
from test_served import EXPERTS, FLASH, GRAPHS, ON_GPU, STOCK, budget

pytestmark = pytest.mark.models

CONFIG = {**SERVED["Llama-4-Scout"], **ALL_EXPERTS["Llama-4-Scout"]}
CHUNK = CONFIG["attention_chunk_size"]
IDS = prompts(3, VOCABULARY)[3]
PROMPTS = [  # answers cross the end of a chunk, begin with one, and repeat what n-grams propose
    IDS[: CHUNK - 5],
    IDS[:CHUNK],
    IDS[: 2 * CHUNK + 1],
    IDS[:40] * 6,
]
REQUESTS = [{"prompt": prompt} for prompt in PROMPTS]
WAYS = {  # arguments of the engine
    "drafts": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        }
    },
    "chunked prefill": {"max_num_batched_tokens": 96},
    "one group of pages": {"disable_hybrid_kv_cache_manager": True},
    "blocks of 128 tokens": {"block_size": 128},
}


RUNNERS = {"V1": "0", "V2": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("chunked"), CONFIG)


def check(
    ask: Callable[[dict], Engine], stock: dict, way: str, near_tie: float, share: float
) -> None:
    """Tokens are the stock backend's with a budget above the contexts; below it the full-attention layer is sparse.

    Args:
        ask: returns what an engine with these arguments says to the prompts.
        stock: arguments of the stock engine.
        share: of the tokens that come before a near tie, at least.
    """
    stock, whole, few = (
        ask({**backend, **WAYS[way]}) for backend in (stock, budget(2048), budget(64))
    )
    pairs = zip(stock.answers, whole.answers, strict=True)
    compared = sum(agreed(*pair, near_tie=near_tie) for pair in pairs)
    print(f"{way}: {compared} of {TOKENS * len(stock.answers)} tokens")
    assert compared >= share * TOKENS * len(stock.answers)
    assert whole.counters["sparse_rows"] == 0
    rows = few.counters["sparse_rows"]
    if way == "drafts":
        assert whole.drafted > 0
        assert rows > 2 * len(PROMPTS) * (TOKENS - 1)
    else:
        assert rows == 2 * len(PROMPTS) * (TOKENS - 1)
    assert few.tokens != stock.tokens


@pytest.mark.supports("chunked local attention")
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM serves on the GPU")
@pytest.mark.parametrize("way", WAYS)
def test_steps_across_chunks(engines: Engines, model: Path, way: str) -> None:
    def ask(arguments: dict) -> Engine:
        if way != "drafts":
            return engines.ask(model, arguments, REQUESTS)
        with Engines() as process:  # vLLM starts no engine on a CPU after one that drafts n-grams
            return process.ask(model, arguments, REQUESTS)

    check(ask, STOCK, way, NEAR_TIE["float32"], share=0.9)


@pytest.fixture(scope="module")
def of_runner() -> Iterator[dict[str, Engines]]:
    """A process for each model runner."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(Engines({"VLLM_USE_V2_MODEL_RUNNER": flag}))
            for name, flag in RUNNERS.items()
        }


@pytest.mark.supports("chunked local attention")
@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_steps_across_chunks_on_a_gpu(
    of_runner: dict[str, Engines], model: Path, runner: str, way: str
) -> None:
    if not find_spec(EXPERTS):
        pytest.skip(f"this vLLM has no kernels for experts ({EXPERTS})")
    arguments = {**ON_GPU, "dtype": "float16", "max_num_batched_tokens": 2048}

    def ask(more: dict) -> Engine:
        graphs = {} if "attention_backend" in more else GRAPHS
        return of_runner[runner].ask(model, {**arguments, **graphs, **more}, REQUESTS)

    check(ask, FLASH, way, 0.1, share=0.3)
