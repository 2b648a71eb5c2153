"""vLLM's OffloadingConnector and sleep mode with real engines on a Hopper GPU.

All engines of the file start at once. A prompt is answered, found in the GPU's cache, evicted by others and
loaded again: with the same pages byte for byte, and hence the same tokens and log probabilities.
"""

import json
from concurrent.futures import Future, ThreadPoolExecutor

import offloading
import pytest
import torch
from common import MODEL
from hopper import ON_HOPPER
from test_offload import prompts

from vllm_adamas.layout import token_bytes
from vllm_adamas.serving import compat

pytestmark = [*ON_HOPPER, pytest.mark.timeout(400)]

TOKENS, BLOCK = 1436, 64  #: of each prompt: full chunks of two blocks, and 28 tokens
BLOCKS = TOKENS // BLOCK  #: of a prompt that can be loaded
BLOCK_BYTES = 30 * 3 * BLOCK * token_bytes(64, torch.float16)  #: in 30 layers of 3 KV heads
COMMON = {
    "dtype": "float16",
    "num_gpu_blocks_override": 40,  # fewer than two prompts
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 1 << 30,
    "cudagraph_capture_sizes": [1, 2, 4],
    "additional_config": {"adamas": {"token_budget": 256}},
}
ROOM = 80 * BLOCK_BYTES  #: for the blocks of all prompts


def connector(**extra) -> dict:
    """Arguments that name the connector."""
    named = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    return {"kv_transfer_config": {**named, "kv_connector_extra_config": extra}}


V1_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
SIZE = {"kv_offloading_size": ROOM / (1 << 30)}
ENGINES = {  # arguments, environment
    "size": (SIZE, {}),
    "v1 runner": (SIZE, V1_RUNNER),
    "fp8, chunks": (
        {"kv_cache_dtype": "fp8", **connector(cpu_bytes_to_use=ROOM, blocks_per_chunk=2)},
        {},
    ),
    "files": (connector(spec_name="TieringOffloadingSpec", cpu_bytes_to_use=32 * BLOCK_BYTES), {}),
    "simple": (SIZE, {"VLLM_USE_SIMPLE_KV_OFFLOAD": "1"}),
    "sleep": ({"enable_sleep_mode": True, **SIZE}, {}),
}


class Said:
    """What each engine says; all run at once, in processes of their own."""

    def __init__(self, folder):
        self._folder = folder
        self._pool = ThreadPoolExecutor(len(ENGINES))
        self._runs: dict[str, Future] = {
            name: self._pool.submit(self._run, name) for name in ENGINES
        }

    def _run(self, name: str) -> list[dict]:
        arguments, env = json.loads(json.dumps(ENGINES[name]))
        if name == "files":
            extra = arguments["kv_transfer_config"]["kv_connector_extra_config"]
            extra["secondary_tiers"] = [{"type": "fs", "root_dir": str(self._folder / "pages")}]
        asked, *others = prompts(3, TOKENS)
        steps = [asked, asked, *others, asked]
        if name == "sleep":
            steps = [*steps, ["sleep", 1], *steps, ["sleep", 2], *steps]
        return offloading.ask(MODEL, {**COMMON, **arguments}, steps, env, self._folder / name)

    def log(self, name: str) -> str:
        return (self._folder / name).read_text()

    def __getitem__(self, name: str) -> list[dict]:
        return self._runs[name].result()

    def stop(self) -> None:
        self._pool.shutdown()


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    said = Said(tmp_path_factory.mktemp("offload"))
    yield said
    said.stop()


def check(steps: list[dict], **how) -> None:
    """The answers to the five prompts of :meth:`Said._run`."""
    _, held, *_, evicted, loaded = steps
    offloading.check_loaded(held, evicted, loaded, BLOCKS * BLOCK, **how)


@pytest.mark.supports("KV offloading to the memory of the host")
@pytest.mark.parametrize("name", ["size", "v1 runner", "fp8, chunks"])
def test_an_evicted_prompt_is_loaded_from_host_memory(said, name: str) -> None:
    check(said[name])
    assert said[name][-1]["from files"] == 0
    log = said.log(name)
    assert "Graph capturing finished" in log
    assert ("Using V2 Model Runner" in log) == (name != "v1 runner")


@pytest.mark.supports("KV offloading by SimpleCPUOffloadConnector")
def test_an_evicted_prompt_is_loaded_by_the_simple_connector(said) -> None:
    """Which counts the tokens that it loads, and no bytes."""
    check(said["simple"], counted=False)
    log = said.log("simple")
    assert f"Creating v1 connector with name: {compat.SIMPLE_OFFLOADING}" in log


@pytest.mark.supports("KV offloading to files")
def test_what_left_host_memory_is_loaded_from_files(said) -> None:
    check(said["files"])
    assert said["files"][-1]["from files"] >= BLOCKS * BLOCK_BYTES
    assert [step["tokens"] for step in said["files"]] == [step["tokens"] for step in said["size"]]


@pytest.mark.supports("KV offloading with sleep mode")
def test_pages_are_offloaded_after_sleep(said) -> None:
    """Level 1 forgets the cache, level 2 the weights as well; both forget what was offloaded."""
    steps = said["sleep"]
    rounds = [steps[start : start + 5] for start in range(0, len(steps), 5)]
    assert len(rounds) == 3
    for answered in rounds:
        assert (answered[0]["gpu"], answered[0]["loaded"]) == (0, 0)
        check(answered)
        tokens = [step["tokens"] for step in answered]
        assert tokens == [step["tokens"] for step in rounds[0]]
    assert rounds[0][0]["tokens"] == said["size"][0]["tokens"]
