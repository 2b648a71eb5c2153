"""vLLM's offline engine in this process; its adamas configuration can change between runs.

Studies measure what a server runs: vLLM's scheduler and model runner, the attention backend and its
kernels. One engine serves every configuration of a study, so prompts are prefilled once. Prefill is
dense, so K and V of a prompt are the same under every configuration. Only its codes are recomputed,
when a configuration codes keys differently.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from vllm_adamas.backends.base import Backend
from vllm_adamas.config import AdamasConfig
from vllm_adamas.errors import AdamasError, reason
from vllm_adamas.serving import compat
from vllm_adamas.serving.checks import check_layers, resolve

IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  #: the engine runs in the process that asks it
SILENT = {"metrics": False, "log_interval": 0, "audit_interval": 0}
RECODE_BYTES = 1 << 28  #: bytes of pages that are recoded at a time


@dataclass(frozen=True)
class Request:
    """A prompt and its continuation.

    Args:
        prompt: token ids.
        target: ids of the actual continuation, forced token by token; None generates greedily.
        tokens: number of tokens to generate.
        budget: tokens that every sparse layer attends to. None attends to the whole context, or obeys the
            configuration if no request of the run has a budget.
        window: index of the window, to compare a forced target with the same window's dense run.
    """

    prompt: list[int]
    target: list[int] | None = None
    tokens: int = 1
    budget: int | None = None
    window: int = 0


@dataclass(frozen=True)
class Run:
    """Results of a run, in the order of its requests; the first token of a target is not scored.

    Args:
        tokens: generated token ids of every request.
        nll: negative log-likelihood of each forced token in nats, ``[forced requests, steps]``.
        kl: KL(reference || model) in nats, shaped like ``nll``; None without a reference.
        log_probs: float32 ``[forced requests, steps, vocabulary]``; None unless they were kept.
    """

    tokens: list[list[int]]
    nll: torch.Tensor
    kl: torch.Tensor | None
    log_probs: torch.Tensor | None


class StockEngine:
    """An engine with the attention backend that vLLM chooses.

    Attributes:
        environment: variables that it sets.
        how: arguments of vLLM's LLM, unless others are given.

    Args:
        model: folder or hub name.
        max_model_len: longest prompt with its continuation, in tokens.
        max_num_seqs: maximum number of requests in one step.
        engine_options: further arguments of vLLM's LLM.

    Raises:
        AdamasError: the model or an option cannot be served.
    """

    environment: ClassVar[dict[str, str]] = {**IN_PROCESS, "VLLM_USE_V2_MODEL_RUNNER": "0"}
    how: ClassVar[dict[str, Any]] = {"enforce_eager": True, "async_scheduling": False}

    def __init__(self, model: str, max_model_len: int, *, max_num_seqs: int = 16, **engine_options):
        _prepare_vllm(self.environment)
        from vllm import LLM
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            engine_options.setdefault("distributed_executor_backend", "uni")
        elif "kv_cache_memory_bytes" in engine_options:
            # vLLM then sizes nothing by it, but still requires that share of the GPU to be free.
            engine_options.setdefault("gpu_memory_utilization", 0.05)
        with _adamas_errors(starting=True):
            self.llm = LLM(
                model=str(model),
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                enable_prefix_caching=True,
                disable_log_stats=True,
                **self.how,
                **engine_options,
            )
        self.tokenizer = self.llm.get_tokenizer()

    @property
    def model_config(self):
        """vLLM's ModelConfig."""
        return self.llm.llm_engine.vllm_config.model_config

    @property
    def capacity(self) -> int:
        """Tokens that the KV cache holds."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size

    def answers(
        self, prompts: Sequence[Sequence[int]], tokens: int, stops: bool = True
    ) -> list[list[int]]:
        """Greedy continuations of prompts of token ids, in their order.

        Args:
            tokens: largest number of tokens of a continuation.
            stops: whether a continuation ends at the model's end-of-sequence token, which it then includes.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=not stops, detokenize=False
        )
        sent = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(sent, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """Frees the engine."""
        with contextlib.suppress(Exception):
            self.llm.llm_engine.engine_core.shutdown()


class Engine(StockEngine):
    """An engine with the adamas backend, whose configuration can change between runs.

    Args:
        options: options common to all configurations, such as a profile or kernels.
        others: as of :class:`StockEngine`.

    Raises:
        AdamasError: as :class:`StockEngine` does, or the model has recurrent layers.
    """

    def __init__(self, model: str, max_model_len: int, *, options: dict | None = None, **others):
        self.options = dict(options or {})
        _prepare_vllm(self.environment)
        from vllm.engine.arg_utils import EngineArgs

        with _adamas_errors():
            _refuse_hybrids(EngineArgs(model=str(model), **others).create_model_config())
        super().__init__(
            model,
            max_model_len,
            attention_backend=compat.NAME,
            additional_config={"adamas": {**SILENT, **self.options}},
            logits_processors=["vllm_adamas.evaluate.forcing:ForcedContinuation"],
            **others,
        )
        from vllm_adamas.evaluate.forcing import ForcedContinuation

        self.forcing = ForcedContinuation
        ((self._layers, self._builders, self._extra_args),) = self.llm.collective_rpc(
            compat.adamas_parts
        )
        for builder in self._builders:
            builder.set_budgets = partial(self._set_budgets, builder, builder.set_budgets)
        self._coding: tuple | None = None

    def check(self, options: dict) -> AdamasConfig:
        """The configuration with these options, and with its defaults for the model.

        Raises:
            AdamasError: an option is not valid, or does not fit the model.
        """
        config = AdamasConfig.parse({**SILENT, **self.options, **options})
        check_layers(self.model_config, config)
        return resolve(self.model_config, config)

    def use(
        self, options: dict, wrap: Callable[[Backend, int], Backend] | None = None
    ) -> AdamasConfig:
        """Serves with these options from now on, with backends wrapped by ``wrap(backend, number)`` if given.

        Raises:
            AdamasError: as :meth:`check` does.
        """
        config = self.check(options)
        before = [layer.impl.key_factor() for layer in self._layers.values()]
        for number, layer in enumerate(self._layers.values()):
            layer.impl.reconfigure(config, partial(wrap, number=number) if wrap else None)
        for builder in self._builders:
            builder.configure(config)
        sizes = {layer.impl.head_size for layer in self._layers.values()}
        coding = (config.profile, *(config.coding(size) for size in sorted(sizes)))
        if self._coding not in (None, coding):
            self._recode(before)
        self._coding = coding
        return config

    def _recode(self, before: list[torch.Tensor | float]) -> None:
        """Rewrites every page with new codes; ``before`` are the layers' previous key channel factors.

        The prefix cache is reset instead if recoding is impossible: fp8 pages have lost bits, and pages
        shared by layers of several kinds do not tell whose keys they hold.
        """
        layers = list(self._layers.values())
        shared = len({layer.kv_cache.data_ptr() for layer in layers}) < len(layers)
        if shared or layers[0].impl.kv_cache_dtype.startswith("fp8"):
            self.llm.reset_prefix_cache()
            return
        for layer, old in zip(layers, before, strict=True):
            impl, kv_cache = layer.impl, layer.kv_cache
            bound = impl.bind(layer, kv_cache)
            ratio = impl.key_factor() / old  # powers of two: exact
            backend = impl.shared.backend(impl.config.kernels)  # bypasses recorders
            layout, size, blocks = bound.params.layout, kv_cache.shape[2], len(kv_cache)
            at_once = max(1, RECODE_BYTES // (kv_cache[0].numel() * kv_cache.element_size()))
            for first in range(0, blocks, at_once):
                some = slice(first, min(first + at_once, blocks))
                key, value = (
                    plane(kv_cache)[some].transpose(1, 2).flatten(0, 1).contiguous()
                    for plane in (layout.k, layout.v)
                )  # [blocks * N, Hkv, D]
                slots = torch.arange(some.start * size, some.stop * size, device=kv_cache.device)
                backend.append(bound, key * ratio, value, slots)

    def _set_budgets(self, builder, by_config, budget, seq_lens, prefilling, out) -> None:
        """Sets the budgets of requests that carry their own; see :class:`Request`."""
        by_config(budget, seq_lens, prefilling, out)
        rows = len(seq_lens)
        own = [extra.get(self.forcing.BUDGET) for extra in self._extra_args(rows)]
        if len(own) < rows or all(budget is None for budget in own):
            return  # a warm-up step has rows without requests
        prompts = [False] * rows if prefilling is None else prefilling.tolist()
        everything = torch.iinfo(torch.int32).max
        wanted = [
            everything if prompt or budget is None else budget
            for prompt, budget in zip(prompts, own, strict=True)
        ]
        torch.minimum(seq_lens, torch.tensor(wanted, dtype=torch.int32).to(out.device), out=out)

    def run(
        self,
        requests: Sequence[Request],
        *,
        reference: torch.Tensor | None = None,
        keep: bool = False,
        progress: str | None = None,
    ) -> Run:
        """Runs all requests in one batch, as far as they fit.

        Args:
            requests: all targets have the same length.
            reference: log-probabilities ``[windows, steps, vocabulary]`` of an earlier run, for KL.
            keep: whether to keep the log-probabilities of forced tokens.
            progress: title of a progress bar.
        """
        from vllm import SamplingParams

        forced = [request for request in requests if request.target is not None]
        index = {id(request): number for number, request in enumerate(forced)}
        with self.forcing.recording(forced, reference, keep) as record:
            outputs = self.llm.generate(
                [{"prompt_token_ids": request.prompt} for request in requests],
                [
                    SamplingParams(
                        temperature=0,
                        ignore_eos=True,
                        detokenize=False,
                        max_tokens=request.tokens
                        if request.target is None
                        else len(request.target),
                        extra_args={
                            self.forcing.BUDGET: request.budget,
                            self.forcing.FORCED: index.get(id(request)),
                        },
                    )
                    for request in requests
                ],
                use_tqdm=_bar(progress) if progress else False,
            )
        if record.nll.isnan().any():
            raise RuntimeError("a forced token was not seen by the recorder")
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        return Run(tokens, record.nll.cpu(), record.kl_or_none(), record.log_probs)

    def close(self) -> None:
        super().close()
        self._layers, self._builders = {}, []  # they hold the workspace


def check(model: str, max_model_len: int, configurations: Sequence[dict], **engine_options) -> None:
    """Refuses, without reading weights, what an engine or one of the configurations would refuse.

    Args:
        configurations: options of the backend, of each.
        model, max_model_len, engine_options: as of :class:`StockEngine`.

    Raises:
        AdamasError: the model's contexts are shorter, or it cannot be served with these options.
    """
    found = model_config(model)
    _refuse_hybrids(found)
    longest = found.max_model_len
    if max_model_len > longest:
        raise AdamasError(
            f"the length {max_model_len} is beyond the {longest} tokens of {Path(model).name}: lower --lengths."
        )
    for options in configurations:
        adamas_config(model, max_model_len, options, **engine_options)


def model_config(model: str):
    """vLLM's ModelConfig of a model, as it is without further arguments."""
    from vllm.engine.arg_utils import EngineArgs

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    return EngineArgs(model=model).create_model_config()


def adamas_config(model: str, max_model_len: int, options: dict, **engine_options):
    """The VllmConfig of an adamas engine, made without reading weights.

    Args:
        options: of the backend.
        model, max_model_len, engine_options: as of :class:`StockEngine`.

    Raises:
        AdamasError: the model cannot be served with these options.
    """
    from vllm.engine.arg_utils import EngineArgs

    with _adamas_errors():
        return EngineArgs(
            model=model,
            max_model_len=max_model_len,
            attention_backend=compat.NAME,
            additional_config={"adamas": {**SILENT, **options}},
            **engine_options,
        ).create_engine_config()


def _prepare_vllm(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    compat.require_supported_vllm()


def _refuse_hybrids(model_config) -> None:
    """Refuses a ModelConfig with recurrent layers, whose states lie in the pages that are recoded.

    Raises:
        AdamasError: the model has such layers.
    """
    if model_config.is_hybrid:
        raise AdamasError(
            f"{Path(model_config.model).name} has state-space or linear-attention layers, beside which "
            "configurations cannot be compared yet: serve it without a profile."
        )


def check_profile(model: str, **engine_options) -> None:
    """Whether one profile can describe the heads of all layers of a model.

    Args:
        engine_options: arguments of vLLM's LLM.

    Raises:
        AdamasError: it cannot.
    """
    _prepare_vllm(Engine.environment)
    from vllm.engine.arg_utils import EngineArgs

    with _adamas_errors():
        _refuse_unlike_heads(EngineArgs(model=str(model), **engine_options).create_model_config())


def _refuse_unlike_heads(model_config) -> None:
    """Refuses a ModelConfig whose layers have heads of another size than a profile would describe.

    Raises:
        AdamasError: a layer has.
    """
    from vllm_adamas.serving.checks import head_sizes

    sizes, one = head_sizes(model_config), model_config.get_head_size()
    if sizes != [one]:
        raise AdamasError(
            f"{Path(model_config.model).name} has heads of size {' and '.join(map(str, sizes))}, and a profile describes heads "
            f"of one size, {one}: serve it without a profile."
        )


@contextlib.contextmanager
def _adamas_errors(starting: bool = False):
    """Unwraps an AdamasError from the exception that vLLM raises because of it.

    Args:
        starting: any other exception is one too, since the engine does not start.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, AdamasError):
            cause = cause.__cause__ or cause.__context__
        if cause is None and starting:
            traceback.print_exc()
            cause = AdamasError(
                f"the engine does not start ({reason(error)}): free memory, or give another --kv-cache-gib, shorter "
                "contexts or fewer requests at once."
            )
        if cause is None:
            raise
        raise cause from None


def _bar(title: str) -> Callable:
    """A factory of progress bars with this title, for vLLM's generate()."""
    from tqdm import tqdm

    def make(*args, **kwargs):
        kwargs.update(desc=title, leave=False, dynamic_ncols=True)
        return tqdm(*args, **kwargs)

    return make


def local_model(model: str | Path) -> str:
    """The model as the user named it, after checking that a path holds a model.

    Raises:
        AdamasError: the path holds no config.json.
    """
    path = Path(model)
    looks_like_path = path.exists() or str(model).startswith((".", "/", "~"))
    if looks_like_path and not (path / "config.json").is_file():
        raise AdamasError(f"{path} holds no config.json: give the folder of a Hugging Face model.")
    return str(model)
