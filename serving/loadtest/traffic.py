"""The requests of a scenario, as lines of a trace that `vllm bench serve` replays.

A trace names a prompt by its length and by the hashes of its chunks: equal hashes are equal tokens. So
lengths are exact, prompts share what the scenario says they share, and both servers get the same tokens.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import singledispatch

from vllm_adamas.serving.loadtest.scenario import (
    CHUNK,
    Arrivals,
    Bursts,
    Documents,
    SharedPrefix,
    Trace,
    Traffic,
)


@dataclass(frozen=True)
class Line:
    """One request.

    Args:
        timestamp: seconds after the start of the traffic; 0 for all leaves it to the concurrency.
        input_length, output_length: tokens.
        hash_ids: of the prompt's chunks.
    """

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


class _Chunks:
    """Hashes that no other prompt has."""

    def __init__(self) -> None:
        self._next = itertools.count()

    def take(self, tokens: int) -> list[int]:
        return list(itertools.islice(self._next, -(-tokens // CHUNK)))


def chunk_tokens(traffic: Traffic) -> int:
    """Tokens that one hash stands for."""
    if isinstance(traffic, Trace):
        return max(1, round(traffic.chunk_tokens * traffic.scale))
    return CHUNK


@singledispatch
def lines(traffic: Traffic, seed: int) -> list[Line]:
    """The requests of traffic without state; they follow from the seed."""
    raise TypeError(f"{type(traffic).__name__} is not a list of requests")


@lines.register
def _(traffic: SharedPrefix, seed: int) -> list[Line]:
    rng, chunks = random.Random(seed), _Chunks()
    length = _whole_chunks(traffic.prefix_tokens)
    prefixes = [chunks.take(length) for _ in range(traffic.prefixes)]
    return [
        _line(rng, at, rng.choice(prefixes), traffic.message_tokens, traffic.output_tokens, chunks)
        for at in itertools.islice(_arrivals(traffic, rng), traffic.requests)
    ]


@lines.register
def _(traffic: Documents, seed: int) -> list[Line]:
    rng, chunks = random.Random(seed), _Chunks()
    sizes = itertools.islice(itertools.cycle(traffic.document_tokens), traffic.documents)
    documents = [chunks.take(_whole_chunks(size)) for size in sizes]
    arrivals = _arrivals(traffic, rng)
    return [
        _line(rng, next(arrivals), one, traffic.question_tokens, traffic.output_tokens, chunks)
        for _ in range(traffic.questions)
        for one in documents
    ]


@lines.register
def _(traffic: Bursts, seed: int) -> list[Line]:
    rng, chunks = random.Random(seed), _Chunks()
    return [
        _line(
            rng, burst * traffic.every_s, [], traffic.prompt_tokens, traffic.output_tokens, chunks
        )
        for burst in range(traffic.bursts)
        for _ in range(traffic.requests)
    ]


@lines.register
def _(traffic: Trace, seed: int) -> list[Line]:
    return [Line(**line) for line in traffic.lines()]


def _line(
    rng: random.Random,
    at: float,
    shared: list[int],
    own: tuple[int, int],
    output: tuple[int, int],
    chunks: _Chunks,
) -> Line:
    tokens = rng.randint(*own)
    length = len(shared) * CHUNK + tokens
    return Line(at, length, rng.randint(*output), shared + chunks.take(tokens))


def _whole_chunks(tokens: int) -> int:
    return max(1, tokens // CHUNK) * CHUNK


def _arrivals(traffic: Arrivals, rng: random.Random) -> Iterator[float]:
    if traffic.rate is None:
        yield from itertools.repeat(0.0)
        return
    at, mean = 0.0, 1 / traffic.rate
    while True:
        yield at
        at += rng.gammavariate(traffic.burstiness, mean / traffic.burstiness)
