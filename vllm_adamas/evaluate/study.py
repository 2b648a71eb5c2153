"""A study: every task under every configuration, cell by cell, into a file that can be continued."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from vllm_adamas import __version__, compat
from vllm_adamas import profile as profiles
from vllm_adamas.backends.reference.selectors import SelectorBackend
from vllm_adamas.errors import AdamasError
from vllm_adamas.evaluate import tasks, texts
from vllm_adamas.evaluate.engine import Continuation, Engine
from vllm_adamas.evaluate.shadow import MassRecord, Shadow

FORMAT, VERSION = "vllm-adamas-eval", 1
DENSE = "dense"
PERPLEXITY, AGREEMENT = "perplexity", "agreement"
TASKS = (PERPLEXITY, AGREEMENT, *tasks.TASKS)

#: Families of configurations; a budget makes one of them.
FAMILIES: dict[str, dict] = {
    "dot": {"score": "dot", "selection": "kv_head"},
    "dot-query-head": {"score": "dot", "selection": "query_head"},
    "manhattan": {"score": "manhattan", "selection": "query_head"},
    "manhattan-window": {
        "score": "manhattan",
        "selection": "query_head",
        "num_sink_tokens": 4,
        "recent_window": 32,
    },
    "manhattan-kv-head": {"score": "manhattan", "selection": "kv_head"},
    "oracle": {"selector": "oracle"},
    "quest": {"selector": "quest"},
    "streaming-llm": {"selector": "streaming_llm"},
}


@dataclass(frozen=True)
class Arm:
    """One configuration of a comparison.

    Args:
        name: unique; what results call it.
        options: of the backend.
        family, budget: where it stands in tables and plots; budget 0 is dense.
        selector: a reference selector instead of the backend's own scan and select.
    """

    name: str
    family: str
    budget: int
    options: dict = field(default_factory=dict, hash=False)
    selector: str | None = None

    @classmethod
    def dense(cls) -> Arm:
        return cls(DENSE, DENSE, 0, {"token_budget": 1.0})

    @classmethod
    def of(cls, family: str, budget: int) -> Arm:
        """
        Raises:
            AdamasError: an unknown family.
        """
        if family not in FAMILIES:
            raise AdamasError(
                f"{family} is not a configuration: choose among {', '.join(FAMILIES)}, or give --config."
            )
        options = dict(FAMILIES[family])
        selector = options.pop("selector", None)
        return cls(
            f"{family}-{budget}", family, budget, {**options, "token_budget": budget}, selector
        )

    def fits(self) -> bool:
        """Whether the budget leaves something to select beside sinks and window."""
        forced = self.options.get("num_sink_tokens", 0) + self.options.get("recent_window", 0)
        return self.budget == 0 or self.budget > forced


@dataclass(frozen=True)
class Settings:
    """What all cells of one results file share.

    Args:
        context: tokens of a window or prompt, its continuation included.
        windows, steps: text windows at most, and scored tokens of each.
        prompts: of a retrieval task, divided by the strings that an answer has to contain.
        free_tokens: greedy tokens of the agreement with dense.
        answer_tokens: greedy tokens of an answer.
        stride: every so many decode steps the attention is compared with dense attention.
    """

    model: str
    context: int = 8192
    windows: int = 40
    steps: int = 128
    prompts: int = 100
    free_tokens: int = 64
    answer_tokens: int = 64
    stride: int = 16
    seed: int = 0
    tasks: tuple[str, ...] = TASKS
    texts: dict[str, str] = field(default_factory=dict)
    options: dict = field(default_factory=dict)


class Study:
    """
    Args:
        path: the results file; cells that it holds are not run again.
        retrieval_budgets: budgets for which retrieval runs too; empty is all.

    Raises:
        AdamasError: the file belongs to another study.
    """

    def __init__(
        self,
        settings: Settings,
        sources: Sequence[texts.Text],
        path: Path,
        retrieval_budgets: Sequence[int] = (),
    ):
        self.sources, self.path = sources, path
        self.retrieval_budgets = tuple(retrieval_budgets)
        self.settings = settings = Settings(
            **{**asdict(settings), "texts": {text.name: text.sha256 for text in sources}}
        )
        tasks.check_names(settings.tasks, TASKS)
        known = {"model": Path(settings.model).name}  # results go elsewhere, folders stay
        wanted = json.loads(json.dumps({**asdict(settings), **known}))
        self.result = {
            "format": FORMAT,
            "version": VERSION,
            "settings": wanted,
            "environment": _environment(),
            "cells": {},
        }
        if path.exists():
            self.result = _load(path)
            mine = {k: v for k, v in wanted.items() if k != "tasks"}
            theirs = {k: v for k, v in self.result["settings"].items() if k != "tasks"}
            different = [key for key in mine if mine[key] != theirs.get(key)]
            if different:
                raise AdamasError(
                    f"{path} holds results with other settings ({', '.join(different)}): give another "
                    "--output or remove the file."
                )
        self._prompts: dict[str, list[tasks.Prompt]] = {}
        self._reference: torch.Tensor | None = None

    def missing(self, arm: Arm) -> list[str]:
        """Tasks of an arm that have no result yet."""
        done = self.result["cells"].get(arm.name, {}).get("tasks", {})
        text_only = (
            arm.budget and self.retrieval_budgets and arm.budget not in self.retrieval_budgets
        )
        wanted = (PERPLEXITY, AGREEMENT) if text_only else TASKS
        return [task for task in self.settings.tasks if task in wanted and task not in done]

    def run(self, arms: Sequence[Arm], **engine_options) -> dict:
        """Runs what is missing, dense first, and returns the results.

        Args:
            engine_options: of :class:`Engine`.

        Raises:
            AdamasError: the model or a configuration cannot be served.
        """
        arms = [Arm.dense(), *(arm for arm in arms if arm.name != DENSE and arm.fits())]
        todo = [arm for arm in arms if self.missing(arm)]
        if not todo:
            return self.result
        settings = self.settings
        most = max(settings.free_tokens, settings.answer_tokens)
        engine = Engine(
            settings.model, settings.context + most, options=settings.options, **engine_options
        )
        model_config = engine.llm.llm_engine.vllm_config.model_config
        self.result["model"] = profiles.identify(model_config).model_dump()
        windows = texts.windows(
            engine.tokenizer, self.sources, settings.context, settings.steps, settings.windows
        )
        for number, arm in enumerate(todo, 1):
            started = time.monotonic()
            cell = self.result["cells"].setdefault(
                arm.name,
                {"family": arm.family, "budget": arm.budget, "options": arm.options, "tasks": {}},
            )
            title = f"[{number}/{len(todo)}] {arm.name}"
            for run in (self._text, self._retrieval):
                cell["tasks"].update(run(engine, arm, windows, title))
                self._save()
            print(f"{arm.name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        engine.close()
        return self.result

    def _text(self, engine: Engine, arm: Arm, windows: list[Continuation], title: str) -> dict:
        """Perplexity and agreement: the same windows, forced and free, in one batch."""
        missing, found = self.missing(arm), {}
        forced = windows if PERPLEXITY in missing else []
        free = [w.prompt for w in windows] if AGREEMENT in missing else []
        if forced and self._reference is None and arm.name != DENSE:
            _use(engine, Arm.dense())
            dense = engine.run(windows, keep=True, progress=f"{title}, dense first")
            self._reference = dense.scores.log_probs
        if not forced and not free:
            return found
        record, keep = MassRecord(), arm.name == DENSE
        shadow = partial(Shadow, record=record, stride=self.settings.stride)
        _use(engine, arm, shadow if forced else None)
        run = engine.run(
            forced, free, self.settings.free_tokens, self._reference, keep=keep, progress=title
        )
        if forced:
            scores = run.scores
            self._reference = scores.log_probs if keep else self._reference
            found[PERPLEXITY] = {"nll": _means(scores.nll), "steps": scores.nll.shape[1]}
            if scores.kl is not None:
                found[PERPLEXITY]["kl"] = _means(scores.kl)
            if record.layers():
                found[PERPLEXITY]["layers"] = record.layers()
                found[PERPLEXITY]["rows"] = record.rows[record.layers()[0]]
                for what in ("mass", "oracle", "error"):
                    found[PERPLEXITY][what] = [_rounded(row) for row in record.mean(what)]
        if free:
            found[AGREEMENT] = self._agreement(arm, run.tokens)
        return found

    def _agreement(self, arm: Arm, tokens: list[list[int]]) -> dict:
        if arm.name == DENSE:
            return {"tokens": tokens}
        dense = self.result["cells"][DENSE]["tasks"][AGREEMENT]["tokens"]
        agreed = [
            next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours)
            )
            for ours, theirs in zip(tokens, dense, strict=True)
        ]
        return {"agreed": agreed, "of": self.settings.free_tokens}

    def _retrieval(self, engine: Engine, arm: Arm, windows, title: str) -> dict:
        """Every retrieval task in one batch."""
        names = [task for task in self.missing(arm) if task in tasks.TASKS]
        if not names:
            return {}
        s, hay = self.settings, "\n\n".join(text.content for text in self.sources)
        for name in names:
            if name not in self._prompts:
                self._prompts[name] = tasks.prompts(
                    engine.tokenizer, name, hay, s.context - s.answer_tokens, s.prompts, s.seed
                )
        prompts = [(name, prompt) for name in names for prompt in self._prompts[name]]
        _use(engine, arm)
        run = engine.run((), [p.ids for _, p in prompts], s.answer_tokens, progress=title)
        found: dict[str, dict] = {name: {"scores": []} for name in names}
        for (name, prompt), ids in zip(prompts, run.tokens, strict=True):
            found[name]["scores"].append(round(prompt.score(engine.tokenizer.decode(ids)), 4))
        return found

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = self.path.with_name(f"{self.path.name}.partial")
        partial_file.write_text(json.dumps(self.result) + "\n")
        partial_file.replace(self.path)


def _use(engine: Engine, arm: Arm, shadow=None) -> None:
    def wrap(backend, layer):
        if arm.selector:
            backend = SelectorBackend(backend, arm.selector)
        return shadow(backend, layer) if shadow else backend

    engine.use(arm.options, wrap)


def _load(path: Path) -> dict:
    try:
        data = json.loads(path.read_text())
        if data["format"] == FORMAT and data["version"] == VERSION:
            return data
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise AdamasError(f"{path} is not a results file of this release: give another --output.")


def _means(values: torch.Tensor) -> list[float]:
    """Per window."""
    return _rounded(values.double().mean(1), 6)


def _rounded(values: torch.Tensor, digits: int = 4) -> list[float]:
    return [round(value, digits) for value in values.tolist()]


def _environment() -> dict:
    import platform

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "vllm-adamas": __version__,
        "vllm": compat.vllm_version(),
        "torch": torch.__version__,
        "device": device or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
