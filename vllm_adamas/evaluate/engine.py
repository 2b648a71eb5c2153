"""vLLM's offline engine in this process, whose adamas configuration can change between two runs.

What is measured is what a server runs: vLLM's scheduler and model runner, the attention backend and
its kernels. One engine serves every configuration of a study, so that prompts are prefilled once:
prefill is dense, hence their pages are the same for all configurations that code keys alike.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from vllm_adamas import compat
from vllm_adamas.backends.base import Backend
from vllm_adamas.config import AdamasConfig
from vllm_adamas.errors import AdamasError

#: A process that evaluates holds the engine itself; one whose environment says otherwise is told.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}


@dataclass(frozen=True)
class Continuation:
    """A prompt and the text that really follows it, both as token ids."""

    prompt: list[int]
    target: list[int]


class Scores:
    """What the model thought of forced tokens: W windows of S tokens each.

    The first token of a target is predicted by the (dense) prefill, so S is one less than its length.

    Args:
        nll: ``[W, S]``, negative log-likelihood of each token in nats.
        kl: ``[W, S]``, divergence KL(reference || model) in nats; None without a reference.
        log_probs: float32 ``[W, S, vocabulary]`` if they were asked for.
    """

    def __init__(self, windows: int, steps: int):
        self.nll = torch.full((windows, steps), torch.nan)
        self.kl: torch.Tensor | None = None
        self.log_probs: torch.Tensor | None = None


@dataclass(frozen=True)
class Run:
    """What :meth:`Engine.run` found: of forced windows their scores, of free prompts their tokens."""

    scores: Scores
    tokens: list[list[int]]


class Engine:
    """
    Args:
        model: folder or hub name.
        max_model_len: longest prompt with its continuation, in tokens.
        max_num_seqs: requests that run together.
        options: options that hold for all configurations, such as a profile or kernels.
        threads: CPU threads; None leaves it to vLLM.

    Raises:
        AdamasError: the model or an option cannot be served, or another engine ran here before.
    """

    def __init__(
        self,
        model: str,
        max_model_len: int,
        *,
        max_num_seqs: int = 16,
        options: dict | None = None,
        dtype: str = "auto",
        **engine_options,
    ):
        os.environ.update(ENVIRONMENT)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        compat.require_supported_vllm()
        from vllm import LLM
        from vllm.platforms import current_platform

        from vllm_adamas.evaluate.forcing import ForcedContinuation

        on_cpu = current_platform.is_cpu()
        if on_cpu:
            engine_options.setdefault("distributed_executor_backend", "uni")
        self.options = dict(options or {})
        self.forcing = ForcedContinuation
        try:
            self.llm = LLM(
                model=str(model),
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                attention_backend=compat.NAME,
                additional_config={"adamas": {"metrics": False, "log_interval": 0, **self.options}},
                enforce_eager=True,
                enable_prefix_caching=True,
                async_scheduling=False,
                logits_processors=[ForcedContinuation],
                disable_log_stats=True,
                **engine_options,
            )
        except AdamasError:
            raise
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, AdamasError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise cause from None
        self.tokenizer = self.llm.get_tokenizer()
        self._coding: tuple | None = None
        (self._layers, self._builders), *_ = self.llm.collective_rpc(compat.adamas_parts)
        self.device = torch.device(current_platform.device_type)

    @property
    def layers(self) -> list[str]:
        """Names of the attention layers, in the order of the model."""
        return list(self._layers)

    def use(
        self, options: dict, wrap: Callable[[Backend, int], Backend] | None = None
    ) -> AdamasConfig:
        """Serve with these options from now on, through ``wrap(backend, layer)`` if given.

        Cached prompts are forgotten when they hold other codes than the options ask for.
        """
        config = AdamasConfig.parse(
            {"metrics": False, "log_interval": 0, **self.options, **options}
        )
        for number, impl in enumerate(self._layers.values()):
            impl.reconfigure(config, partial(wrap, layer=number) if wrap else None)
        for builder in self._builders:
            builder.config = config
        coding = tuple(
            (config.coding(impl.head_size), config.profile) for impl in self._layers.values()
        )
        if coding != self._coding:
            self._coding = coding
            self.llm.reset_prefix_cache()
        return config

    def run(
        self,
        forced: Sequence[Continuation] = (),
        free: Sequence[list[int]] = (),
        free_tokens: int = 1,
        reference: torch.Tensor | None = None,
        *,
        keep: bool = False,
        progress: str | None = None,
    ) -> Run:
        """One batch: forces targets, decode step by decode step, and generates greedily.

        Args:
            forced: windows whose targets have one length.
            free: prompts of which exactly ``free_tokens`` greedy tokens are wanted each.
            reference: log-probabilities that an earlier call kept, for the divergence.
            keep: keep the log-probabilities of forced tokens.
            progress: title of a progress bar.
        """
        from vllm import SamplingParams

        steps = len(forced[0].target) - 1 if forced else 0
        scores = Scores(len(forced), steps)
        if reference is not None:
            scores.kl = torch.full((len(forced), steps), torch.nan)
        options = [
            {"max_tokens": len(w.target), "extra_args": self.forcing.arguments(i, w.target)}
            for i, w in enumerate(forced)
        ] + [{"max_tokens": free_tokens}] * len(free)
        prompts = [w.prompt for w in forced] + list(free)
        with self.forcing.recording(scores, reference, keep):
            outputs = self.llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts],
                [
                    SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **some)
                    for some in options
                ],
                use_tqdm=bar(progress) if progress else False,
            )
        if scores.nll.isnan().any():
            raise RuntimeError("a forced token was not seen by the recorder")
        return Run(scores, [list(out.outputs[0].token_ids) for out in outputs[len(forced) :]])

    def close(self) -> None:
        """Frees the engine."""
        with contextlib.suppress(Exception):
            self.llm.llm_engine.engine_core.shutdown()


def bar(title: str) -> Callable:
    """A progress bar with a title of our own, as vLLM's generate() wants it."""
    from tqdm import tqdm

    def make(*args, **kwargs):
        kwargs.update(desc=title, leave=False, dynamic_ncols=True, postfix=None)
        return tqdm(*args, **kwargs)

    return make


def local_model(model: str | Path) -> str:
    """The model as a user names it, refused when it is a path that holds no model.

    Raises:
        AdamasError: no config.json there.
    """
    path = Path(model)
    looks_like_path = path.exists() or str(model).startswith((".", "/", "~"))
    if looks_like_path and not (path / "config.json").is_file():
        raise AdamasError(f"{path} holds no config.json: give the folder of a Hugging Face model.")
    return str(model)
