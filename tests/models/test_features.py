"""Features of requests and of weights on one model, against the stock backend of the CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from agreement import agreed
from architectures import SERVED, VOCABULARY
from checkpoints import write_lora, write_model, write_quantised
from common import random_llama
from engines import TOKENS, Answer, Engines, prompts
from test_served import BLOCKS, STOCK, budget

pytestmark = [pytest.mark.models, pytest.mark.slow]

PROMPT = prompts()[3]
DIGITS = "[0-9]{12}"
FEATURES = {  # what a request has beside its prompt
    "greedy sampling": {},
    "n > 1": {"sampling": {"n": 3, "temperature": 1.0, "seed": 7}},
    "structured output": {
        "sampling": {"structure": {"regex": DIGITS}, "ignore_eos": False, "detokenize": True}
    },
    "prompt log-probabilities": {"sampling": {"prompt_logprobs": 0}},
    "beam search": {"beams": 3},  # the last one is answered last
}
Pairs = dict[str, tuple[Answer, Answer]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def answers(engines: Engines, model: Path) -> Pairs:
    """Of the stock engine and of one whose budget is above the context, with all requests at once."""
    requests = [{"prompt": PROMPT, **feature} for feature in FEATURES.values()]
    stock, whole = (
        engines.ask(model, {**backend, "skip_tokenizer_init": False}, requests).answers
        for backend in (STOCK, budget(2048))
    )
    last = len(FEATURES)
    return dict(zip(FEATURES, zip(stock[-last:], whole[-last:], strict=True), strict=True))


@pytest.mark.supports("{name}")
@pytest.mark.parametrize("name", FEATURES)
def test_a_feature(answers: Pairs, name: str) -> None:
    stock, whole = answers[name]
    if name in ("greedy sampling", "prompt log-probabilities"):
        assert agreed(stock, whole) > TOKENS // 2
    elif name != "beam search":  # the best token is another than that of the margins
        assert whole.tokens == stock.tokens
    if name in ("prompt log-probabilities", "beam search"):
        assert len(stock.logprobs) == (3 if name == "beam search" else len(PROMPT))
        assert whole.logprobs == pytest.approx(stock.logprobs, abs=1e-3)
    if name == "structured output":
        assert re.fullmatch(DIGITS, whole.text)
    if name not in ("greedy sampling", "prompt log-probabilities"):
        assert stock.tokens != answers["greedy sampling"][0].tokens


@pytest.mark.supports("LoRA")
def test_lora(engines: Engines, model: Path, tmp_path: Path) -> None:
    lora = {"enable_lora": True, "max_lora_rank": 8}
    requests = [{"prompt": PROMPT}, {"prompt": PROMPT, "lora": str(write_lora(tmp_path, model))}]
    stock, whole = (
        engines.ask(model, {**backend, **lora}, requests).answers
        for backend in (STOCK, budget(2048))
    )
    assert all(agreed(*pair) > TOKENS // 2 for pair in zip(stock, whole, strict=True))
    assert stock[-1].tokens != stock[-2].tokens


@pytest.mark.supports("{name} weights", "float16")
@pytest.mark.parametrize("name", ["GPTQ", "AWQ"])
def test_quantised_weights(engines: Engines, tmp_path: Path, name: str) -> None:
    check_quantised(engines, tmp_path, name, "float16", share=0.5)


@pytest.mark.supports("{name} weights", "bfloat16")
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM's CPU kernels need AMX")
@pytest.mark.parametrize("name", ["FP8", "INT8"])
def test_weights_of_8_bits(engines: Engines, tmp_path: Path, name: str) -> None:
    check_quantised(engines, tmp_path, name, "bfloat16", share=0.2)


def check_quantised(engines: Engines, folder: Path, name: str, dtype: str, share: float) -> None:
    """At least a share of the tokens comes before near ties, which rounding decides."""
    (plain := folder / "plain").mkdir()
    (quantised := folder / name).mkdir()
    model = write_quantised(quantised, write_model(plain, SERVED["Llama-3.1-8B"]), name)
    requests = [{"prompt": prompt} for prompt in prompts(3, VOCABULARY)]
    stock, whole = (
        engines.ask(model, {**backend, "dtype": dtype, **BLOCKS}, requests)
        for backend in (STOCK, budget(2048))
    )
    compared = [
        agreed(*pair, dtype=dtype) for pair in zip(stock.answers, whole.answers, strict=True)
    ]
    assert sum(compared) >= len(compared) * TOKENS * share
    assert len({token for answer in stock.answers for token in answer.tokens}) > 10
