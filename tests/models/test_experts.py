"""Experts that are split over GPUs, with FLASH_ATTN as the oracle. vLLM's CPU kernel is not told which experts a rank has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from agreement import agreed
from architectures import SERVED
from checkpoints import write_model
from engines import COMMON, TOKENS, Engines
from test_served import FEW, FLASH, PROMPTS, REQUESTS, budget

pytestmark = [pytest.mark.models, pytest.mark.gpu, pytest.mark.timeout(400)]

SPLIT = {
    "tensor_parallel_size": 2,
    "enable_expert_parallel": True,
    "dtype": "float16",
    "gpu_memory_utilization": 0.2,
}


@pytest.mark.supports("expert parallelism")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_experts_may_be_split_over_two_gpus(engines: Engines, tmp_path: Path) -> None:
    """Every token takes all experts, so rounding chooses no others. Below the contexts every row is counted once."""
    experts = {"num_experts": 4, "num_experts_per_tok": 4}
    model = write_model(tmp_path, {**SERVED["Qwen3-30B-A3B"], **experts})
    cases = {"stock": FLASH, "whole": budget(COMMON["max_model_len"]), "few": budget(FEW)}
    said = {
        name: engines.ask(model, {**arguments, **SPLIT}, REQUESTS)
        for name, arguments in cases.items()
    }
    pairs = zip(said["stock"].answers, said["whole"].answers, strict=True)
    compared = sum(agreed(*pair, near_tie=0.1) for pair in pairs)
    assert compared > 0.3 * sum(map(len, said["stock"].tokens))
    assert said["whole"].counters["sparse_rows"] == 0
    long = [prompt for prompt in PROMPTS if len(prompt) > FEW]
    layers = 3
    assert said["few"].counters["sparse_rows"] == 2 * len(long) * (TOKENS - 1) * layers
