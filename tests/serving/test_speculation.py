"""Speculative decoding with a draft model changes no answer. In float32, as in test_serve, which drafts n-grams."""

from importlib.util import find_spec

import engines
import pytest
from common import random_llama

pytestmark = [pytest.mark.serve, pytest.mark.slow]

SUFFIX = {"method": "suffix", "num_speculative_tokens": 4}
#: Prompts are cut within requests that verify drafts, and their remainders are as short as drafts.
CHUNKS = {"max_num_batched_tokens": 99, "enable_prefix_caching": False}
STOCK = {"attention_backend": "CPU_ATTN", "additional_config": {}}
WHOLE = {"additional_config": {"adamas": {"token_budget": 4096}}}  # more than any context


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, engines.Engine]:
    """What the engine of each case says."""
    model = str(random_llama(tmp_path_factory.mktemp("llama")))
    itself = {"method": "draft_model", "model": model, "num_speculative_tokens": 3}
    cases = {
        "plain": {},
        "draft model": {"speculative_config": itself},
        "draft model, chunks": {"speculative_config": itself, **CHUNKS},
        "one draft": {"speculative_config": {**itself, "num_speculative_tokens": 1}},
        "stock": STOCK,
    }
    if find_spec("arctic_inference"):
        cases["suffix"] = {"speculative_config": SUFFIX}
    cases["stock, draft model"] = {**cases["draft model"], **STOCK}
    cases["whole, draft model"] = {**cases["draft model"], **WHOLE}
    with engines.Engines() as process:
        return {name: process.ask(model, arguments) for name, arguments in cases.items()}


@pytest.mark.supports("speculative decoding: draft model")
@pytest.mark.parametrize("name", ["draft model", "draft model, chunks", "one draft"])
def test_drafts_change_no_answer(answers, name: str) -> None:
    found = answers[name]
    assert found.tokens == answers["plain"].tokens != answers["stock"].tokens
    assert 0 < found.accepted < found.drafted


@pytest.mark.supports("speculative decoding: suffixes")
@pytest.mark.skipif(not find_spec("arctic_inference"), reason="needs the package arctic-inference")
def test_drafts_of_suffixes_change_no_answer(answers) -> None:
    """Every prompt is asked twice, so the drafts are earlier answers."""
    assert answers["suffix"].tokens == answers["plain"].tokens
    assert answers["suffix"].accepted > 0


@pytest.mark.supports("speculative decoding: draft model")
def test_drafts_are_accepted_as_by_the_stock_backend(answers) -> None:
    """With budgets above every context."""
    stock, ours = answers["stock, draft model"], answers["whole, draft model"]
    assert (ours.drafted, ours.accepted) == (stock.drafted, stock.accepted)
    assert ours.tokens == stock.tokens == answers["stock"].tokens
    assert ours.accepted > 0
