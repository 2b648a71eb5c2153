"""Speculative decoding on a Hopper GPU by drafters with layers of their own, and by others that run there alone.

Models with drafters are small and random, and made so that the drafters are sometimes right: see ``drafters.py``. N-grams
recur in the texts of the demonstration model. All servers stay up; those that the chosen tests are parametrized with
start at once.
"""

import json

import drafters
import engines
import extension
import pytest
from common import MODEL
from hopper import ON_HOPPER
from test_audit import audited
from test_cuda_engine import PROMPTS as TEXTS
from test_cuda_engine import (
    SPECS,
    SPECULATED,
    V1_RUNNER,
    Host,
    assert_same_up_to_rounding,
    counters,
    moved,
)
from test_serve import complete, together
from test_speculation import SUFFIX, needs_suffixes

from vllm_adamas.serving.launch import Server

pytestmark = [*ON_HOPPER, pytest.mark.timeout(600)]

TOKENS = 40
LAYERS = 4  #: of the targets
WHOLE = {"token_budget": 1_000_000, "num_dense_layers": 1}
SPARSE = {"token_budget": 256, "num_dense_layers": 1, "audit_interval": 3}
PROMPTS = [*engines.prompts(), engines.prompts()[3] * 4]  # up to 2,800 tokens


def drafting(config: dict) -> str:
    """The arguments of a server that drafts."""
    return f"--speculative-config {json.dumps(config, separators=(',', ':'))} --max-num-seqs 4"


@pytest.fixture(scope="module")
def host(request, tmp_path_factory):
    """The servers by name."""
    folder = tmp_path_factory.mktemp("models")
    target = drafters.target(folder / "target")
    by = {name: drafting(config) for name, config in drafters.methods(folder, target).items()}
    lookups = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
    by_ngrams = drafting(drafters.drafting("ngram_gpu", **lookups))
    specs = {  # backend, its options, further arguments, environment, the model if it is another
        "stock": ("flash_attn", None, "", {}),
        "sparse": ("adamas", SPARSE, "", {}),
        "stock eagle3": ("flash_attn", None, by["eagle3"], {}),
        "whole eagle3": ("adamas", WHOLE, by["eagle3"], {}),
        "eagle3": ("adamas", SPARSE, by["eagle3"], {}),
        "v1 eagle3": ("adamas", SPARSE, by["eagle3"], V1_RUNNER),
        "eagle": ("adamas", SPARSE, by["eagle"], {}),
        "v1 medusa": ("adamas", SPARSE, by["medusa"], {}),
        "v1 draft model": ("adamas", SPARSE, by["draft model"], V1_RUNNER),
        "v1 suffix": ("adamas", SPARSE, drafting(SUFFIX), {}),
    }
    budget = SPECS["sparse"][1]  # of the demonstration model
    specs |= {
        "demonstration": ("adamas", budget, "", {}, MODEL),
        "ngram_gpu": ("adamas", budget, by_ngrams, {}, MODEL),
        "v1 ngram_gpu": ("adamas", budget, by_ngrams, V1_RUNNER, MODEL),
    }
    with_mtp = drafters.with_mtp(folder / "with_mtp")
    specs |= {
        "stock mtp": ("flash_attn", None, by["mtp"], {}, with_mtp),
        "whole mtp": ("adamas", WHOLE, by["mtp"], {}, with_mtp),
        "sparse, with mtp": ("adamas", SPARSE, "", {}, with_mtp),
        "mtp": ("adamas", SPARSE, by["mtp"], {}, with_mtp),
    }
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    named = {value for params in calls for value in params.values() if isinstance(value, str)}
    host = Host(specs, target, tmp_path_factory.mktemp("servers"), named)
    yield host
    host.stop()


def steps_of(server: Server, prompts) -> list[dict]:
    """Tokens by their ids, since texts of random tokens may be equal."""
    how = {"logprobs": 2, "return_tokens_as_token_ids": True}
    return [complete(server, prompt, TOKENS, **how)["logprobs"] for prompt in prompts]


def drafts_of(server: Server, call) -> tuple[float, float]:
    """Tokens that a call drafted, and how many were accepted."""
    before = server.metrics()
    call()
    now = server.metrics()
    drafted, accepted = (now[name] - before[name] for name in SPECULATED)
    print(f"{accepted:.0f} of {drafted:.0f} drafted tokens were accepted")
    return drafted, accepted


@pytest.mark.supports("speculative decoding: {row}")
@pytest.mark.parametrize(
    ("row", "plain", "name"),
    [
        ("EAGLE", "sparse", "eagle"),
        ("EAGLE-3", "sparse", "eagle3"),
        ("EAGLE-3", "sparse", "v1 eagle3"),
        ("EAGLE-3", "stock", "whole eagle3"),
        ("draft model", "sparse", "v1 draft model"),
        ("Medusa", "sparse", "v1 medusa"),
        ("n-grams on the GPU", "demonstration", "ngram_gpu"),
        ("n-grams on the GPU", "demonstration", "v1 ngram_gpu"),
        ("MTP", "sparse, with mtp", "mtp"),
        pytest.param("suffixes", "sparse", "v1 suffix", marks=needs_suffixes),
    ],
)
def test_drafts_change_no_answer(host, row: str, plain: str, name: str) -> None:
    """One request after another, and at once in steps of different numbers of rows."""
    server, log = host[name], host[name].log()
    assert ("Using V2 Model Runner" in log) == ("v1" not in name)
    assert "Graph capturing finished" in log and "FULL_AND_PIECEWISE" in log
    prompts = TEXTS if plain == "demonstration" else PROMPTS
    expected = steps_of(host[plain], prompts)

    def ask() -> None:
        assert_same_up_to_rounding(expected, steps_of(server, prompts), share=0.6)
        crowd = together([lambda p=p: steps_of(server, [p])[0] for p in prompts])
        assert_same_up_to_rounding(expected, crowd, share=0.6)

    drafted, accepted = drafts_of(server, ask)
    assert 0 < accepted < drafted
    if plain != "stock":
        assert moved(server, ask)[0] > 0  # sparse rows


@pytest.mark.supports("speculative decoding: {row}")
@pytest.mark.parametrize(
    ("row", "stock", "whole"),
    [("EAGLE-3", "stock eagle3", "whole eagle3"), ("MTP", "stock mtp", "whole mtp")],
)
def test_drafts_are_accepted_as_by_the_stock_backend(
    host, row: str, stock: str, whole: str
) -> None:
    """With a budget above every context, up to the tokens that rounding decides."""
    found, rates = [], []
    for name in (stock, whole):
        server = host[name]
        drafted, accepted = drafts_of(server, lambda s=server: found.append(steps_of(s, PROMPTS)))
        rates.append(accepted / drafted)
    assert_same_up_to_rounding(*found, share=0.6)
    assert rates[0] > 0.1
    assert abs(rates[0] - rates[1]) < 0.05, rates


@pytest.mark.parametrize("name", ["eagle3", "mtp"])
def test_freed_blocks_may_hold_anything(host, name: str) -> None:
    """The drafter's pages lie in the same pool, and are poisoned as well."""
    server = host[name]
    before = steps_of(server, PROMPTS)
    # The audit reads an audited step's pages before the next one; these steps decode nothing sparse.
    counters(server)
    extension.poison(server, LAYERS + 1)
    assert_same_up_to_rounding(before, steps_of(server, PROMPTS), share=0.6)


@pytest.mark.supports("audit")
@pytest.mark.parametrize("name", ["eagle3", "v1 eagle3"])
def test_audited_rows_agree_with_dense_attention(host, name: str) -> None:
    """A step's context lengths on the host count drafts that the target may have rejected."""
    server = host[name]
    steps_of(server, PROMPTS)
    counters(server)
    for group in audited(server).values():
        assert group["rows"] > 0
        assert 0.0 < group["output_error"] < 1.0
        assert 0.0 < group["kept_mass"] < group["oracle_mass"] <= 1.001
