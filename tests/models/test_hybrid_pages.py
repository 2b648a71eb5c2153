"""Pages of models with recurrent layers, as vLLM computes them before it allocates a KV cache.

The model is built on the meta device, where published sizes cost nothing. vLLM's own functions choose the block
size, pad the recurrent states, group the layers and lay out the allocation, as on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from architectures import HYBRIDS
from checkpoints import write_config

from vllm_adamas.dtypes import page_dtype
from vllm_adamas.layout import PageLayout
from vllm_adamas.serving import checks, compat
from vllm_adamas.serving.plugin import register

BLOCKS = 512  #: 8192 tokens and their states, whatever a block holds


@pytest.fixture(scope="module")
def parallel_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One rank, which layers ask for their share of the heads."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    group = tmp_path_factory.mktemp("ranks") / "group"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "excepthook", sys.excepthook)  # torch's names the rank from here on
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(1, 0, f"file://{group}", 0, "gloo")
            initialize_model_parallel(backend="gloo")
        yield
        cleanup_dist_env_and_memory()


@pytest.mark.usefixtures("parallel_state")
@pytest.mark.parametrize("states", ["auto", "float32"])
@pytest.mark.parametrize("kind", ["auto", "fp8"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_model(monkeypatch, tmp_path: Path, name: str, kind: str, states: str) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms.interface import Platform
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend
    from vllm.v1.worker.utils import allocate_kv_cache

    if "qwen3_5" in HYBRIDS[name]["model_type"] and not find_spec("torchvision"):
        pytest.skip("vLLM's Qwen3.5 needs torchvision")
    register()
    monkeypatch.setattr(compat, "cpu_prefills_fp8", lambda: True)
    config = EngineArgs(
        str(write_config(tmp_path, HYBRIDS[name])),
        attention_backend="adamas",
        dtype="bfloat16",
        kv_cache_dtype=kind,
        max_model_len=8192,
        num_gpu_blocks_override=BLOCKS,
        enforce_eager=True,
        skip_tokenizer_init=True,
    ).create_engine_config()
    # From here on as on a GPU, which has other multiples of blocks and states in the model's own dtype.
    monkeypatch.setattr(checks, "block_size_multiple", lambda: 16)
    config.cache_config.mamba_ssm_cache_dtype = states
    with set_current_vllm_config(config), torch.device("meta"):
        initialize_model(config)
        Platform.update_block_size_for_backend(config)
        specs = get_kv_cache_spec(config)
        layout = resolve_kv_cache_layout(config, [["LBHNC"]], specs.values())
        (planned,) = get_kv_cache_configs(config, [specs], [1 << 40])
        *_, sizes = init_attn_backend(planned, config, torch.device("meta"))
        caches = allocate_kv_cache(planned, torch.device("meta"), layout, sizes)

    attention = {n: spec for n, spec in specs.items() if isinstance(spec, FullAttentionSpec)}
    recurrent = [spec for spec in specs.values() if isinstance(spec, MambaSpec)]
    assert attention and recurrent
    (block,) = {spec.block_size for spec in attention.values()}
    assert {spec.page_size_bytes for spec in specs.values()} == {
        spec.unpadded_page_size_bytes for spec in attention.values()
    }  # that of attention, where states fit
    assert all(spec.state_content_size_bytes <= spec.page_size_bytes for spec in recurrent)
    for name, spec in attention.items():
        page = PageLayout(spec.head_size, block, page_dtype(kind, torch.bfloat16))
        page.check(caches[name])
        assert caches[name].shape[:2] == (BLOCKS, spec.num_kv_heads)  # no block is split

    # A block belongs to one group at a time: no page may reach into that of another block.
    owners: dict[int, int] = {}
    (page_bytes,) = {spec.page_size_bytes for spec in specs.values()}
    for cache in caches.values():
        used = cache[0].numel() * cache.element_size()
        for number in range(BLOCKS):
            start = cache[number].storage_offset() * cache.element_size()
            assert start % page_bytes == 0 and used <= page_bytes
            assert owners.setdefault(start, number) == number
