"""RULER (arXiv 2404.06654): its thirteen tasks, generated from their published definitions with a seed.

Sizes, counts, kinds of needles and metrics are RULER's (its table 5 and ``scripts/synthetic.yaml``). Words of
the prompts, the list of words and the prose that hides the needles are this project's, so a score is near a
published one without being the same measurement. Each task's text grows with a size (sentences, needles, words or
documents), and the largest size that the length in tokens admits is taken.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from uuid import UUID

from vllm_adamas.errors import AdamasError
from vllm_adamas.evaluate.samples import Sample, any_of, question_ids, share_of
from vllm_adamas.evaluate.tasks import NOISE, WORDS

SHORT = 4096  #: lengths below this have fewer repetitions of words, as in RULER
DEPTHS = 40  #: evenly spaced places of needles, from the start of the text to its end
LEAST = 10  #: the smallest size of a text, in sentences, needles, words or documents
STEPS = 64  #: a text that is too long loses this fraction of its size at a time
FULL = 0.95  #: a text that takes less of its room grows once
FILLED = 0.75  #: share of the room that a prompt takes at least


@dataclass(frozen=True)
class Document:
    """A question with its documents: those it was asked about, and related ones that may be added first."""

    question: str
    answers: tuple[str, ...]
    own: tuple[str, ...]
    related: tuple[str, ...] = ()


@dataclass(frozen=True)
class Material:
    """What the texts are made of.

    Args:
        sentences: of the prose that hides needles, in order; repeated where a text needs more.
        words: distinct words.
        questions: by task, ``qa_1`` and ``qa_2``, for the tasks whose data are at hand.
    """

    sentences: Sequence[str]
    words: Sequence[str]
    questions: dict[str, list[Document]] = field(default_factory=dict)

    @classmethod
    def of(cls, prose: str, questions: dict[str, list[Document]]) -> Material:
        sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+", prose) if part.strip()]
        words = dict.fromkeys(re.findall(r"\b[a-z]{4,10}\b", prose.lower()))
        return cls([" ".join(s.split()) for s in sentences], list(words), questions)


@dataclass(frozen=True)
class Question:
    """A prompt: its text, the start of the answer, which the model continues, and the expected strings."""

    text: str
    answer: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """
    Args:
        build: ``build(rng, size, length, material)``; longer as the size grows.
        tokens: largest number of tokens of an answer.
        score: ``score(expected, answer)``.
        data: the option that names the data file, for tasks that need one.
    """

    build: Callable[[Random, int, int, Material], Question]
    tokens: int
    score: Callable[[Sequence[str], str], float] = share_of
    data: str | None = None


def _word(rng: Random) -> str:
    return rng.choice(WORDS).replace(" ", "-")


def _number(rng: Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def _uuid(rng: Random) -> str:
    return str(UUID(int=rng.getrandbits(128), version=4))


KINDS = {"numbers": _number, "uuids": _uuid}


def _niah(
    rng: Random,
    size: int,
    length: int,
    material: Material,
    *,
    hay: str = "prose",
    key: Callable[[Random], str] = _word,
    kind: str = "numbers",
    keys: int = 1,
    values: int = 1,
    asked: int = 1,
) -> Question:
    """Needles in a haystack: ``keys`` keys with ``values`` values each, of which ``asked`` keys are asked for."""

    def fact(name: str, value: str) -> str:
        return f"One of the special magic {kind} for {name} is: {value}."

    names: dict[str, list[str]] = {}
    while len(names) < max(keys, asked):
        names.setdefault(key(rng), [KINDS[kind](rng) for _ in range(values)])
    needles = [fact(name, value) for name, found in names.items() for value in found]
    rng.shuffle(needles)
    if hay == "prose":
        lines = [material.sentences[i % len(material.sentences)] for i in range(size)]
    elif hay == "noise":
        lines = [NOISE] * size
    else:  # needles that nobody asks for
        lines = []
        while len(lines) < size:
            if (other := key(rng)) not in names:
                lines.append(fact(other, KINDS[kind](rng)))
    depths = sorted(rng.sample(range(DEPTHS), len(needles)))
    for depth, needle in reversed(list(zip(depths, needles, strict=True))):
        lines.insert(round(size * depth / (DEPTHS - 1)), needle)
    chosen = rng.sample(list(names), asked)
    wanted = ", ".join(chosen[:-1]) + f", and {chosen[-1]}" if asked > 1 else chosen[0]
    context = (" " if hay == "prose" else "\n").join(lines)
    many = asked * values > 1
    what, verb = (kind, "are") if many else (kind.removesuffix("s"), "is")
    return Question(
        f"Special magic {kind} are hidden in the text below. Remember them: you will be asked for them at the "
        f"end.\n{context}\nWhat {verb} {'all ' if many else ''}the special magic {what} for {wanted} in the "
        "text above?",
        f"The special magic {what} for {wanted} in the text above {verb}",
        tuple(value for name in chosen for value in names[name]),
    )


def _chain(rng: Random, size: int, letters: int) -> Question:
    """A value and four hops from variable to variable, hidden in ``size`` lines of noise."""
    names: list[str] = []
    while len(names) < 5:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = rng.randrange(10**4, 10**5)
    facts = [f"VAR {names[0]} = {value}"]
    facts += [f"VAR {after} = VAR {before}" for before, after in pairwise(names)]
    lines = [NOISE] * size
    places = sorted(rng.sample(range(size + 1), len(facts)))
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        lines.insert(place, fact)
    context = "\n".join(lines)
    return Question(
        f"Assignments of variables are hidden in the text below. Follow the chain from one to the next.\n{context}\n"
        f"Which variables have the value {value} according to the text above?",
        f"In the chain of assignments above, {len(names)} variables have the value {value}:",
        tuple(names),
    )


def _variable_tracking(rng: Random, size: int, length: int, material: Material) -> Question:
    example = _chain(rng, LEAST, letters=3)
    return _after(example, " ".join(example.expected), _chain(rng, size, letters=5))


def _list(rng: Random, words: Sequence[str], often: int, seldom: int) -> Question:
    """A numbered list in which the first ten words stand ``often``, the others ``seldom`` times."""
    common, others = words[:10], words[10:]
    entries = [*common] * often + [*others] * seldom
    rng.shuffle(entries)
    context = " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))
    return Question(
        "Some words stand in the numbered list below more often than others. Remember those that are most "
        f"frequent.\n{context}\nWhich 10 words are the most frequent in the list above?",
        "The 10 most frequent words of the list above are:",
        tuple(common),
    )


def _common_words(rng: Random, size: int, length: int, material: Material) -> Question:
    words = rng.sample(material.words, min(size + 10, len(material.words)))
    short = length < SHORT
    shown = rng.sample(material.words, 20 if short else 40)
    example = _list(rng, shown, *((3, 1) if short else (10, 3)))
    found = " ".join(f"{number}. {word}" for number, word in enumerate(example.expected, 1))
    return _after(example, found, _list(rng, words, *((6, 1) if short else (30, 3))))


def _after(example: Question, answer: str, question: Question) -> Question:
    """The question after an example with its answer."""
    text = f"{example.text}\n{example.answer} {answer}\n\n{question.text}"
    return Question(text, question.answer, question.expected)


def _frequent_words(rng: Random, size: int, length: int, material: Material) -> Question:
    """Coded words whose frequencies follow a zeta distribution with exponent 2; the first is noise."""
    coded: dict[str, None] = {}
    while len(coded) < max(LEAST, length // 50):
        coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    ranked = ["...", *coded]
    first = 10 * size / (math.pi**2 / 6)  # ten words of the text per step of the size
    entries = [word for rank, word in enumerate(ranked, 1) for _ in range(int(first / rank**2))]
    rng.shuffle(entries)
    return Question(
        "Count how often each coded word stands in the text below, and find the three most frequent ones. "
        f"{' '.join(entries)}\nWhich three coded words are the most frequent in the text above? Leave the dots "
        "'...' out, and explain nothing.",
        "The three most frequent coded words of the text above are:",
        tuple(ranked[1:4]),
    )


def _questions(rng: Random, size: int, length: int, material: Material, *, task: str) -> Question:
    """A question on some documents, among ``size`` documents of the same data."""
    every = material.questions[task]
    asked = rng.choice(every)
    documents = dict.fromkeys(asked.own)
    missing = max(0, size - len(documents))
    documents |= dict.fromkeys(rng.sample(asked.related, min(missing, len(asked.related))))
    others = rng.sample(every, len(every)) if len(documents) < size else []
    for other in others:
        for document in other.own:
            if len(documents) < size and document not in asked.related:
                documents[document] = None
    shuffled = rng.sample(list(documents), len(documents))
    context = "\n\n".join(f"Document {n}:\n{text}" for n, text in enumerate(shuffled, 1))
    order = "Answer the question from the documents. Give the answer alone, without other words."
    return Question(
        f"{order}\n\n{context}\n\n{order}\n\nQuestion: {asked.question}", "Answer:", asked.answers
    )


TASKS: dict[str, Task] = {
    "niah_single_1": Task(partial(_niah, hay="noise"), 128),
    "niah_single_2": Task(_niah, 128),
    "niah_single_3": Task(partial(_niah, kind="uuids"), 128),
    "niah_multikey_1": Task(partial(_niah, keys=4), 128),
    "niah_multikey_2": Task(partial(_niah, hay="needles"), 128),
    "niah_multikey_3": Task(partial(_niah, hay="needles", key=_uuid, kind="uuids"), 128),
    "niah_multivalue": Task(partial(_niah, values=4), 128),
    "niah_multiquery": Task(partial(_niah, asked=4), 128),
    "vt": Task(_variable_tracking, 30),
    "cwe": Task(_common_words, 120),
    "fwe": Task(_frequent_words, 50),
    "qa_1": Task(partial(_questions, task="qa_1"), 32, any_of, "--squad"),
    "qa_2": Task(partial(_questions, task="qa_2"), 32, any_of, "--hotpotqa"),
}


def samples(
    tokenizer, task: str, length: int, count: int, seed: int, material: Material
) -> list[Sample]:
    """The first ``count`` samples of a task; each is determined by task, length, seed, its number and material.

    Args:
        length: tokens of a prompt and its answer together, at most.

    Raises:
        AdamasError: the length is too short for the task, or the material does not fill it.
    """
    definition = TASKS[task]
    size, made = None, []
    for number in range(count):

        def at(size: int, number: int = number) -> tuple[list[int], Question]:
            rng = Random(f"{task} {length} {seed} {number}")
            question = definition.build(rng, size, length, material)
            return question_ids(tokenizer, question.text, question.answer), question

        room = length - definition.tokens
        if size is None:
            size = _largest(lambda size: len(at(size)[0]), room)
        own = size
        ids, question = at(own)
        if len(ids) < FULL * room:
            own = own * room // len(ids)
            ids, question = at(own)
        while len(ids) > room and own > LEAST:
            own = max(LEAST, own - max(1, own // STEPS))
            ids, question = at(own)
        if len(ids) > room:
            raise AdamasError(
                f"the task {task} needs {len(ids) + definition.tokens} tokens and has a length of {length}: raise "
                "--lengths or leave it out of --tasks."
            )
        if len(ids) < FILLED * room:
            raise AdamasError(
                f"the task {task} fills {len(ids) + definition.tokens} of {length} tokens, for lack of distinct "
                "words or documents: give longer texts with --text (cwe) or a larger data file (qa), or leave it "
                "out of --tasks."
            )
        made.append(Sample(ids, definition.tokens, partial(definition.score, question.expected)))
    return made


def _largest(tokens: Callable[[int], int], room: int) -> int:
    """The largest size, from LEAST, whose text fits the room; the text grows with the size, or stops to."""
    low, high = LEAST, 2 * LEAST
    while tokens(high) <= room and high <= room:  # a unit has a token at least
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= room else (low, middle)
    return low


def squad(path: str) -> list[Document]:
    """The questions of a SQuAD file (version 1.1 or 2.0) that have answers.

    Raises:
        AdamasError: the file cannot be read or is something else.
    """

    def parse(data) -> list[Document]:
        found = []
        for article in data["data"]:
            contexts = [paragraph["context"] for paragraph in article["paragraphs"]]
            for paragraph in article["paragraphs"]:
                own = paragraph["context"]
                related = tuple(context for context in contexts if context != own)
                for asked in paragraph["qas"]:
                    answers = tuple(answer["text"] for answer in asked["answers"])
                    if answers:
                        found.append(Document(asked["question"], answers, (own,), related))
        return found

    return _read(path, "--squad", "SQuAD's dev-v2.0.json", parse)


def hotpotqa(path: str) -> list[Document]:
    """The questions of a HotpotQA file.

    Raises:
        AdamasError: the file cannot be read or is something else.
    """

    def parse(data) -> list[Document]:
        return [
            Document(
                asked["question"],
                (asked["answer"],),
                tuple(f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]),
            )
            for asked in data
        ]

    return _read(path, "--hotpotqa", "HotpotQA's hotpot_dev_distractor_v1.json", parse)


def _read(path: str, option: str, example: str, parse: Callable) -> list[Document]:
    try:
        found = parse(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise AdamasError(
            f"{option} {path} cannot be read ({error.strerror}): give a file such as {example}."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        found = []
    if not found:
        raise AdamasError(f"{option} {path} holds no questions: give a file such as {example}.")
    return found
