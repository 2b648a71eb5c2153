"""A model that sees images, with and without them, against the stock backend of the CPU. As test_served does it.

The encoder of images has attention of its own, which no ``--attention-backend`` of a text model chooses. What it makes
of an image is part of the context like the tokens of a text.
"""

from __future__ import annotations

import pytest
from agreement import agreed
from architectures import SERVED
from checkpoints import IMAGE, QUERIES, write_blip2
from engines import COMMON, TOKENS, Engine, Engines, prompts
from test_served import FEW, STOCK, budget

pytestmark = [pytest.mark.models, pytest.mark.slow]

LAYERS = 3  #: with a budget
TEXT_MODEL = SERVED["OPT-1.3B"]
TEXTS = [{"prompt": prompt} for prompt in prompts(3, IMAGE)]
SEEN = [{**TEXTS[2], "image": seed} for seed in (0, 1)]  # before a text of 300 tokens


@pytest.fixture(scope="module")
def said(engines: Engines, tmp_path_factory) -> dict[str, Engine]:
    """By the stock engine, one with a budget above the contexts, and one with a small budget."""
    model = write_blip2(tmp_path_factory.mktemp("blip2"), TEXT_MODEL)
    cases = {"stock": STOCK, "whole": budget(COMMON["max_model_len"]), "few": budget(FEW)}
    return {
        name: engines.ask(model, {**arguments, "skip_tokenizer_init": False}, TEXTS + SEEN)
        for name, arguments in cases.items()
    }


def test_attention_decides_between_tokens(said: dict[str, Engine]) -> None:
    """Otherwise equal answers would say little."""
    assert len({token for tokens in said["stock"].tokens for token in tokens}) > 10
    assert said["few"].tokens != said["stock"].tokens


@pytest.mark.supports("multimodal models: {kind}")
@pytest.mark.parametrize("kind", ["text", "images"])
def test_a_budget_beyond_the_context_gives_stock_tokens(said: dict[str, Engine], kind: str) -> None:
    asked = TEXTS + SEEN
    of_kind = [("image" in request) == (kind == "images") for request in 2 * asked]
    pairs = zip(said["stock"].answers, said["whole"].answers, strict=True)
    compared = [agreed(*pair) for pair, wanted in zip(pairs, of_kind, strict=True) if wanted]
    assert sum(compared) >= 0.9 * TOKENS * len(compared)
    assert said["whole"].counters["sparse_rows"] == 0


def test_an_image_changes_the_answer(said: dict[str, Engine]) -> None:
    """To the text that stands behind it."""
    seen = said["stock"].tokens[len(TEXTS)]
    assert seen != said["stock"].tokens[TEXTS.index({"prompt": SEEN[0]["prompt"]})]


def test_an_image_is_tokens_of_the_context(said: dict[str, Engine]) -> None:
    """The first token of an answer comes from the prefill. Each prompt is sent twice."""
    lengths = [len(request["prompt"]) + QUERIES for request in SEEN]
    lengths += [len(request["prompt"]) for request in TEXTS]
    contexts = [length + n for length in lengths for n in range(1, TOKENS)]
    counted, heads = said["few"].counters, TEXT_MODEL["num_attention_heads"]
    sparse = sum(context > FEW for context in contexts)
    assert counted["sparse_rows"] == 2 * LAYERS * sparse
    assert counted["decode_context_tokens"] == 2 * LAYERS * heads * sum(contexts)
