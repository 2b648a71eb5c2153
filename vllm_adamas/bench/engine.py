"""Decode steps of a real engine, launched as a server's are and timed in a process of its own."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, ClassVar, NamedTuple

import torch

from vllm_adamas.errors import AdamasError, reason
from vllm_adamas.evaluate import engine as engines
from vllm_adamas.identity import Heads
from vllm_adamas.serving import compat
from vllm_adamas.worker import serve


class Facts(NamedTuple):
    """What a server of a model would run with.

    Args:
        heads: of a layer.
        dtype: that the model computes in.
        max_model_len: tokens of the longest context.
        fp8: whether the KV cache holds fp8.
        options: of each configuration, with its defaults for the model.
    """

    heads: Heads
    dtype: str
    max_model_len: int
    fp8: bool
    options: dict[str, dict[str, Any]]

    @classmethod
    def of(
        cls,
        model: str,
        max_model_len: int | None,
        configurations: dict[str, dict[str, Any]],
        **engine_options,
    ) -> Facts:
        """Asks vLLM, which reads no weights for it.

        Args:
            model: folder or hub name.
            max_model_len: None for the model's own.
            configurations: options of the backend, by name.
            engine_options: arguments of vLLM.

        Raises:
            AdamasError: the model cannot be read, or cannot be served like this.
        """
        name = Path(model).name
        compat.require_supported_vllm()
        try:
            longest = engines.model_config(model).max_model_len
        except Exception as error:
            raise AdamasError(
                f"vLLM cannot read a model {name} ({reason(error)}): give the folder or the hub name of a model that "
                "generates text."
            ) from None
        if max_model_len is not None and max_model_len > longest:
            raise AdamasError(
                f"--max-model-len {max_model_len} is beyond the {longest} tokens of {name}: lower it or leave it out."
            )
        served, options = max_model_len or longest, {}
        for title, given in configurations.items():
            try:
                config = engines.adamas_config(model, served, given, **engine_options)
            except AdamasError:
                raise
            except Exception as error:
                raise AdamasError(
                    f"vLLM refuses {name} with these arguments ({reason(error)}): change the one that it names."
                ) from None
            options[title] = config.additional_config["adamas"]
        model_config, parallel = config.model_config, config.parallel_config
        heads = Heads(
            model_config.get_num_attention_heads(parallel),
            model_config.get_num_kv_heads(parallel),
            model_config.get_head_size(),
        )
        dtype = str(model_config.dtype).removeprefix("torch.")
        return cls(heads, dtype, served, config.cache_config.cache_dtype.startswith("fp8"), options)


class TimedEngine(engines.StockEngine):
    """An engine with what vLLM chooses for a server: compilation, CUDA graphs, scheduling, model runner.

    Args:
        adamas: options of the backend; None takes the attention backend that vLLM chooses.
        others: as of :class:`StockEngine`.
    """

    environment: ClassVar[dict[str, str]] = engines.IN_PROCESS
    how: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: str, max_model_len: int, adamas: dict | None, **others):
        if adamas is not None:
            others |= {
                "attention_backend": compat.NAME,
                "additional_config": {"adamas": adamas},
            }
        super().__init__(model, max_model_len, **others)
        self._asked = 0

    def told(self) -> dict[str, Any]:
        """Tokens that the KV cache holds, the attention backends of the layers, and threads on a CPU."""
        config = self.llm.llm_engine.vllm_config
        return {
            "capacity": self.capacity,
            "attention": " and ".join(compat.attention_backends(config)),
            "threads": torch.get_num_threads() if compat.on_cpu() else None,
        }

    def rounds(self, context: int, batch: int, tokens: int, count: int) -> list[list[float]]:
        """Times of the decode steps of ``count`` rounds of the same requests, in ms.

        A round before them fills the prefix cache, so that all requests decode together. Steps count in which every
        request got a token, as in the step before.

        Args:
            context: tokens of a prompt of random tokens with its answer.
            batch: requests.
            tokens: of an answer.
        """
        prompts = [self._prompt(number, context - tokens) for number in range(batch)]
        self._round(prompts, 2)
        return [self._round(prompts, tokens) for _ in range(count)]

    def _prompt(self, number: int, tokens: int) -> list[int]:
        """The first tokens of one of the texts; ids of special tokens are low or high."""
        vocabulary, rng = self.model_config.get_vocab_size(), Random(number)
        return [rng.randrange(vocabulary // 10, vocabulary // 2) for _ in range(tokens)]

    def _round(self, prompts: list[list[int]], tokens: int) -> list[float]:
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        for prompt in prompts:
            params = SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
            )
            self._asked += 1
            engine.add_request(str(self._asked), {"prompt_token_ids": prompt}, params)
        ends: list[
            float | None
        ] = []  # of the steps that gave tokens; None if not every request got one
        while engine.has_unfinished_requests():
            outputs = engine.step()
            if outputs:
                ends.append(time.perf_counter() if len(outputs) == len(prompts) else None)
        return [round(1e3 * (b - a), 4) for a, b in pairwise(ends) if a and b]


class Answers:
    """What the process answers: first :meth:`TimedEngine.told` of the engine that it makes, then its rounds."""

    def __init__(self):
        self._engine: TimedEngine | None = None

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self._engine is not None:
            return {"rounds": self._engine.rounds(**asked)}
        self._engine = TimedEngine(**asked)
        return self._engine.told()

    def close(self) -> None:
        """Frees the engine."""
        if self._engine is not None:
            self._engine.close()


if __name__ == "__main__":
    answers = Answers()
    serve(answers)
    answers.close()
