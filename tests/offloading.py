"""An engine whose KV cache is offloaded by vLLM, in a process of its own, and what it says of its pages.

vLLM offloads from GPUs alone. For hosts without one this module has specs whose GPU is host memory: all
code of vLLM runs, from the connector to the descriptors of a copy, and only the copy itself is another.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import torch
from common import Changed

COMMON = {
    "attention_backend": "adamas",
    "block_size": 64,
    "max_model_len": 2048,
    "max_num_seqs": 4,
    "disable_log_stats": False,
    "skip_tokenizer_init": True,
}
METRICS = {  # of vLLM
    "gpu": "vllm:prefix_cache_hits",
    "loaded": "vllm:external_prefix_cache_hits",
    "bytes": "vllm:kv_offload_load_bytes",
    "from files": "vllm:kv_offload_tiering_read_bytes",
}
TOKENS = 32


class OnHost(torch.Tensor):
    """A tensor that takes itself for one of a GPU."""

    is_cuda = True


class Stream:
    """A stream or an event of work that is done when it is submitted."""

    def __init__(self, enable_timing: bool = False): ...
    def record(self, stream: Stream) -> None: ...
    def wait_stream(self, stream: Stream) -> None: ...
    def wait_event(self, event: Stream) -> None: ...
    def synchronize(self) -> None: ...
    def __enter__(self) -> Stream: ...
    def __exit__(self, *error) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Stream) -> float:
        return 1.0


def copy(sources, targets, sizes, is_src_access_order_any: bool = False) -> None:
    """``swap_blocks_batch`` between addresses of the host."""
    for source, target, size in zip(
        sources.tolist(), targets.tolist(), sizes.tolist(), strict=True
    ):
        ctypes.memmove(target, source, size)


def pretend(patch=setattr) -> None:
    """Makes vLLM's copies of pages work in the memory of the host.

    Args:
        patch: sets an attribute of a module.
    """
    from vllm.v1.kv_offload.cpu import gpu_worker

    stream = {"Stream": Stream, "current_stream": Stream, "stream": lambda stream: stream}
    patch(gpu_worker, "current_platform", Changed(gpu_worker.current_platform, **stream))
    patch(gpu_worker, "torch", Changed(torch, Event=Stream))
    patch(gpu_worker, "ops", Changed(gpu_worker.ops, swap_blocks_batch=copy))


def __getattr__(name: str):
    """``HostSpec`` and ``HostTieringSpec``, once vLLM is wanted: vLLM's specs for pages of the host."""
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
    from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

    bases = {"HostSpec": CPUOffloadingSpec, "HostTieringSpec": TieringOffloadingSpec}
    if name not in bases:
        raise AttributeError(name)

    def get_worker(self, kv_caches):
        if self._worker is None:
            for cache in kv_caches.tensors:
                cache.tensor = cache.tensor.as_subclass(OnHost)
            self._worker = self.create_worker(kv_caches)
        return self._worker

    return type(name, (bases[name],), {"get_worker": get_worker})


def ask(model: Path, arguments: dict, steps: list, env: dict[str, str], log: Path) -> list[dict]:
    """What an engine in a new process says after each step.

    Args:
        arguments: of ``vllm.LLM``, on top of ``COMMON``.
        steps: a prompt of token ids, or ``["sleep", level]``.
        env: of the process, on top of this one's.
        log: takes the output of vLLM.

    Returns:
        for each prompt its ``tokens`` and their ``logprobs``, by how much it raised ``METRICS`` and the counter
        ``sparse``, and ``pages``: a digest of every cached block by vLLM's hash of its tokens.

    Raises:
        AssertionError: the engine failed; the message is the end of its log.
    """
    asked = json.dumps([str(model), arguments, steps])  # longer than an argument may be
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        **env,
    }
    with log.open("w") as errors:
        done = subprocess.run(
            [sys.executable, __file__],
            input=asked,
            env=env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, log.read_text()[-4000:]
    return json.loads(done.stdout)


def check_loaded(
    held: dict, evicted: dict, loaded: dict, tokens: int, counted: bool = True
) -> None:
    """A prompt was found in the GPU's cache, was evicted, and was loaded as it had been.

    Args:
        held, evicted, loaded: what :func:`ask` says of the prompt in the cache, of one after which it was evicted,
            and of the prompt again. Both times the same tokens were left to compute, so steps have equal shapes.
        tokens: of the prompt's blocks that were loaded.
        counted: whether the connector counts bytes.
    """
    assert (held["gpu"], held["loaded"], held["bytes"]) == (tokens, 0, 0)
    assert not held["pages"].keys() & evicted["pages"].keys()
    assert (loaded["gpu"], loaded["loaded"]) == (0, tokens)
    assert (loaded["bytes"] > 0) == counted
    assert loaded["pages"].items() >= held["pages"].items()  # byte for byte, signatures included
    assert loaded["sparse"] == held["sparse"] > 0
    assert (loaded["tokens"], loaded["logprobs"]) == (held["tokens"], held["logprobs"])


# What follows runs in that process.


def digests(worker, blocks: list[int]) -> list[str]:
    """A digest of the bytes of each block in all layers."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    caches = [layer.kv_cache for layer in layers if hasattr(layer, "kv_cache")]
    found = []
    for block in blocks:
        pages = [cache[block].contiguous().view(torch.uint8).cpu().numpy() for cache in caches]
        found.append(sha256(b"".join(page.tobytes() for page in pages)).hexdigest())
    return found


def _pages(llm) -> dict[str, str]:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    blocks = scheduler.kv_cache_manager.block_pool.blocks
    cached = {block.block_hash.hex(): block.block_id for block in blocks if block.block_hash}
    (found,) = llm.collective_rpc(digests, args=(list(cached.values()),))
    return dict(zip(cached, found, strict=True))


def _sleep(llm, level: int) -> None:
    llm.sleep(level=level)
    if level == 1:
        llm.wake_up()
        return
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


def _run(model: str, arguments: dict, steps: list) -> list[dict]:
    from engines import _counters, _settle
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, **{**COMMON, **arguments})
    how = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1, detokenize=False
    )

    def read() -> dict[str, float]:
        if torch.cuda.is_available():
            _settle(llm)
        values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        found = {name: values.get(metric, 0) for name, metric in METRICS.items()}
        return {**found, "sparse": _counters()["sparse_rows"]}

    said, before = [], read()
    for step in steps:
        if step[0] == "sleep":
            _sleep(llm, step[1])
            continue
        (output,) = llm.generate([{"prompt_token_ids": step}], how, use_tqdm=False)
        sample, pages, now = output.outputs[0], _pages(llm), read()
        logprobs = [
            choices[token].logprob
            for token, choices in zip(sample.token_ids, sample.logprobs, strict=True)
        ]
        raised = {name: now[name] - before[name] for name in now}
        said.append(
            {"tokens": list(sample.token_ids), "logprobs": logprobs, "pages": pages, **raised}
        )
        before = now
    return said


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to standard output
    model, arguments, steps = json.load(sys.stdin)
    if not torch.cuda.is_available():
        from vllm_adamas.serving import checks
        from vllm_adamas.serving.backend import AdamasBackend

        pretend()
        checks._check_connector = lambda vllm_config: None
        AdamasBackend.supports_kv_connector = classmethod(lambda cls: True)
    json.dump(_run(model, arguments, steps), out)
    out.close()


if __name__ == "__main__":
    main()
