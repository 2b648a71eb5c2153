"""A study: every task under every configuration, saved cell by cell so that it can be resumed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from vllm_adamas.config import AdamasConfig
from vllm_adamas.environment import Environment
from vllm_adamas.errors import AdamasError
from vllm_adamas.evaluate import tasks, texts
from vllm_adamas.evaluate.engine import Engine, Request
from vllm_adamas.evaluate.recorders import MassRecord, Shadow
from vllm_adamas.evaluate.selectors import SelectorBackend
from vllm_adamas.identity import identify
from vllm_adamas.page import write_whole

FORMAT, VERSION = "vllm-adamas-eval", 2
DENSE = "dense"
PERPLEXITY, AGREEMENT = "perplexity", "agreement"
TASKS = (PERPLEXITY, AGREEMENT, *tasks.TASKS)

#: Families of configurations; a family with a budget is a configuration. ``default`` is what a server runs
#: without other options; ``dot`` and ``dot-max`` differ from it in what they name.
DEFAULT = "default"
FAMILIES: dict[str, dict] = {
    DEFAULT: {"score": "dot", "selection": "kv_head"},
    "dot": {"score": "dot", "selection": "kv_head", "combine": "sum", "num_dense_layers": 1},
    "dot-max": {"score": "dot", "selection": "kv_head", "combine": "max", "num_dense_layers": 1},
    "dot-query-head": {"score": "dot", "selection": "query_head"},
    "manhattan": {"score": "manhattan", "selection": "query_head"},
    "manhattan-window": {
        "score": "manhattan",
        "selection": "query_head",
        "num_sink_tokens": 4,
        "recent_window": 32,
    },
    "manhattan-kv-head": {"score": "manhattan", "selection": "kv_head"},
    "oracle": {"selector": "oracle", "num_dense_layers": 1},
    "quest": {"selector": "quest", "num_dense_layers": 1},
    "streaming-llm": {"selector": "streaming_llm", "num_dense_layers": 1},
}


@dataclass(frozen=True)
class Arm:
    """One configuration of a comparison.

    Args:
        name: unique name in the results.
        options: options of the backend.
        family, budget: position in tables and plots; budget 0 means dense or varying.
        selector: reference selector used instead of the backend's own scan and select.
        batched: whether requests carry the budget, so that all budgets of a family run in one batch.
            Otherwise the configuration alone sets the budget, as in a server.
    """

    name: str
    family: str
    budget: int
    options: dict = field(default_factory=dict, hash=False)
    selector: str | None = None
    batched: bool = True

    @classmethod
    def dense(cls) -> Arm:
        return cls(DENSE, DENSE, 0, {"token_budget": 1.0}, batched=False)

    @classmethod
    def of(cls, family: str, budget: int, profile: str | None = None) -> Arm:
        """A family with a budget; with a profile its family is called ``<family>+profile``.

        Raises:
            AdamasError: the family is unknown.
        """
        if family not in FAMILIES:
            raise AdamasError(
                f"{family} is not a configuration: choose among {', '.join(FAMILIES)}, or give --config."
            )
        options = dict(FAMILIES[family])
        selector = options.pop("selector", None)
        if profile:
            options["profile"], family = profile, f"{family}+profile"
        # A request carries one budget, for all layers.
        batched = not AdamasConfig.parse(options).resolved().layer_budgets
        options["token_budget"] = budget
        return cls(f"{family}-{budget}", family, budget, options, selector, batched)

    def group(self) -> tuple:
        """Key of arms that differ in their budgets alone; they run in one batch."""
        options = {k: v for k, v in self.options.items() if k != "token_budget"}
        alone = "" if self.batched else self.name
        return self.selector, json.dumps(options, sort_keys=True), alone

    def own_budget(self) -> int | None:
        """The budget that each request carries; None if the configuration sets it."""
        return self.budget if self.batched else None

    def fits(self) -> bool:
        """Whether the budget leaves tokens to select besides sinks and recent window."""
        forced = self.options.get("num_sink_tokens", 0) + self.options.get("recent_window", 0)
        return self.budget == 0 or self.budget > forced


def without_folders(options: dict) -> dict:
    """Options as results name them: a profile by its file's name, because folders of this host stay out."""
    return {
        key: Path(value).name if key == "profile" and value else value
        for key, value in options.items()
    }


@dataclass(frozen=True)
class Settings:
    """Settings shared by all cells of a results file.

    Args:
        context: tokens of a window or prompt, its continuation included.
        windows, steps: maximum number of text windows, and scored tokens of each.
        prompts: expected strings per retrieval task; see :func:`tasks.prompts`.
        free_tokens: greedy tokens for the agreement with dense.
        answer_tokens: greedy tokens of an answer.
        stride: decode steps from one comparison with dense attention to the next.
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

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request; by default the context, which may be the model's maximum."""
        return self.context + max(0, self.free_tokens - self.steps - 1)


class Study:
    """
    Args:
        path: the results file; cells that it holds are not run again.
        retrieval_budgets: budgets for which retrieval runs too; empty means all.
        selector_tasks: tasks that reference selectors run.

    Raises:
        AdamasError: the file belongs to another study.
    """

    def __init__(
        self,
        settings: Settings,
        sources: Sequence[texts.Text],
        path: Path,
        retrieval_budgets: Sequence[int] = (),
        selector_tasks: Sequence[str] = TASKS,
    ):
        self.sources, self.path = sources, path
        self.retrieval_budgets, self.selector_tasks = tuple(retrieval_budgets), selector_tasks
        self.settings = settings = Settings(
            **{**asdict(settings), "texts": {text.name: text.sha256 for text in sources}}
        )
        tasks.check_names(settings.tasks, TASKS)
        known = {"model": Path(settings.model).name}  # folders of this host stay out of the results
        known["options"] = without_folders(settings.options)
        wanted = json.loads(json.dumps({**asdict(settings), **known}))
        self.result = {
            "format": FORMAT,
            "version": VERSION,
            "settings": wanted,
            "environment": Environment.capture().record(),
            "cells": {},
        }
        if path.exists():
            self.result = load(path)
            if different := _different(_settings({"settings": wanted}), _settings(self.result)):
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
        if arm.selector:
            wanted = [task for task in wanted if task in self.selector_tasks]
        return [task for task in self.settings.tasks if task in wanted and task not in done]

    def run(self, arms: Sequence[Arm], **engine_options) -> dict:
        """Runs the missing cells, dense first, and returns the results.

        Args:
            engine_options: arguments of :class:`Engine`.

        Raises:
            AdamasError: the model or a configuration cannot be served.
        """
        arms = [Arm.dense(), *(arm for arm in arms if arm.name != DENSE and arm.fits())]
        todo = [arm for arm in arms if self.missing(arm)]
        if not todo:
            return self.result
        settings = self.settings
        engine = Engine(
            settings.model, settings.max_model_len, options=settings.options, **engine_options
        )
        for arm in todo:
            engine.check(arm.options)
        self.result["model"] = identify(engine.model_config).model_dump()
        windows = texts.windows(
            engine.tokenizer, self.sources, settings.context, settings.steps, settings.windows
        )
        groups: dict[tuple, list[Arm]] = {}
        for arm in todo:
            groups.setdefault(arm.group(), []).append(arm)
        runs = [(part, some) for part in (self._text, self._retrieval) for some in groups.values()]
        runs.sort(key=lambda run: run[1][0].selector is not None)  # slow and least important
        for number, (part, group) in enumerate(runs, 1):
            started = time.monotonic()
            names = ", ".join(arm.name for arm in group)
            found = part(engine, group, windows, f"[{number}/{len(runs)}] {names}")
            for arm, results in found.items():
                self._cell(arm)["tasks"].update(results)
            if found:
                self._save()
                print(f"{names}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        engine.close()
        return self.result

    def _cell(self, arm: Arm) -> dict:
        options = without_folders(arm.options)
        empty = {"family": arm.family, "budget": arm.budget, "options": options, "tasks": {}}
        return self.result["cells"].setdefault(arm.name, empty)

    def _text(self, engine: Engine, group: list[Arm], windows: list[Request], title: str) -> dict:
        """Perplexity and agreement: the same windows, forced and free, with all budgets in one batch."""
        forced = [arm for arm in group if PERPLEXITY in self.missing(arm)]
        free = [arm for arm in group if AGREEMENT in self.missing(arm)]
        if not forced and not free:
            return {}
        is_dense = group[0].name == DENSE
        if forced and self._reference is None and not is_dense:
            use(engine, Arm.dense().options)
            dense = engine.run(windows, keep=True, progress=f"{title}: dense first")
            self._reference = dense.log_probs
        requests = [replace(w, budget=arm.own_budget()) for arm in forced for w in windows]
        requests += [
            Request(w.prompt, tokens=self.settings.free_tokens, budget=arm.own_budget())
            for arm in free
            for w in windows
        ]
        record = MassRecord(pooled=not group[0].batched)
        shadow = partial(Shadow, record=record, stride=self.settings.stride)
        arm = _largest(group)
        use(engine, arm.options, arm.selector, shadow if forced and not is_dense else None)
        run = engine.run(requests, reference=self._reference, keep=is_dense, progress=title)
        if is_dense:
            self._reference = run.log_probs
        found: dict[Arm, dict] = {arm: {} for arm in group}
        for number, arm in enumerate(forced):
            mine = slice(number * len(windows), (number + 1) * len(windows))
            measured = {"nll": _means(run.nll[mine]), "steps": run.nll.shape[1]}
            if run.kl is not None:
                measured["kl"] = _means(run.kl[mine])
            if record.layers():
                layers, budget = record.layers(), arm.own_budget() or 0
                measured |= {"layers": layers, "rows": record.rows[layers[0], budget]}
                for what in ("mass", "oracle", "error"):
                    measured[what] = [_rounded(row) for row in record.mean(what, budget)]
            found[arm][PERPLEXITY] = measured
        rest = iter(run.tokens[len(forced) * len(windows) :])
        for arm in free:
            found[arm][AGREEMENT] = self._agreement(arm, [next(rest) for _ in windows])
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

    def _retrieval(self, engine: Engine, group: list[Arm], windows, title: str) -> dict:
        """All retrieval tasks with all budgets in one batch."""
        s, hay = self.settings, "\n\n".join(text.content for text in self.sources)
        asked = [
            (arm, name, prompt)
            for arm in group
            for name in self.missing(arm)
            if name in tasks.TASKS
            for prompt in self._prompts_of(name, engine.tokenizer, hay)
        ]
        if not asked:
            return {}
        arm = _largest(group)
        use(engine, arm.options, arm.selector)
        run = engine.run(
            [Request(p.ids, tokens=s.answer_tokens, budget=a.own_budget()) for a, _, p in asked],
            progress=title,
        )
        found: dict[Arm, dict] = {}
        for (arm, name, prompt), ids in zip(asked, run.tokens, strict=True):
            scores = found.setdefault(arm, {}).setdefault(name, {"scores": []})["scores"]
            scores.append(round(prompt.score(engine.tokenizer.decode(ids)), 4))
        return found

    def _prompts_of(self, task: str, tokenizer, hay: str) -> list[tasks.Prompt]:
        if task not in self._prompts:
            s = self.settings
            self._prompts[task] = tasks.prompts(
                tokenizer, task, hay, s.context - s.answer_tokens, s.prompts, s.seed
            )
        return self._prompts[task]

    def _save(self) -> None:
        write_whole(self.path, json.dumps(self.result) + "\n")


def _largest(group: list[Arm]) -> Arm:
    """The arm with the largest budget, which launches are sized for."""
    return max(group, key=lambda arm: arm.budget)


def use(engine: Engine, options: dict, selector: str | None = None, shadow=None) -> None:
    """Serves with the options of an arm from now on, and with its selector; recorders wrap its backends."""

    def wrap(backend, number):
        if selector:
            backend = SelectorBackend(backend, selector)
        return shadow(backend, number) if shadow else backend

    engine.use(options, wrap)


def load(path: Path) -> dict:
    """Loads the results that a study saved.

    Raises:
        AdamasError: the file is not a results file of this release.
    """
    try:
        data = json.loads(path.read_text())
        if data["format"] == FORMAT and data["version"] == VERSION:
            Environment.model_validate(data["environment"])
            return data
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise AdamasError(f"{path} is not a results file of this release: give another --output.")


def merge(results: Sequence[dict]) -> dict:
    """Merges studies that ran separately; a cell measured by several is taken from the first.

    Rounding depends on the shape of a batch, so each text cell keeps the dense run that it is paired with.

    Raises:
        AdamasError: the machines differ, or any setting other than the tasks.
    """
    first, *others = results
    merged = json.loads(json.dumps(first))
    for other in others:
        for part, compared in (("settings", _settings), ("environment", _environment)):
            if different := _different(compared(first), compared(other)):
                raise AdamasError(
                    f"studies with different {part} ({', '.join(different)}) do not belong into one "
                    "table: give those of one study."
                )
        for name, cell in other["cells"].items():
            mine = merged["cells"].setdefault(name, {**cell, "tasks": {}})
            found = dict(cell["tasks"])
            if name != DENSE and PERPLEXITY in found:
                dense = other["cells"][DENSE]["tasks"][PERPLEXITY]["nll"]
                found[PERPLEXITY] = {"dense": dense, **found[PERPLEXITY]}
            mine["tasks"] = {**found, **mine["tasks"]}
    families = list(dict.fromkeys(cell["family"] for cell in merged["cells"].values()))
    ordered = sorted(
        merged["cells"].items(), key=lambda x: (families.index(x[1]["family"]), x[1]["budget"])
    )
    merged["cells"] = dict(ordered)
    done = {task for result in results for task in result["settings"]["tasks"]}
    merged["settings"]["tasks"] = [task for task in TASKS if task in done]
    return merged


def _settings(result: dict) -> dict:
    """The settings that two runs of one study share."""
    return {key: value for key, value in result["settings"].items() if key != "tasks"}


def _environment(result: dict) -> dict:
    """The part of the environment that two runs of one study share."""
    return Environment.model_validate(result["environment"]).compared()


def _different(mine: dict, theirs: dict) -> list[str]:
    """Keys under which two tables differ."""
    return [key for key in mine if mine[key] != theirs.get(key)]


def _means(values: torch.Tensor) -> list[float]:
    """Means per window."""
    return _rounded(values.double().mean(1), 6)


def _rounded(values: torch.Tensor, digits: int = 4) -> list[float]:
    return [round(value, digits) for value in values.tolist()]
