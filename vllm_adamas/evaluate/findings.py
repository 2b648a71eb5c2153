"""What the answers of a suite show: a record of the report."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from vllm_adamas.environment import Environment
from vllm_adamas.evaluate import report
from vllm_adamas.evaluate.study import DENSE
from vllm_adamas.evaluate.suites import WHOLE, read
from vllm_adamas.page import Chart, Point, Record, Table

PUBLISHED = "ruler_published.json"
FLOOR = 0.1  #: dense has to reach this score in a task for the task to tell whether a budget loses anything
QUANTILE = 1.96  #: of the normal distribution, for intervals of 95 %

#: Pseudo-observations and their weights, without which an interval of few equal values would have no width.
#: Scores: two right and two wrong answers (Agresti and Coull 1998). Differences of pairs: half a pair in each of
#: the four cells of right and wrong (Agresti and Min 2005).
OF_SCORES = ((0.0, 2.0), (1.0, 2.0))
OF_DIFFERENCES = ((-1.0, 0.5), (0.0, 1.0), (1.0, 0.5))


class Estimate(NamedTuple):
    """A mean, its 95 % interval and the number of samples."""

    mean: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float], pseudo: Sequence[tuple[float, float]]) -> Estimate:
        """The mean of the values, with the interval of them and of the pseudo-observations."""
        weighted = [*((value, 1.0) for value in values), *pseudo]
        total = sum(weight for _, weight in weighted)
        middle = sum(value * weight for value, weight in weighted) / total
        spread = sum(weight * (value - middle) ** 2 for value, weight in weighted) / total
        half = QUANTILE * math.sqrt(spread / total)
        least, most = (choose(value for value, _ in pseudo) for choose in (min, max))
        low, high = max(least, middle - half), min(most, middle + half)
        return cls(statistics.fmean(values), low, high, len(values))


def record(path: Path, left_out: dict[str, str], bound: float) -> Record:
    """The record of a file of answers.

    Args:
        left_out: tasks that did not run, and why.
        bound: largest loss that counts as none, as a share of the full score.

    Raises:
        AdamasError: the file is something else.
    """
    head, arms, answers = read(path)
    suite = head["settings"]["suite"]
    make = _agreement if suite == "agreement" else _scores
    notes = [f"Left out: {task}, because {why}." for task, why in left_out.items()]
    made = make(head, arms, answers, bound)
    return made.model_copy(update={"notes": [*made.notes, *notes]})


def _setting(head: dict) -> str:
    environment = Environment.model_validate(head["environment"])
    device, *versions = environment.compared().items()
    settings = head["settings"]
    words = [device[1], *(f"{name} {version}" for name, version in versions), environment.date]
    texts = f" Texts: {', '.join(settings['texts'])}." if settings["texts"] else ""
    return (
        f"{', '.join(map(str, words))}. Seed {settings['seed']}, dtype {settings['dtype']}.{texts}"
    )


# Suites whose answers have scores.


def _scores(head: dict, arms: dict, answers: list[dict], bound: float) -> Record:
    scores: dict[tuple, dict[int, float]] = {}
    for answer in answers:
        key = answer["task"], answer["length"], answer["arm"]
        scores.setdefault(key, {})[answer["sample"]] = answer["score"]
    cells = sorted(dict.fromkeys(key[:2] for key in scores), key=lambda cell: cell[1])
    lengths = list(dict.fromkeys(length for _, length in cells))

    def loss(name: str, some: Sequence[tuple]) -> Estimate | None:
        """Of a configuration: dense less its own scores, in pairs; None without any."""
        pairs = [
            dense - scores[(*cell, name)][number]
            for cell in some
            for number, dense in scores[(*cell, DENSE)].items()
            if number in scores.get((*cell, name), ())
        ]
        return Estimate.of(pairs, OF_DIFFERENCES) if pairs else None

    arms = {name: arm for name, arm in arms.items() if loss(name, cells)}
    compared = [cell for cell in cells if any(loss(name, [cell]) for name in arms)]
    able = [cell for cell in compared if _mean(scores[(*cell, DENSE)]) >= FLOOR]
    tables, values = [], {}
    for length in lengths:
        groups = {task: [(task, length)] for task, at in cells if at == length}
        groups[f"mean of {len(groups)} tasks"] = [cell for some in groups.values() for cell in some]
        rows = []
        for name, some in groups.items():
            dense = Estimate.of(_all(scores, some, DENSE), OF_SCORES)
            row = [name, str(dense.samples), _level(dense)]
            told = {"dense": dense._asdict()}
            for arm in arms:
                lost = loss(arm, some)
                own = _all(scores, some, arm)
                row.append(f"{100 * statistics.fmean(own):.1f} {_change(lost)}" if lost else "")
                told[arm] = (
                    {"score": statistics.fmean(own), "loss": lost._asdict()} if lost else None
                )
            rows.append(row)
            values[f"{name} at {length}"] = told
        title = f"Scores at {length} tokens, of 100"
        tables.append(Table(title=title, headers=["task", "samples", "dense", *arms], rows=rows))
    lines = {
        f"{family}, {length} tokens": [
            Point(x=arm["budget"], y=100 * lost.mean, low=100 * lost.low, high=100 * lost.high)
            for name, arm in arms.items()
            if arm["family"] == family and arm["budget"]
            if (lost := loss(name, [cell for cell in cells if cell[1] == length]))
        ]
        for family in dict.fromkeys(arm["family"] for arm in arms.values())
        for length in lengths
    }
    lines = {name: points for name, points in lines.items() if points}
    charts = (
        [
            Chart(
                title="Loss against dense in points, mean of all tasks, with 95 % intervals",
                x="token budget",
                lines=lines,
            )
        ]
        if lines
        else []
    )
    model, suite = head["settings"]["model"], head["settings"]["suite"]
    published = _published(model, lengths) if suite == "ruler" else []
    notes = [
        "dense: vLLM's stock backend; in brackets the 95 % interval of its score. Others: adamas; in brackets the 95 % "
        "interval of the difference to dense, paired by prompt.",
        "A budget loses nothing measurable if at each length the interval of its mean loss reaches zero and ends below "
        f"{100 * bound:g} points, the interval of no task lies above that, and the same holds for every larger budget.",
    ]
    if suite == "ruler":
        notes.append(
            "The tasks follow RULER's definitions in words of their own: scores are near published ones, and not the "
            "same measurement."
        )
    return Record(
        title=f"{suite}: {model}",
        model=model,
        setting=_setting(head),
        findings=_verdict(arms, able, loss, bound) + _not_counted(compared, able),
        tables=[*tables, *published],
        charts=charts,
        notes=notes,
        values=values,
    )


def _verdict(
    arms: dict[str, dict], cells: Sequence[tuple], loss: Callable, bound: float
) -> list[str]:
    """Which budget loses nothing measurable, per family of configurations.

    Args:
        cells: tasks and lengths that dense is able to do.
        loss: ``loss(configuration, cells)``; None without answers.
    """
    if not cells:
        return [
            f"No budget is shown to lose nothing: dense itself stays below {100 * FLOOR:g} of 100 in every task, so "
            "there is nothing to lose."
        ]
    at = {length: [cell for cell in cells if cell[1] == length] for _, length in cells}

    def fault(name: str) -> str | None:
        """What keeps a configuration from losing nothing."""
        for length, some in at.items():
            tasks = {task: loss(name, [(task, length)]) for task, _ in some}
            for task, found in tasks.items():
                if found is None:
                    return f"has no answers to {task} at {length} tokens"
            mean = loss(name, some)
            if mean.low > 0:
                return f"loses {_lost(mean)} at {length} tokens"
            if mean.high >= bound:
                wide = "an interval that more --prompts would narrow"
                return f"loses {_lost(mean)} at {length} tokens, {wide}"
            for task, found in tasks.items():
                if found.low > bound:
                    return f"loses {_lost(found)} of {task} at {length} tokens"
        return None

    said = []
    for family in dict.fromkeys(arm["family"] for arm in arms.values()):
        names = [name for name, arm in arms.items() if arm["family"] == family]
        names.sort(key=lambda name: arms[name]["budget"], reverse=True)
        passing = list(takewhile(lambda name: fault(name) is None, names))
        if passing:
            name = passing[-1]
            lost = (f"{_lost(loss(name, some))} at {length} tokens" for length, some in at.items())
            said.append(f"{name} loses nothing measurable: {', '.join(lost)}.")
        else:
            said.append(
                f"No budget of {family} is shown to lose nothing: {names[0]} {fault(names[0])}."
            )
    return said


def _not_counted(compared: Sequence[tuple], able: Sequence[tuple]) -> list[str]:
    """Which tasks a verdict leaves out."""
    unable = [f"{task} at {length}" for task, length in compared if (task, length) not in able]
    if not (able and unable):
        return []
    return [
        f"Not counted there, because dense stays below {100 * FLOOR:g} of 100 and could hardly lose anything: "
        f"{', '.join(unable)}."
    ]


def _lost(loss: Estimate) -> str:
    mean, low, high = (100 * value for value in loss[:3])
    return f"{mean:.1f} points [{low:+.1f}, {high:+.1f}] over {loss.samples} prompts"


def _mean(scores: dict[int, float]) -> float:
    return statistics.fmean(scores.values())


def _all(scores: dict, cells: Sequence[tuple], arm: str) -> list[float]:
    return [score for cell in cells for score in scores.get((*cell, arm), {}).values()]


def _level(score: Estimate) -> str:
    mean, low, high = (100 * value for value in score[:3])
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _change(loss: Estimate) -> str:
    return f"[{-100 * loss.high:+.1f}, {-100 * loss.low:+.1f}]"


def _published(model: str, lengths: Sequence[int]) -> list[Table]:
    """Published averages of the model at these lengths; none if there are none."""
    text = files("vllm_adamas.evaluate").joinpath("data", PUBLISHED).read_text(encoding="utf-8")
    data = json.loads(text)
    found = data["averages"].get(model.removeprefix("Meta-"), {})
    rows = [[str(length), str(found[str(length)])] for length in lengths if str(length) in found]
    title = f"Published average of the thirteen tasks for {model} ({data['source']})"
    return [Table(title=title, headers=["tokens", "average"], rows=rows)] if rows else []


# Agreement.


def _agreement(head: dict, arms: dict, answers: list[dict], bound: float) -> Record:
    tokens = {(a["arm"], a["length"], a["sample"]): a["tokens"] for a in answers}
    steps = head["settings"]["steps"]
    rows, values = [], {}
    for length in sorted({answer["length"] for answer in answers}):
        for arm in [*(name for name in arms if name != WHOLE.name), WHOLE.name]:
            pairs = [
                (tokens[arm, length, number], dense)
                for (name, at, number), dense in tokens.items()
                if (name, at) == (DENSE, length) and (arm, length, number) in tokens
            ]
            if not pairs:
                continue
            first = [_first_difference(ours, theirs) for ours, theirs in pairs]
            shares = [
                statistics.fmean(a == b for a, b in zip(ours, theirs, strict=True))
                for ours, theirs in pairs
            ]
            equal = sum(place == steps for place in first)
            told = {"first": report.bootstrap(first), "median": statistics.median(first)}
            told |= {"share": report.bootstrap(shares), "equal": equal, "samples": len(pairs)}
            values[f"{arm} at {length}"] = told
            mean, low, high = told["first"]
            of, least, most = (100 * value for value in told["share"])
            cells = [f"{mean:.1f} [{low:.1f}, {high:.1f}]", f"{told['median']:g}"]
            cells += [f"{of:.1f} [{least:.1f}, {most:.1f}]", str(equal)]
            rows.append([arm, str(length), str(len(pairs)), *cells])
    headers = ["configuration", "tokens", "samples", "tokens until the first difference", "median"]
    headers += ["equal tokens, per cent", "equal to the end"]
    return Record(
        title=f"agreement: {head['settings']['model']}",
        model=head["settings"]["model"],
        setting=_setting(head),
        tables=[
            Table(
                title=f"Greedy continuations of {steps} tokens beside those of dense",
                headers=headers,
                rows=rows,
            )
        ],
        notes=[
            f"{WHOLE.name}: adamas attends to every token, so what differs there is rounding. Greedy decoding turns the "
            "smallest difference into another text, which need not be a worse one.",
            "Tokens are compared place by place, also after the first difference. In brackets 95 % intervals, bootstrap "
            "over prompts, which are cut from the texts at random places and may overlap.",
        ],
        values=values,
    )


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    pairs = zip(ours, theirs, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(ours))
