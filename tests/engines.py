"""The answers of engines that are built one after another in one process, which is faster than servers."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

COMMON = {
    "attention_backend": "adamas",
    "additional_config": {"adamas": {"token_budget": 128, "num_dense_layers": 1}},
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 64,
    "max_model_len": 2048,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 8,
    "disable_log_stats": False,
    "skip_tokenizer_init": True,
}
TOKENS = 16


def prompts(first: int = 100, last: int = 40000) -> list[list[int]]:
    """Token ids: within the budget, beyond it, and the start of one followed by others."""
    rng = Random(0)
    ids = [rng.randrange(first, last) for _ in range(1000)]
    return [ids[:5], ids[:100], ids[:300], ids[:700], ids[:640] + ids[800:950]]


class Answer(NamedTuple):
    """What an engine says to a prompt.

    Args:
        tokens: token ids, all samples of a request one after another.
        margins: by how much the log-probability of the best token exceeds that of the second, per token; for
            greedy requests, empty for others.
        text: the decoded text, empty if ``detokenize`` was not asked for.
        logprobs: log-probabilities of the prompt's tokens if they were asked for; of beams, their sums.
    """

    tokens: list[int]
    margins: list[float]
    text: str
    logprobs: list[float]


class Engine(NamedTuple):
    """What one engine said.

    Args:
        counters: by how much it has raised those of :mod:`vllm_adamas.serving.metrics`.
        drafted, accepted: tokens of speculative decoding.
        stored: tokens of the blocks that KV events told of, if they were asked for.
        audited: decode rows that its audit has compared, by the layers of a group.
    """

    answers: list[Answer]
    counters: dict[str, int]
    drafted: int
    accepted: int
    stored: list[list[int]]
    audited: dict[str, int]

    @property
    def tokens(self) -> list[list[int]]:
        return [answer.tokens for answer in self.answers]


class EngineError(Exception):
    """The engine could not be built or did not answer; the message is the traceback."""


class Engines:
    """The process that builds them, started again after a crash. A context manager.

    Args:
        env: environment variables on top of this process's own.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *error) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()

    def ask(self, model: Path | str, arguments: dict, requests: Sequence[dict] = ()) -> Engine:
        """
        Args:
            model: folder of the model.
            arguments: of ``vllm.LLM``, on top of ``COMMON``.
            requests: each has ``prompt`` (token ids) and may have ``sampling`` (fields of ``SamplingParams``),
                ``image`` (the seed of its pixels), ``lora`` (a folder) and ``beams``. By default
                :func:`prompts`. They are sent one after another, and then all at once, except for beams.

        Raises:
            EngineError: the engine failed.
        """
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=-1, stdout=-1, text=True, bufsize=1, env=self._env
            )
        self._process.stdin.write(json.dumps([str(model), arguments, list(requests)]) + "\n")
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"the engines' process ended with status {self._process.wait()}")
        found = json.loads(line)
        if "error" in found:
            raise EngineError(found["error"])
        found["answers"] = [Answer(*answer) for answer in found["answers"]]
        return Engine(**found)


# What follows runs in that process.


def _answer(output) -> Answer:
    tokens, margins, text, logprobs = [], [], "", []
    for sample in output.outputs:
        tokens += sample.token_ids
        text += sample.text
        for choices in sample.logprobs or ():
            best, second = sorted((one.logprob for one in choices.values()), reverse=True)[:2]
            margins.append(best - second)
    for token, choices in zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=False):
        logprobs.append(choices[token].logprob if choices else 0.0)
    return Answer(tokens, margins, text, logprobs)


def _sampling(given: dict):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    fields = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
    fields |= {} if given.get("temperature") else {"logprobs": 2}
    fields |= given
    if structure := fields.pop("structure", None):
        fields["structured_outputs"] = StructuredOutputsParams(**structure)
    return SamplingParams(**fields)


def _counters() -> dict[str, int]:
    from vllm_adamas.serving import metrics

    folder = os.environ.get(metrics.FOLDER)
    engines = metrics.read_counters(Path(folder)).values() if folder else ()
    return {name: sum(int(one[i]) for one in engines) for i, (name, _) in enumerate(metrics.NAMES)}


def _audited() -> Counter[str]:
    from vllm_adamas.serving import metrics
    from vllm_adamas.serving.histograms import read_audits

    folder = os.environ.get(metrics.FOLDER)
    audits = read_audits(Path(folder)) if folder else {}
    return Counter({layers: audit.rows for (_, layers), audit in audits.items()})


def _settle(llm) -> None:
    """Brings the counters of a GPU into their file: copies are a second apart, and a step brings the one before.

    A prompt of several tokens with one token of output is prefill alone, and counts nothing.
    """
    from vllm_adamas.serving.metrics import Counters

    for _ in range(2):
        time.sleep(1.1 * Counters.COPY_INTERVAL)
        prompt, how = {"prompt_token_ids": [5, 6, 7]}, _sampling({"max_tokens": 1})
        llm.generate([prompt], [how], use_tqdm=False)


def _stored(llm) -> list[list[int]]:
    import msgspec
    from vllm.distributed.kv_events import BlockStored, KVEventBatch, ZmqEventPublisher

    publisher = llm.llm_engine.engine_core.engine_core.scheduler.kv_event_publisher
    if not isinstance(publisher, ZmqEventPublisher):
        return []
    publisher._event_queue.join()  # what was published is kept for subscribers that come late
    batches = [msgspec.msgpack.decode(sent, type=KVEventBatch) for _, sent in publisher._buffer]
    events = [
        event for batch in batches for event in batch.events if isinstance(event, BlockStored)
    ]
    return [
        event.token_ids[start : start + event.block_size]
        for event in events
        for start in range(0, len(event.token_ids), event.block_size)
    ]


def _prompt(request: dict) -> dict:
    prompt = {"prompt_token_ids": request["prompt"]}
    if "image" in request:
        import numpy as np
        from PIL import Image

        pixels = np.random.default_rng(request["image"]).integers(0, 256, (56, 56, 3), np.uint8)
        prompt["multi_modal_data"] = {"image": Image.fromarray(pixels)}
    return prompt


def _beams(llm, request: dict) -> Answer:
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=request["beams"], max_tokens=TOKENS, ignore_eos=True)
    (output,) = llm.beam_search([{"prompt_token_ids": request["prompt"]}], params)
    tokens = [token for beam in output.sequences for token in beam.tokens[len(request["prompt"]) :]]
    return Answer(tokens, [], "", [beam.cum_logprob for beam in output.sequences])


def _build(model: str, arguments: dict, requests: list[dict]) -> dict:
    import torch
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    before, audited = _counters(), _audited()
    requests = requests or [{"prompt": ids} for ids in prompts()]
    beams = [request for request in requests if "beams" in request]
    others = [request for request in requests if "beams" not in request]
    llm = None
    try:
        llm = LLM(model=model, **{**COMMON, **arguments})
        sent = [_prompt(request) for request in others]
        sampling = [_sampling(request.get("sampling", {})) for request in others]
        loras = [
            LoRARequest(folder, 1, folder) if (folder := request.get("lora")) else None
            for request in others
        ]
        outputs = [
            llm.generate(one, how, lora_request=lora, use_tqdm=False)[0]
            for one, how, lora in zip(sent, sampling, loras, strict=True)
        ]
        outputs += llm.generate(sent, sampling, lora_request=loras, use_tqdm=False) if sent else []
        answers = [_answer(output) for output in outputs]
        answers += [_beams(llm, request) for request in beams]
        if torch.cuda.is_available():
            _settle(llm)
        values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        stored = _stored(llm)
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    counters = {name: total - before[name] for name, total in _counters().items()}
    drafts = {
        name: values.get(f"vllm:spec_decode_num_{kind}_tokens", 0)
        for name, kind in (("drafted", "draft"), ("accepted", "accepted"))
    }
    seen = {"stored": stored, "audited": _audited() - audited}
    return {"answers": answers, "counters": counters, **seen, **drafts}


def _serve() -> None:
    import traceback

    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM logs to standard output
    for line in sys.stdin:
        try:
            found = _build(*json.loads(line))
        except Exception:
            found = {"error": traceback.format_exc()}
        out.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    _serve()
