"""vLLM's OffloadingConnector on pages with signatures, where no GPU is: see tests/offloading.py."""

from dataclasses import replace
from pathlib import Path
from random import Random

import offloading
import pytest
import torch
from common import MODEL, random_llama
from vllm.config import KVTransferConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, SlidingWindowSpec

from vllm_adamas.layout import PageLayout
from vllm_adamas.serving.backend import AdamasBackend
from vllm_adamas.serving.plugin import register

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="test_cuda_offload.py tests the real one"
)

BLOCKS, LAYERS = 12, 3
MOVED = [1, 5, 3, 7], [2, 0, 6, 4]  #: blocks that are stored, and those that they are loaded into


@pytest.fixture(scope="module")
def vllm_config():
    """A configuration with the connector, which vLLM would refuse on a CPU, and the layout that it resolves."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.utils import (
        get_supported_kv_cache_layouts,
        resolve_kv_cache_layout,
    )

    register()
    args = {"attention_backend": "adamas", "enforce_eager": True}
    config = EngineArgs(model=str(MODEL), **args).create_engine_config()
    config.kv_transfer_config = KVTransferConfig("OffloadingConnector", kv_role="kv_both")
    layouts = get_supported_kv_cache_layouts([AdamasBackend])
    resolve_kv_cache_layout(config, [[layout.name for layout in layouts]])
    return config


class Pool:
    """The pages of some groups of layers, as vLLM allocates them, with random bytes in each.

    Args:
        specs: of the groups, each with ``LAYERS`` layers; as the backend's hook has made them.
        extra: ``kv_connector_extra_config``.
    """

    def __init__(self, vllm_config, specs: list, extra: dict):
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import (
            build_offloading_config,
        )
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import (
            OffloadingConnectorWorker,
        )
        from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
        from vllm.v1.worker.utils import allocate_kv_cache

        self.specs = specs
        vllm_config.cache_config.block_size = specs[0].block_size
        groups = [
            KVCacheGroupSpec([f"layers.{LAYERS * g + n}" for n in range(LAYERS)], spec)
            for g, spec in enumerate(specs)
        ]
        memory = BLOCKS * LAYERS * specs[0].page_size_bytes
        config = get_kv_cache_config_from_groups(vllm_config, groups, memory)
        layout = vllm_config.cache_config.get_resolved_kv_cache_layout()
        sizes = [spec.block_size for spec in specs]
        self.pages = allocate_kv_cache(config, torch.device("cpu"), layout, sizes)
        memory = self.pages["layers.0"].untyped_storage()
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(memory)
        self.bytes.copy_(torch.randint(0, 256, self.bytes.shape, dtype=torch.uint8))
        vllm_config.kv_transfer_config.kv_connector_extra_config = extra
        spec = offloading.HostSpec(build_offloading_config(vllm_config, config))
        self.connector = OffloadingConnectorWorker(spec, vllm_config, config)
        self.connector.register_kv_caches(self.pages)

    def runs(self) -> list[torch.Tensor]:
        """The bytes of each layer's blocks, ``[BLOCKS, Hkv, bytes]``, as the kernels address them."""
        found = []
        for number, pages in enumerate(self.pages.values()):
            spec = self.specs[number // LAYERS]
            layout = PageLayout(spec.head_size, spec.block_size, spec.dtype)
            found.append(layout.runs(pages))
        return found

    def move(self, group: int) -> None:
        """Stores blocks of a group and loads them into others."""
        from vllm.v1.kv_offload.base import GPULoadStoreSpec
        from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

        sizes = [len(MOVED[0]) * (number == group) for number in range(len(self.specs))]
        first = [0] * len(sizes)
        stored, loaded = (GPULoadStoreSpec(blocks, sizes, first) for blocks in MOVED)
        chunks = len(MOVED[0]) // self.connector.spec.blocks_per_chunk
        host = CPULoadStoreSpec(list(range(1, 1 + chunks)))
        worker = self.connector.worker
        assert worker.submit_store(0, stored, host)
        for runs in self.runs()[group * LAYERS : (group + 1) * LAYERS]:
            runs[MOVED[0]] = 0xFF  # as NaN, in other requests' pages
        assert worker.submit_load(1, host, loaded)
        assert [result.job_id for result in worker.get_finished()] == [0, 1]


def page_spec(kind=FullAttentionSpec, heads=3, size=64, block=64, dtype=torch.bfloat16, **more):
    shape = {"num_kv_heads": heads, "head_size": size, "block_size": block, "dtype": dtype}
    return AdamasBackend.customize_spec(kind(**shape, **more))


SLIDING = {"kind": SlidingWindowSpec, "sliding_window": 256}
POOLS = {  # groups of layers, the connector's options
    "bf16": ([page_spec()], {}),
    "fp32, one head": ([page_spec(heads=1, dtype=torch.float32)], {}),
    "fp8, head size 96, blocks of 32": ([page_spec(size=96, block=32, dtype=torch.uint8)], {}),
    "two blocks a chunk": ([page_spec()], {"blocks_per_chunk": 2}),
    "four, by their tokens": ([page_spec(block=16, size=128)], {"block_size": 64}),
    "windows": ([page_spec(), page_spec(**SLIDING)], {"blocks_per_chunk": 2}),
}


@pytest.mark.parametrize(("specs", "options"), POOLS.values(), ids=POOLS)
def test_signatures_travel_with_their_blocks(vllm_config, monkeypatch, specs, options) -> None:
    """Every byte of a block is that of the stored one, and no other block changes."""
    offloading.pretend(monkeypatch.setattr)
    pool = Pool(vllm_config, specs, {"cpu_bytes_to_use": 1 << 24, **options})
    assert pool.bytes.numel() == BLOCKS * LAYERS * specs[0].page_size_bytes
    for group in range(len(specs)):
        layers = slice(group * LAYERS, (group + 1) * LAYERS)
        before = [runs.clone() for runs in pool.runs()[layers]]
        pool.move(group)
        for old, new in zip(before, pool.runs()[layers], strict=True):
            old[MOVED[1]], old[MOVED[0]] = old[MOVED[0]], 0xFF
            assert torch.equal(new, old)


def test_padded_pages_travel_whole(vllm_config, monkeypatch) -> None:
    """Where a pool has layers of other kinds, such as states, blocks may be further apart than pages are long."""
    offloading.pretend(monkeypatch.setattr)
    spec = page_spec()
    spec = replace(spec, page_size_padded=spec.page_size_bytes + 4096)
    pool = Pool(vllm_config, [spec], {"cpu_bytes_to_use": 1 << 24})
    before = [runs.clone() for runs in pool.runs()]
    pool.move(0)
    for old, new in zip(before, pool.runs(), strict=True):
        assert torch.equal(new[MOVED[1]], old[MOVED[0]])


def test_pages_have_no_canonical_form(vllm_config, monkeypatch) -> None:
    """vLLM knows it of pages of K and V; ours it would place whole, for servers of the same ranks alone."""
    offloading.pretend(monkeypatch.setattr)
    pool = Pool(vllm_config, [page_spec()], {"cpu_bytes_to_use": 1 << 24})
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.canonical_mapping import (
        derive_canonical_mappings,
    )

    found = derive_canonical_mappings(vllm_config, pool.connector.kv_cache_config, pool.pages)
    assert len(found) == LAYERS
    for mapping in found.values():
        assert not mapping.parallelism_agnostic
        assert [run.fragment_size for run in mapping.runs] == [pool.specs[0].page_size_bytes]


def test_the_connector_asks_for_the_layout_of_the_pages(vllm_config) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (
        OffloadingConnector,
    )

    wanted = OffloadingConnector.get_required_kvcache_layout(vllm_config)
    (layout,) = AdamasBackend.supported_kv_cache_layouts()
    assert wanted == layout.name == vllm_config.cache_config.kv_cache_layout


def prompts(count: int, tokens: int) -> list[list[int]]:
    rng = Random(0)
    return [[rng.randrange(100, 40000) for _ in range(tokens)] for _ in range(count)]


BLOCK_BYTES = 4 * 4 * 64 * 532  #: of the Llama in float32: layers, KV heads, bytes of a token
ENGINES = {  # the spec and its options
    "memory": ("HostSpec", {"cpu_bytes_to_use": 40 * BLOCK_BYTES}),
    "chunks": ("HostSpec", {"cpu_bytes_to_use": 40 * BLOCK_BYTES, "blocks_per_chunk": 2}),
    "files": ("HostTieringSpec", {"cpu_bytes_to_use": 15 * BLOCK_BYTES}),
}


def ask(model: Path, folder: Path, name: str, steps: list, **options) -> list[dict]:
    """What an engine says that keeps one prompt and a half, with files below the folder.

    Args:
        options: of the backend.
    """
    spec, room = ENGINES[name]
    extra = {"spec_name": spec, "spec_module_path": "offloading", **room}
    if name == "files":
        extra["secondary_tiers"] = [{"type": "fs", "root_dir": str(folder / "pages")}]
    named = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    arguments = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "num_gpu_blocks_override": 18,
        "additional_config": {"adamas": {"token_budget": 128, "num_dense_layers": 1, **options}},
        "kv_transfer_config": {**named, "kv_connector_extra_config": extra},
    }
    return offloading.ask(model, arguments, steps, {}, folder / "log")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return random_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ENGINES)
def test_an_evicted_prompt_is_loaded(llama, tmp_path, name: str) -> None:
    asked, *others = prompts(3, 700)
    said = ask(llama, tmp_path, name, [asked, asked, *others, asked])
    offloading.check_loaded(said[1], said[-2], said[-1], 640)
    assert said[-1]["bytes"] == 10 * BLOCK_BYTES
    assert said[-1]["from files"] >= (10 * BLOCK_BYTES if name == "files" else 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_files_are_read_by_servers_that_code_keys_alike(llama, tmp_path) -> None:
    """What else vLLM names the files by is the same in all three servers."""
    (prompt,) = prompts(1, 700)
    loaded = [
        ask(llama, tmp_path, "files", [prompt, *flush], **options)[0]["loaded"]
        for flush, options in (
            ([prompt], {}),
            ([], {"token_budget": 256, "layer_budgets": {"2": 64}}),
            ([], {"thresholds": 0.5}),
        )
    ]
    assert loaded == [0, 640, 0]
