"""Real architectures through the real engine on a CPU, with the stock backend of the CPU as the oracle.

Everything runs in float32 and eagerly, so the two backends differ by rounding alone. Cached prompts are
compared with cached ones, and cold ones with cold ones: prefill over cached blocks rounds otherwise.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from agreement import agreed
from architectures import SERVED, SPARSE_LAYERS, VOCABULARY, digest
from checkpoints import write_model
from engines import COMMON, TOKENS, Engines, prompts

pytestmark = [pytest.mark.models, pytest.mark.slow]

PROMPTS = prompts(3, VOCABULARY)
REQUESTS = [{"prompt": prompt} for prompt in PROMPTS]
BLOCKS = {"num_gpu_blocks_override": 256}  # all prompts stay cached
STOCK = {"attention_backend": "CPU_ATTN", "additional_config": {}, **BLOCKS}
FEW = 64  # tokens, fewer than all prompts but the first have


def budget(tokens: int) -> dict:
    options = {"token_budget": tokens, "num_dense_layers": 1}
    return {**BLOCKS, "additional_config": {"adamas": options}}


@pytest.mark.supports("{name}", table="models")
@pytest.mark.parametrize("name", SERVED)
def test_a_model(engines: Engines, record_property, tmp_path: Path, name: str) -> None:
    """A budget above the contexts gives stock tokens; below it the sparse layers' rows are counted."""
    model = write_model(tmp_path, SERVED[name])
    stock = engines.ask(model, STOCK, REQUESTS)
    whole = engines.ask(model, budget(COMMON["max_model_len"]), REQUESTS)
    few = engines.ask(model, budget(FEW), REQUESTS)

    compared = sum(map(agreed, stock.answers, whole.answers))
    distinct = len({token for tokens in stock.tokens for token in tokens})
    assert compared >= 0.9 * sum(map(len, stock.tokens))
    assert distinct > 10  # else equal tokens would say little
    assert whole.counters["sparse_rows"] == 0

    layers = SPARSE_LAYERS.get(name, 3)
    long = [prompt for prompt in PROMPTS if len(prompt) > FEW]
    # The first token of an answer comes from the prefill. Each prompt is sent twice.
    assert few.counters["sparse_rows"] == 2 * len(long) * (TOKENS - 1) * layers
    if layers:  # attention decides: the same comparison notices tokens that were left out
        assert few.tokens != stock.tokens
    else:
        assert sum(map(agreed, stock.answers, few.answers)) == compared
    record_property("config", digest(SERVED[name]))
    record_property("compared", compared)
    record_property("tokens", sum(map(len, stock.tokens)))
    record_property("distinct", distinct)
    record_property("sparse_layers", layers)
    record_property("sparse_rows", few.counters["sparse_rows"])
