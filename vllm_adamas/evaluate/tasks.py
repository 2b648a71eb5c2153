"""Seeded retrieval tasks over long contexts: passkey, and needle tasks in the manner of RULER.

As in RULER (arXiv 2404.06654), facts ("needles") are hidden in a long text ("hay") and a question
follows at the end. The hay is the prose that is evaluated on. The passkey task is that of arXiv
2305.16300: its hay is a few repeated sentences, and the prompt is plain text without a chat template. An
answer's score is the share of the expected strings that it contains, as in RULER.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from vllm_adamas.errors import AdamasError

ADJECTIVES = (  # noqa: SIM905 (a list would take a line a word)
    "amber bold calm crisp dusty eager faint gentle hollow ivory jolly keen lucky mellow noble olive "
    "proud quiet rapid silver tidy upper vivid wooden young zesty"
).split()
NOUNS = (  # noqa: SIM905
    "anchor basket candle drum engine feather garden hammer island jacket kettle ladder mirror needle "
    "orchard pillow quill ribbon saddle teapot umbrella violin wagon xylophone yacht zipper"
).split()
WORDS = tuple(f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)


NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Needles:
    """The needles and the question of one prompt.

    Args:
        needles: the hidden facts.
        answer: start of the answer.
        expected: strings that the answer must contain.
        noise: whether the hay is repeated sentences without a chat template instead of prose.
    """

    needles: list[str]
    question: str
    answer: str
    expected: list[str]
    noise: bool = False


def _number(rng: Random, digits: int = 7) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _fact(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def passkey(rng: Random) -> Needles:
    """One five-digit number, stated twice in a row."""
    key = _number(rng, 5)
    fact = f"The pass key is {key}. Remember it. {key} is the pass key."
    return Needles([fact], "What is the pass key?", "The pass key is", [key], noise=True)


def _ask(keys: Sequence[str]) -> tuple[str, str]:
    names = ", ".join(keys[:-1]) + f", and {keys[-1]}" if len(keys) > 1 else keys[0]
    question = f"What are all the special magic numbers for {names} mentioned in the text?"
    return question, f"The special magic numbers for {names} mentioned in the text are"


def single(rng: Random) -> Needles:
    """One key, one value."""
    return _needles(rng, asked=1)


def multikey(rng: Random) -> Needles:
    """Four keys, one of which is asked for."""
    return _needles(rng, others=3, asked=1)


def multivalue(rng: Random) -> Needles:
    """Four values of one key, all asked for."""
    return _needles(rng, asked=1, values=4)


def multiquery(rng: Random) -> Needles:
    """Four keys, all asked for."""
    return _needles(rng, asked=4)


def _needles(rng: Random, *, asked: int, others: int = 0, values: int = 1) -> Needles:
    keys = rng.sample(WORDS, asked + others)
    facts, expected = [], []
    for number, key in enumerate(keys):
        for _ in range(values if number < asked else 1):
            value = _number(rng)
            facts.append(_fact(key, value))
            if number < asked:
                expected.append(value)
    question, answer = _ask(keys[:asked])
    return Needles(facts, question, answer, expected)


def variable_tracking(rng: Random) -> Needles:
    """A chain of five assignments; every variable of the chain is asked for."""
    names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(5)]
    value = _number(rng, 5)
    facts = [f"VAR {names[0]} = {value}."]
    facts += [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]
    question = f"Find all variables that are assigned the value {value} in the text above."
    answer = f"The 5 variables that are assigned the value {value} are: VAR"
    return Needles(facts, question, answer, names)


def common_words(rng: Random) -> Needles:
    """Five words listed thirty times each among others listed three times each."""
    common, rare = rng.sample(NOUNS, 5), rng.sample(ADJECTIVES, 20)
    bag = [word for word in common for _ in range(30)] + [word for word in rare for _ in range(3)]
    rng.shuffle(bag)
    facts = ["Word list: " + " ".join(bag[i : i + 21]) + "." for i in range(0, len(bag), 21)]
    question = "What are the 5 most common words in the word lists above?"
    return Needles(facts, question, "The 5 most common words are:", common)


TASKS: dict[str, Callable[[Random], Needles]] = {
    "passkey": passkey,
    "single": single,
    "multikey": multikey,
    "multivalue": multivalue,
    "multiquery": multiquery,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
}


@dataclass(frozen=True)
class Prompt:
    """A task's prompt as token ids, and the strings that a right answer contains."""

    ids: list[int]
    expected: list[str]

    def score(self, answer: str) -> float:
        """Share of the expected strings in the answer."""
        found = answer.lower()
        return sum(text.lower() in found for text in self.expected) / len(self.expected)


def check_names(names: Sequence[str], valid: Sequence[str]) -> None:
    """
    Raises:
        AdamasError: a task is unknown.
    """
    for name in names:
        if name not in valid:
            raise AdamasError(f"{name} is not a task: choose among {', '.join(valid)}.")


def prompts(tokenizer, task: str, hay: str, context: int, count: int, seed: int) -> list[Prompt]:
    """Prompts of at most ``context`` tokens, shorter by at most one sentence; the seed determines them.

    The prompts ask for ``count`` strings in total: a task with four per answer gets ``count / 4`` prompts.

    Raises:
        AdamasError: the context cannot hold the needles and the question.
    """
    first = TASKS[task](Random(0))
    hay = NOISE if first.noise else hay
    sentences = [s.strip() + "." for s in hay.replace("\n", " ").split(".") if s.strip()]
    counted = tokenizer([f" {s}" for s in sentences], add_special_tokens=False).input_ids
    lengths = [len(ids) for ids in counted]
    made = []
    for index in range(math.ceil(count / len(first.expected))):
        rng = Random(f"{task} {seed} {index}")
        needles = TASKS[task](rng)
        frame = len(_ids(tokenizer, needles, []))
        frame += sum(
            len(tokenizer(" " + n, add_special_tokens=False).input_ids) for n in needles.needles
        )
        room = context - frame
        if room < 0:
            raise AdamasError(
                f"the task {task} needs {frame} tokens and the context is {context}: raise --context."
            )
        start = at = rng.randrange(len(sentences))
        while lengths[at % len(sentences)] <= room:
            room -= lengths[at % len(sentences)]
            at += 1
        chosen = [sentences[i % len(sentences)] for i in range(start, at)]
        # The needles keep their order, which a chain of assignments needs.
        places = sorted(rng.randrange(len(chosen) + 1) for _ in needles.needles)
        for place, needle in reversed(list(zip(places, needles.needles, strict=True))):
            chosen.insert(place, needle)
        ids = _ids(tokenizer, needles, chosen)
        while len(ids) > context:  # joining may cost a token
            over = len(ids) - context
            while over > 0:
                chosen.remove(sentences[start % len(sentences)])
                over -= lengths[start % len(sentences)]
                start += 1
            ids = _ids(tokenizer, needles, chosen)
        made.append(Prompt(ids, needles.expected))
    return made


def _ids(tokenizer, needles: Needles, sentences: list[str]) -> list[int]:
    head = "Some special facts are hidden within the following text. Remember them; you will be asked about them later."
    text = f"{head}\n\n{' '.join(sentences)}\n\n{needles.question}"
    if tokenizer.chat_template and not needles.noise:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text + needles.answer, add_special_tokens=False).input_ids)
    return list(tokenizer(f"{text} {needles.answer}").input_ids)
