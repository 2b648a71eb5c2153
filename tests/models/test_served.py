"""Real architectures through the real engine, with the device's stock backend as the oracle.

On CPUs everything runs in float32 and eagerly, so the two backends differ by rounding alone. Cached prompts are
compared with cached ones, and cold ones with cold ones: prefill over cached blocks rounds otherwise. On GPUs our
engine replays CUDA graphs where vLLM captures them, and the oracle's is eager.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from agreement import NEAR_TIE, agreed
from architectures import (
    ALL_EXPERTS,
    LARGE_HEADS,
    SERVED,
    SPARSE_LAYERS,
    VOCABULARY,
    WITHOUT_CUDA,
    digest,
)
from checkpoints import write_model
from engines import COMMON, TOKENS, Engine, Engines, prompts

pytestmark = pytest.mark.models

PROMPTS = prompts(3, VOCABULARY)
REQUESTS = [{"prompt": prompt} for prompt in PROMPTS]
BLOCKS = {"num_gpu_blocks_override": 256}  # all prompts stay cached
STOCK = {"attention_backend": "CPU_ATTN", "additional_config": {}, **BLOCKS}
FEW = 64  # tokens, fewer than all prompts but the first have


def budget(tokens: int, **others) -> dict:
    options = {"token_budget": tokens, "num_dense_layers": 1, **others}
    return {**BLOCKS, "additional_config": {"adamas": options}}


def check_counted(few: Engine, name: str) -> int:
    """Below the contexts every row of the sparse layers is counted once; returns the number of these layers."""
    layers = SPARSE_LAYERS.get(name, 3)
    long = [prompt for prompt in PROMPTS if len(prompt) > FEW]
    # The first token of an answer comes from the prefill. Each prompt is sent twice.
    assert few.counters["sparse_rows"] == 2 * len(long) * (TOKENS - 1) * layers
    return layers


@pytest.mark.supports("{name}", table="models")
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM serves on the GPU")
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

    layers = check_counted(few, name)
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


#: Models that vLLM does not compute in float16.
BFLOAT16 = ("gemma", "glm4", "gpt_oss")
EXPERTS = "vllm._moe_C_stable_libtorch"  #: vLLM's kernels for experts
FLASH = {"attention_backend": "FLASH_ATTN", "additional_config": {}}  #: the stock backend of GPUs
ON_GPU = {
    "max_num_batched_tokens": 512,  # cuts the longest prompts
    "enable_prefix_caching": False,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 1 << 28,
}
GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8],
    },
}


#: Features that a model has beside its row.
FEATURES = {"Gemma-2-9B": "soft-capped logits", "gpt-oss-20B": "learned sinks"}


def dtype_on_gpus(kind: str) -> str:
    return "bfloat16" if kind.startswith(BFLOAT16) else "float16"


def on_gpus() -> list:
    """The models of the test below, as its parameters."""
    names = [name for name in SERVED if name not in LARGE_HEADS]
    marks = {
        name: pytest.mark.supports(FEATURES[name]) if name in FEATURES else () for name in names
    }
    return [pytest.param(name, marks=marks[name]) for name in names]


@pytest.mark.supports("{name}", table="models")
@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", on_gpus())
def test_a_model_on_a_gpu(engines: Engines, record_property, tmp_path: Path, name: str) -> None:
    """The same up to the first near tie of an answer, and in CUDA graphs."""
    if name in ALL_EXPERTS and not find_spec(EXPERTS):
        pytest.skip(f"this vLLM has no kernels for experts ({EXPERTS})")
    config = {**SERVED[name], **ALL_EXPERTS.get(name, {})}
    model, dtype = write_model(tmp_path, config), dtype_on_gpus(config["model_type"])
    common = {**ON_GPU, "dtype": dtype}
    stock = engines.ask(model, {**FLASH, **common}, REQUESTS)
    kernels = {"kernels": "triton"} if name in WITHOUT_CUDA else {}
    whole, few = (
        engines.ask(model, {**budget(tokens, **kernels), **common, **GRAPHS}, REQUESTS)
        for tokens in (COMMON["max_model_len"], FEW)
    )

    near_tie = max(0.1, NEAR_TIE[dtype])
    pairs = list(zip(stock.answers, whole.answers, strict=True))
    compared = sum(agreed(*pair, near_tie=near_tie) for pair in pairs)
    total = sum(map(len, stock.tokens))
    distinct = len({token for tokens in stock.tokens for token in tokens})
    print(f"{name}: {compared} of {total} tokens, {distinct} distinct")
    assert compared > 0.3 * total
    assert distinct > 10
    assert whole.counters["sparse_rows"] == 0
    record_property("config", digest(config))
    record_property("compared", compared)
    record_property("tokens", total)
    record_property("sparse_layers", check_counted(few, name))
