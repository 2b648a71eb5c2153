"""Speculative decoding by drafters with layers changes no answer. In float32, as in test_serve, which drafts n-grams.

Every prompt is asked alone, and then beside the others. The models count down: see ``drafters.py``.
"""

from importlib.util import find_spec

import drafters
import engines
import pytest
from common import random_gemma
from drafters import DRAFTS

pytestmark = [pytest.mark.serve, pytest.mark.slow]

SPARSE_LAYERS = 3  #: of the targets' four, under the options that engines have by default
SUFFIX = {"method": "suffix", "num_speculative_tokens": 4}
needs_suffixes = pytest.mark.skipif(
    not find_spec("arctic_inference"), reason="needs the package arctic-inference"
)
#: Prompts are cut within requests that verify drafts, and their remainders are as short as drafts.
CHUNKS = {"max_num_batched_tokens": 99, "enable_prefix_caching": False}
STOCK = {"attention_backend": "CPU_ATTN", "additional_config": {}}
WHOLE = {"additional_config": {"adamas": {"token_budget": 4096}}}  # more than any context
LIMIT = {"max_model_len": 512}
#: Requests that end with the longest context, beyond which nothing can be drafted.
FULL = [{"prompt": engines.prompts()[3][:length]} for length in (496, 497)]


def drafting(method: str, **config) -> dict:
    return {"speculative_config": drafters.drafting(method, **config)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, engines.Engine]:
    """What the engine of each case says."""
    folder = tmp_path_factory.mktemp("models")
    target = drafters.target(folder / "target")
    by = {
        name: {"speculative_config": config}
        for name, config in drafters.methods(folder, target).items()
    }
    itself, eagle, eagle3 = by["draft model"], by["eagle"], by["eagle3"]
    masked = drafters.target(folder / "masked", pard_token=drafters.MASK)
    p_eagle = str(drafters.eagle3(folder / "p_eagle", target, parallel=True))
    at_once = {"parallel_drafting": True}
    cases = {
        "plain": {},
        "stock": STOCK,
        "draft model": itself,
        "draft model, chunks": {**itself, **CHUNKS},
        "one draft": drafting("draft_model", model=str(target), num_speculative_tokens=1),
        "stock, draft model": {**itself, **CHUNKS, **STOCK},
        "whole, draft model": {**itself, **CHUNKS, **WHOLE},
        "parallel draft model": {
            **drafting("draft_model", model=str(masked), **at_once),
            **CHUNKS,
        },
        "eagle": eagle,
        "eagle3": eagle3,
        "eagle3, chunks": {**eagle3, **CHUNKS},
        "stock, eagle3": {**eagle3, **STOCK},
        "whole, eagle3": {**eagle3, **WHOLE},
        "parallel eagle3": {**drafting("eagle3", model=p_eagle, **at_once), **CHUNKS},
        "medusa": by["medusa"],
        "plain, limit": LIMIT,
        "eagle3, limit": {**eagle3, **LIMIT},
    }
    if find_spec("arctic_inference"):
        cases["suffix"] = {"speculative_config": SUFFIX}
    with_mtp = str(drafters.with_mtp(folder / "with_mtp"))
    mtp_cases = {
        "plain, with mtp": {},
        "stock, with mtp": STOCK,
        "mtp": by["mtp"],
        "mtp, chunks": {**by["mtp"], **CHUNKS},
        "stock, mtp": {**by["mtp"], **STOCK},
        "whole, mtp": {**by["mtp"], **WHOLE},
    }
    windows = random_gemma(folder / "windows")
    window_cases = {"plain, windows": {}, "eagle, windows": eagle}
    with engines.Engines() as process:
        found = {
            name: process.ask(target, arguments, FULL if "limit" in name else ())
            for name, arguments in cases.items()
        }
        found |= {name: process.ask(with_mtp, case) for name, case in mtp_cases.items()}
        found |= {name: process.ask(windows, case) for name, case in window_cases.items()}
    return found


@pytest.mark.supports("speculative decoding: {row}")
@pytest.mark.parametrize(
    ("row", "name", "plain"),
    [
        ("draft model", "draft model", "plain"),
        ("draft model", "draft model, chunks", "plain"),
        ("draft model", "one draft", "plain"),
        ("parallel drafting", "parallel draft model", "plain"),
        ("EAGLE", "eagle", "plain"),
        ("EAGLE", "eagle, windows", "plain, windows"),
        ("EAGLE-3", "eagle3", "plain"),
        ("EAGLE-3", "eagle3, chunks", "plain"),
        ("EAGLE-3", "eagle3, limit", "plain, limit"),
        ("parallel drafting", "parallel eagle3", "plain"),
        ("Medusa", "medusa", "plain"),
        ("MTP", "mtp", "plain, with mtp"),
        ("MTP", "mtp, chunks", "plain, with mtp"),
    ],
)
def test_drafts_change_no_answer(answers, row: str, name: str, plain: str) -> None:
    """Beside sliding windows, whose layers form other groups, vLLM pads the drafter's pages to the target's size."""
    assert answers[name].tokens == answers[plain].tokens
    assert 0 < answers[name].accepted < answers[name].drafted


@pytest.mark.parametrize(
    ("plain", "stock"), [("plain", "stock"), ("plain, with mtp", "stock, with mtp")]
)
def test_selection_decides_between_tokens(answers, plain: str, stock: str) -> None:
    """Otherwise equal answers would say little."""
    assert answers[plain].tokens != answers[stock].tokens


@pytest.mark.parametrize("name", ["draft model", "eagle", "eagle3", "medusa", "mtp"])
def test_layers_of_drafters_are_dense_and_not_counted(answers, name: str) -> None:
    """Each step of these engines has as many drafts as it may have, and each of its tokens is a row."""
    found = answers[name]
    steps, rest = divmod(found.drafted, DRAFTS)
    assert rest == 0
    rows = found.counters["sparse_rows"] + found.counters["dense_rows"]
    assert rows == SPARSE_LAYERS * (found.drafted + steps)
    assert found.counters["sparse_rows"] > 0


@pytest.mark.supports("speculative decoding: suffixes")
@needs_suffixes
def test_drafts_of_suffixes_change_no_answer(answers) -> None:
    """Every prompt is asked twice, so the drafts are earlier answers."""
    assert answers["suffix"].tokens == answers["plain"].tokens
    assert answers["suffix"].accepted > 0


@pytest.mark.supports("speculative decoding: {row}")
@pytest.mark.parametrize(
    ("row", "drafted_by", "plain"),
    [
        ("draft model", "draft model", "stock"),
        ("EAGLE-3", "eagle3", "stock"),
        ("MTP", "mtp", "stock, with mtp"),
    ],
)
def test_drafts_are_accepted_as_by_the_stock_backend(
    answers, row: str, drafted_by: str, plain: str
) -> None:
    """With budgets above every context."""
    stock, ours = answers[f"stock, {drafted_by}"], answers[f"whole, {drafted_by}"]
    assert (ours.drafted, ours.accepted) == (stock.drafted, stock.accepted)
    assert ours.tokens == stock.tokens == answers[plain].tokens
    assert ours.accepted > 0
