"""The traffic of a storm: requests of named kinds, generated from one seed.

Prompts are token ids cut from a text, so their lengths are exact. Requests depend on the seed and the
limits alone, never on the clock. Only the history of a chat contains the server's answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
#: Overrides the defaults of the model's generation_config.json.
GREEDY = {"temperature": 0, "repetition_penalty": 1.0}

#: Weight of each kind of unit. Short prompts dominate, so that a slow server answers many.
WEIGHTS = {
    "edge": 26,  # lengths around multiples of the block size, resent while others decode
    "one_token": 8,  # one output token: prefill alone
    "repeated": 6,  # one token or a short sequence, repeated
    "fork": 6,  # several continuations of a shared prefix at once
    "chat": 5,  # each turn resends the history
    "steady": 6,  # long outputs, so that others run next to decodes
    "sampled": 6,  # temperature and a seed
    "penalties": 4,
    "several": 4,  # n > 1
    "guided": 6,  # structured output
    "cut": 6,  # a stream that the client leaves
    "dropped": 6,  # a connection closed before the first token
    "malformed": 5,  # must be refused
    "too_long": 2,  # one token more than the longest context
    "longest": 1,  # exactly the longest context
    "burst": 2,  # more requests at once than the cache may hold
}
MALFORMED: tuple[dict[str, Any] | bytes, ...] = (
    b"{nope",
    {},
    {"prompt": []},
    {"prompt": [10**7]},
    {"prompt": {"text": "x"}},
    {"prompt": [1], "max_tokens": -1},
    {"prompt": [1], "max_tokens": 3, "min_tokens": 9},
    {"prompt": [1], "temperature": -1},
    {"prompt": [1], "top_p": 2},
    {"prompt": [1], "top_k": -7},
    {"prompt": [1], "n": 0},
    {"prompt": [1], "logprobs": 1000},
    {"prompt": [1], "presence_penalty": 9},
    {"prompt": [1], "stop": [""]},
    {"prompt": [1], "seed": "x"},
    {"prompt": [1], "model": "no-such-model"},
    {"prompt": [1], "structured_outputs": {"regex": "(("}},
    {"prompt": [1], "structured_outputs": {"regex": "a", "choice": ["a"]}},
)
TURNS = 4  #: most turns of a chat
QUESTIONS = (
    "Who is Alice?",
    "Tell me more.",
    "Why did the rabbit hurry?",
    "Say that again, shorter.",
    "What happens next?",
    "Count from one to ten.",
)
SCHEMA = {
    "type": "object",
    "properties": {"found": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
    "required": ["found", "size"],
    "additionalProperties": False,
}
GUIDES: tuple[tuple[str, Any], ...] = (
    ("choice", ["yes", "no", "perhaps"]),
    ("regex", r"[0-9]{3}-[a-f]{2}"),
    ("json", SCHEMA),
)


@dataclass(frozen=True)
class Request:
    """One request of the OpenAI API, and its expected outcome.

    Args:
        kind: kind of its unit, a key of :data:`WEIGHTS`.
        body: JSON without ``model``; bytes are sent as they are.
        refused: whether the status must be 4xx.
        greedy: whether tokens must match the reference (:mod:`vllm_adamas.serving.storm.reference`).
        unstable: whether the model itself is unstable on the prompt, so that tokens match in float32 only.
        leave_after: tokens after which the client closes the stream.
        drop_after: seconds after which the client closes the connection, answered or not.
        guide: name and value of the structured output that the text must match.
    """

    kind: str
    path: str
    body: dict[str, Any] | bytes
    refused: bool = False
    greedy: bool = False
    unstable: bool = False
    leave_after: int | None = None
    drop_after: float | None = None
    guide: tuple[str, Any] | None = None


@dataclass(frozen=True)
class Unit:
    """Rounds of requests: a round is sent at once, and rounds one after another.

    In a chat, a request contains only its new message; the client prepends the history.
    """

    number: int
    kind: str
    rounds: list[list[Request]]
    chat: bool = False


@dataclass
class Traffic:
    """An endless sequence of units.

    Args:
        seed: the same seed and limits give the same sequence.
        text: token ids that prompts are cut from.
        max_model_len: longest context of the server in tokens.
        block_size: tokens per KV block.
        max_prompt: tokens of an ordinary prompt; only ``longest`` and ``too_long`` exceed it.
        max_tokens: tokens of an ordinary output.
        burst: requests of a burst.
        kinds: the kinds to send; default: all.
    """

    seed: int
    text: Sequence[int]
    max_model_len: int
    block_size: int = 16
    max_prompt: int = 768
    max_tokens: int = 32
    burst: int = 12
    kinds: Sequence[str] = tuple(WEIGHTS)
    sent: int = field(default=0, init=False)  #: requests generated so far

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._units = 0
        self._limit = min(self.max_prompt, self.max_model_len - self.max_tokens)

    def unit(self) -> Unit:
        kind = self._random.choices(self.kinds, [WEIGHTS[kind] for kind in self.kinds])[0]
        rounds = getattr(self, f"_{kind}")()
        unit = Unit(self._units, kind, rounds, chat=kind == "chat")
        self._units += 1
        self.sent += sum(map(len, rounds))
        return unit

    def _prompt(self, length: int) -> list[int]:
        start = self._random.randrange(len(self.text))
        found = list(self.text[start : start + length])
        while len(found) < length:
            found += self.text[: length - len(found)]
        return found

    def _short(self) -> list[int]:
        return self._prompt(self._random.randint(1, min(64, self._limit)))

    def _outputs(self) -> int:
        return self._random.randint(1, self.max_tokens)

    def _complete(
        self, kind: str, prompt: list[int], tokens: int, greedy: bool = True, **more: Any
    ) -> Request:
        marks = {
            key: more.pop(key)
            for key in ("leave_after", "drop_after", "guide", "unstable")
            if key in more
        }
        body = {
            "prompt": prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": self._random.random() < 0.7,
        }
        if greedy:
            body |= GREEDY | {"logprobs": self._random.choice((0, 0, 1, 5))}
        return Request(kind, COMPLETIONS, body | more, greedy=greedy, **marks)

    def _edge(self) -> list[list[Request]]:
        """A resent prompt of k blocks and r tokens has r tokens to compute, or a block if r is 0."""
        rng, block = self._random, self.block_size
        rest = rng.choice((0, 1, 1, 2, block - 1, rng.randrange(block)))
        most = max(1, (self._limit - rest) // block)
        blocks = rng.randint(1, min(most, 12) if rng.random() < 0.8 else most)
        prompt = self._prompt(min(blocks * block + rest, self._limit))
        times = rng.randint(2, 3)
        return [[self._complete("edge", prompt, rng.choice((1, 2, 5, 12)))] for _ in range(times)]

    def _one_token(self) -> list[list[Request]]:
        return [[self._complete("one_token", self._short(), 1)]]

    def _repeated(self) -> list[list[Request]]:
        rng = self._random
        period = self._prompt(rng.choice((1, 1, 2, 3, 7, self.block_size)))
        length = rng.randint(1, min(300, self._limit))
        prompt = (period * length)[:length]
        return [[self._complete("repeated", prompt, self._outputs(), unstable=True)]]

    def _fork(self) -> list[list[Request]]:
        rng = self._random
        prefix = self._prompt(rng.randint(1, max(1, self._limit - 40)))
        tails = [self._prompt(rng.randint(1, 40)) for _ in range(rng.randint(2, 4))]
        forks = [(prefix + tail)[: self._limit] for tail in tails]
        return [
            [self._complete("fork", prefix, 1)],
            [self._complete("fork", fork, self._outputs()) for fork in forks],
        ]

    def _chat(self) -> list[list[Request]]:
        rng, rounds = self._random, []
        for _ in range(rng.randint(2, TURNS)):
            body = {
                "messages": [{"role": "user", "content": rng.choice(QUESTIONS)}],
                "max_tokens": self._outputs(),
                "logprobs": True,
                "return_token_ids": True,
                "stream": rng.random() < 0.7,
                **GREEDY,
            }
            rounds.append([Request("chat", CHAT, body, greedy=True)])
        return rounds

    def _steady(self) -> list[list[Request]]:
        length = self._random.randint(1, self._limit)
        return [[self._complete("steady", self._prompt(length), self.max_tokens)]]

    def _sampled(self) -> list[list[Request]]:
        rng = self._random
        more = {
            "temperature": rng.choice((0.3, 1.0, 2.0)),
            "seed": rng.randrange(2**31),
            "top_p": rng.choice((0.5, 1.0)),
            "top_k": rng.choice((0, 1, 20)),
        }
        return [[self._complete("sampled", self._short(), self._outputs(), greedy=False, **more)]]

    def _penalties(self) -> list[list[Request]]:
        rng = self._random
        more = {
            "temperature": rng.choice((0, 0.8)),
            "presence_penalty": rng.uniform(-2, 2),
            "frequency_penalty": rng.uniform(-2, 2),
            "repetition_penalty": rng.uniform(0.5, 2),
        }
        return [[self._complete("penalties", self._short(), self._outputs(), greedy=False, **more)]]

    def _several(self) -> list[list[Request]]:
        more = {"temperature": 1.0, "n": self._random.randint(2, 4)}
        return [[self._complete("several", self._short(), self._outputs(), greedy=False, **more)]]

    def _guided(self) -> list[list[Request]]:
        name, value = self._random.choice(GUIDES)
        more = {"ignore_eos": False, "temperature": self._random.choice((0, 1.0))}
        if name == "json":
            form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": value}}
            more["response_format"] = form
        else:
            more["structured_outputs"] = {name: value}
        prompt = self._short()
        tokens = min(80, self.max_model_len - len(prompt))  # room for whitespace within JSON
        more["guide"] = (name, value)
        request = self._complete("guided", prompt, tokens, greedy=False, **more)
        return [[request]]

    def _cut(self) -> list[list[Request]]:
        more = {"stream": True, "leave_after": self._random.randint(1, self.max_tokens)}
        length = self._random.randint(1, self._limit)
        return [[self._complete("cut", self._prompt(length), self.max_tokens, **more)]]

    def _dropped(self) -> list[list[Request]]:
        length = self._random.randint(1, self._limit)
        wait = self._random.choice((0.002, 0.01, 0.05, 0.2))
        return [
            [
                self._complete(
                    "dropped", self._prompt(length), self.max_tokens, greedy=False, drop_after=wait
                )
            ]
        ]

    def _malformed(self) -> list[list[Request]]:
        return [[Request("malformed", COMPLETIONS, self._random.choice(MALFORMED), refused=True)]]

    def _too_long(self) -> list[list[Request]]:
        body = {"prompt": self._prompt(self.max_model_len + 1), "max_tokens": 1}
        return [[Request("too_long", COMPLETIONS, body, refused=True)]]

    def _longest(self) -> list[list[Request]]:
        tokens = self._random.randint(1, min(self.max_tokens, self.max_model_len - 1))
        return [[self._complete("longest", self._prompt(self.max_model_len - tokens), tokens)]]

    def _burst(self) -> list[list[Request]]:
        rng = self._random
        lengths = [rng.randint(self._limit // 2 + 1, self._limit) for _ in range(self.burst)]
        return [
            [self._complete("burst", self._prompt(length), self.max_tokens) for length in lengths]
        ]
