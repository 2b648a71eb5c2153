"""Models with recurrent layers through the real engine, with vLLM's stock backend as the oracle.

Two engines a model. Some prompts lie within the budget of ours and fill several of the large blocks that vLLM chooses
for these models; others lie beyond it. On GPUs our engine replays CUDA graphs, and the oracle's is eager.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import torch
from agreement import agreed
from architectures import HYBRIDS, VOCABULARY
from checkpoints import write_model
from engines import TOKENS, Engines
from test_served import EXPERTS, GRAPHS

pytestmark = pytest.mark.models


class Host(NamedTuple):
    """What is asked on a device.

    Args:
        near_tie: nats between the best two tokens below which rounding may swap them.
        within, beyond: lengths of prompts within and beyond the budget.
        common, stock, ours: arguments of the engines.
    """

    dtype: str
    near_tie: float
    budget: int
    within: tuple[int, ...]
    beyond: tuple[int, ...]
    common: dict
    stock: dict
    ours: dict


GPU = Host(
    dtype="float16",
    near_tie=0.1,  # backends cut prompts at the ends of their own blocks, and states round otherwise
    budget=2048,
    within=(5, 300, 700, 1990),
    beyond=(2100, 3300),
    common={
        "max_model_len": 4096,
        "kv_cache_memory_bytes": 1 << 30,
        "gpu_memory_utilization": 0.2,
        "mamba_ssm_cache_dtype": "float32",
        "gdn_prefill_backend": "triton",  # FlashInfer's is compiled at its first use, for minutes
    },
    stock={"attention_backend": "FLASH_ATTN"},
    ours=GRAPHS,
)
CPU = Host(
    dtype="float32",
    near_tie=1e-3,
    budget=512,
    within=(5, 100, 480),
    beyond=(600, 700),
    # vLLM's Mamba-2 kernel for CPUs fails with prefix caching.
    common={"num_gpu_blocks_override": 64, "enable_prefix_caching": False},
    stock={"attention_backend": "CPU_ATTN"},
    ours={},
)

#: Attention layers, where there is another number than one.
SPARSE_LAYERS = {"Qwen3-Next-80B-A3B": 2}


def check(engines: Engines, folder: Path, name: str, host: Host) -> None:
    """Stock tokens within the budget; beyond it each token of each attention layer is a sparse row."""
    model, rng = write_model(folder, HYBRIDS[name]), Random(0)
    requests = [
        {"prompt": [rng.randrange(3, VOCABULARY) for _ in range(length)]}
        for length in (*host.within, *host.beyond)
    ]
    common = {"dtype": host.dtype, "block_size": None, **host.common}
    stock = engines.ask(model, {**common, "additional_config": {}, **host.stock}, requests)
    options = {"additional_config": {"adamas": {"token_budget": host.budget}}}
    ours = engines.ask(model, {**common, **options, **host.ours}, requests)

    pairs = list(zip(stock.answers, ours.answers, strict=True))
    # Each prompt is sent twice: alone, and beside the others.
    within = [pair for n, pair in enumerate(pairs) if n % len(requests) < len(host.within)]
    compared = sum(agreed(*pair, near_tie=host.near_tie) for pair in within)
    distinct = {token for one, _ in within for token in one.tokens}
    print(f"{name}: {compared} of {TOKENS * len(within)} tokens, {len(distinct)} distinct")
    assert compared > 0.3 * TOKENS * len(within)
    assert len(distinct) > 10  # else equal tokens would say little
    # The first token of an answer comes from the prefill.
    rows = 2 * len(host.beyond) * (TOKENS - 1) * SPARSE_LAYERS.get(name, 1)
    assert ours.counters["sparse_rows"] == rows


@pytest.mark.supports("hybrid models: {name}")
@pytest.mark.gpu
@pytest.mark.timeout(400)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_model(engines: Engines, tmp_path: Path, name: str) -> None:
    if "qwen3_5" in HYBRIDS[name]["model_type"] and not find_spec("torchvision"):
        pytest.skip("vLLM's Qwen3.5 needs torchvision")
    if any("experts" in key for key in HYBRIDS[name]) and not find_spec(EXPERTS):
        pytest.skip(f"this vLLM has no kernels for experts ({EXPERTS})")
    check(engines, tmp_path, name, GPU)


@pytest.mark.supports("hybrid models: {name}")
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM serves on the GPU")
@pytest.mark.parametrize("name", ["Granite-4.0-H-Tiny", "Nemotron-H-8B"])
def test_mamba_2_on_a_cpu(engines: Engines, tmp_path: Path, name: str) -> None:
    """vLLM's other recurrent layers need bfloat16 on CPUs, are slow there or have no kernel."""
    check(engines, tmp_path, name, CPU)
