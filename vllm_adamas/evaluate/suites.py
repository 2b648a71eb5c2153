"""Suites: published tasks answered greedily, by the stock backend and by adamas with each configuration.

Every answer is a line of a file, from which a run that was interrupted goes on. The stock backend answers first, in
a process of its own. Then one adamas engine answers under all configurations, so that it prefills each prompt once.
"""

from __future__ import annotations

import fcntl
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from vllm_adamas.environment import Environment, different
from vllm_adamas.errors import AdamasError
from vllm_adamas.evaluate import texts
from vllm_adamas.evaluate.process import EngineProcess
from vllm_adamas.evaluate.samples import Sample
from vllm_adamas.evaluate.study import DENSE, Arm, without_folders

FORMAT, VERSION = "vllm-adamas-suite", 1
#: adamas with a budget that covers every context: what its kernels alone change.
WHOLE = Arm("whole context", "whole context", 0, {"token_budget": 1.0}, batched=False)


@dataclass(frozen=True)
class Suite:
    """
    Args:
        name: of the suite.
        tasks: their names.
        samples: ``samples(task, length, count)``; a larger count only adds samples.
        left_out: tasks of the suite that do not run, and why.
        control: whether :data:`WHOLE` runs too.
        size: number of samples that a task has.
    """

    name: str
    tasks: tuple[str, ...]
    samples: Callable[[str, int, int], list[Sample]]
    left_out: dict[str, str]
    control: bool = False
    size: Callable[[str], int] = lambda task: sys.maxsize


def agreement(tokenizer, sources: Sequence[texts.Text], steps: int, seed: int) -> Suite:
    """Greedy continuations of ``steps`` tokens of texts, cut at random places, to compare them token by token.

    Raises (samples):
        AdamasError: the length holds no more than the continuation, or no text is as long as a prompt.
    """
    start = list(tokenizer("").input_ids)
    tokens = [
        tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids
        for text in sources
    ]

    def samples(task: str, length: int, count: int) -> list[Sample]:
        body = length - steps - len(start)
        if body < 1:
            raise AdamasError(
                f"--steps {steps} does not fit into a length of {length}: give fewer steps."
            )
        long = [ids for ids in tokens if len(ids) >= body]
        if not long:
            raise AdamasError(
                f"no text holds the {body} tokens of a prompt: lower --lengths or give longer texts with --text."
            )
        made = []
        for number in range(count):
            rng = Random(f"{task} {length} {seed} {number}")
            (ids,) = rng.choices(long, [len(ids) for ids in long])
            first = rng.randrange(len(ids) - body + 1)
            made.append(Sample(start + ids[first : first + body], steps, None, stops=False))
        return made

    return Suite("agreement", ("agreement",), samples, {}, control=True)


class Ledger:
    """The answers of a suite, a line each, behind a line with the settings.

    Args:
        path: the file; it is made if it is not there.
        settings: what has to be the same for answers to belong together.

    Raises:
        AdamasError: the file belongs to a run with other settings, on another host or of other versions.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.head = {
            "format": FORMAT,
            "version": VERSION,
            "settings": json.loads(json.dumps(settings)),
            "environment": Environment.capture().record(),
        }
        self.arms: dict[str, dict] = {}
        self.answers: dict[tuple[str, int, str, int], dict] = {}  # by task, length, arm and number
        if path.exists():
            self._load()

    def _load(self) -> None:
        held, arms, answers = read(self.path)
        if found := different(self.head, held):
            raise AdamasError(
                f"{self.path} holds answers of other settings ({', '.join(found)}): give another --output or "
                "remove the file."
            )
        self.head, self.arms = held, arms
        self.answers = {key_of(answer): answer for answer in answers}

    @contextmanager
    def writing(self) -> Iterator[Callable[[Sequence[dict]], None]]:
        """Gives the function that adds lines, after the part of a line that a killed run has left is cut off.

        Raises:
            AdamasError: another process writes to the file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise AdamasError(
                    f"another run writes to {self.path}: wait for it or give another --output."
                ) from None
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)

            def add(lines: Sequence[dict]) -> None:
                file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
                file.flush()

            if file.tell() == 0:
                add([self.head])
            yield add

    def missing(self, task: str, length: int, arm: str, count: int) -> list[int]:
        """Numbers of the samples without an answer."""
        return [n for n in range(count) if (task, length, arm, n) not in self.answers]

    def check(self, arms: Sequence[Arm]) -> None:
        """
        Raises:
            AdamasError: the file holds answers under another configuration of the same name.
        """
        for arm in arms:
            if self.arms.get(arm.name, _told(arm)) != _told(arm):
                raise AdamasError(
                    f"{self.path} holds answers of another configuration {arm.name} "
                    f"({json.dumps(self.arms[arm.name]['options'])}): give another --output."
                )


def _told(arm: Arm) -> dict:
    """The line of a configuration."""
    told = {"configuration": arm.name, "family": arm.family, "budget": arm.budget}
    return {**told, "options": without_folders(arm.options)}


def key_of(answer: dict) -> tuple[str, int, str, int]:
    """Task, length, configuration and number of an answer."""
    return answer["task"], answer["length"], answer["arm"], answer["sample"]


def read(path: Path) -> tuple[dict, dict[str, dict], list[dict]]:
    """The head of a file of answers, the lines of its configurations by name, and its answers.

    A last line without its end is left out: the run was killed while it wrote.

    Raises:
        AdamasError: the file is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        head, *others = map(json.loads, lines)
        if (head["format"], head["version"]) == (FORMAT, VERSION):
            Environment.model_validate(head["environment"])
            arms = {x["configuration"]: x for x in others if "configuration" in x}
            answers = [line for line in others if "configuration" not in line]
            list(map(key_of, answers))
            return head, arms, answers
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise AdamasError(f"{path} holds no answers of a suite of this release: give another --output.")


@dataclass(frozen=True)
class Run:
    """One run of a suite.

    Args:
        model: folder or hub name.
        arms: configurations besides dense.
        lengths: tokens of a prompt with its answer.
        count: samples of each task at each length, or all where it has fewer.
        batch: requests of one step, at most; fewer where the KV cache does not hold their prompts.
        engine_options: of the engines.
    """

    suite: Suite
    model: str
    tokenizer: Any
    arms: Sequence[Arm]
    lengths: Sequence[int]
    count: int
    batch: int
    engine_options: dict

    def into(self, ledger: Ledger) -> None:
        """Answers what the ledger lacks.

        Raises:
            AdamasError: a prompt, the model or a configuration is impossible, or the settings have changed.
        """
        arms = [*self.arms, WHOLE] if self.suite.control else list(self.arms)
        ledger.check(arms)
        todo = {
            stock: self._missing(ledger, some) for stock, some in ((True, [None]), (False, arms))
        }
        for task, length in dict.fromkeys(key[:2] for part in todo.values() for key in part):
            self.suite.samples(task, length, 1)  # refuses what is impossible
        if not any(todo.values()):
            return
        tokens = sum(length for part in todo.values() for _, length, _, _ in part)
        with _bar(tokens) as bar, ledger.writing() as add:
            for stock, missing in todo.items():
                if missing:
                    self._part(stock, arms, missing, ledger, add, bar)

    def _missing(self, ledger: Ledger, arms: Sequence[Arm | None]) -> list[tuple]:
        return [
            (task, length, _name(arm), number)
            for length in self.lengths
            for task in self.suite.tasks
            for arm in arms
            for number in ledger.missing(
                task, length, _name(arm), min(self.count, self.suite.size(task))
            )
        ]

    def _part(
        self, stock: bool, arms: Sequence[Arm], missing: list[tuple], ledger: Ledger, add, bar
    ) -> None:
        """The answers of one engine, of which the keys of ``missing`` tell."""
        longest, wanted = max(self.lengths), set(missing)
        with EngineProcess(self.model, longest, arms, stock=stock, **self.engine_options) as engine:
            if not stock:
                new = {arm.name: _told(arm) for arm in arms if arm.name not in ledger.arms}
                add(list(new.values()))
                ledger.arms |= new
            for task, length in dict.fromkeys(key[:2] for key in missing):
                samples = self.suite.samples(task, length, self.count)
                self._compare(ledger, task, length, samples)
                batch = max(1, min(self.batch, engine.capacity // length))
                for first in range(0, len(samples), batch):
                    numbers = range(first, min(first + batch, len(samples)))
                    # One after another, so that the prompts are still in the prefix cache.
                    for arm in [None] if stock else arms:
                        name = _name(arm)
                        asked = [n for n in numbers if (task, length, name, n) in wanted]
                        if asked:
                            bar.set_description(f"{self.suite.name} {length} {task}, {name}")
                            lines = self._answer(engine, arm, task, length, samples, asked)
                            add(lines)
                            ledger.answers |= {key_of(line): line for line in lines}
                            bar.update(length * len(asked))

    def _answer(self, engine: EngineProcess, arm, task, length, samples, asked) -> list[dict]:
        one = samples[asked[0]]
        found = engine.answers(arm, [samples[n].ids for n in asked], one.tokens, one.stops)
        lines = []
        for number, ids in zip(asked, found, strict=True):
            sample = samples[number]
            line = {"task": task, "length": length, "arm": _name(arm), "sample": number}
            line["prompt"] = sample.digest
            if sample.score is None:
                line["tokens"] = ids
            else:
                text = sample.cut(self.tokenizer.decode(ids, skip_special_tokens=True))
                line |= {"answer": text, "score": round(sample.score(text), 4)}
            lines.append(line)
        return lines

    def _compare(self, ledger: Ledger, task: str, length: int, samples: Sequence[Sample]) -> None:
        """
        Raises:
            AdamasError: there are answers to other prompts than these.
        """
        digests = [sample.digest for sample in samples]
        for answer in ledger.answers.values():
            same = (answer["task"], answer["length"]) == (task, length)
            if (
                same
                and answer["sample"] < len(digests)
                and answer["prompt"] != digests[answer["sample"]]
            ):
                raise AdamasError(
                    f"{ledger.path} holds answers to other prompts of {task} at {length}, as after a change of the "
                    "tokenizer: give another --output."
                )


def _name(arm: Arm | None) -> str:
    return DENSE if arm is None else arm.name


def _bar(tokens: int):
    """A progress bar over tokens of prompts with their answers; it estimates the time left."""
    from tqdm import tqdm

    patience = 0.1 if sys.stderr.isatty() else 30
    return tqdm(
        total=tokens, unit="token", unit_scale=True, mininterval=patience, dynamic_ncols=True
    )
