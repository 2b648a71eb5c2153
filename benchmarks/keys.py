"""Keys and queries of decode benchmarks, by the name of their distribution.

What selection costs depends on how the scores are distributed over values and over positions. Gaussian
keys are kind: their scores are too, and neighbours are independent. The others are what servers meet.
Keys and queries have unit variance per dimension unless a distribution says otherwise. Everything is a
function of the seed of one generator, and is made in chunks of positions.

``real`` are keys that ``record_keys.py`` recorded from models; see :class:`Recording`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch

from vllm_adamas.errors import AdamasError
from vllm_adamas.identity import Heads

CHUNK = 1 << 14  #: positions made at a time
CORRELATION = 2000  #: positions after which the correlation of ``drift`` has fallen to 1/e
DRIFT_CHUNK = 2048  #: short enough that the powers of the decay stay near 1
REGION = 2000  #: tokens of the region that stands out
PROMINENCE = 6.0  #: mean score of the region, in standard deviations of the other tokens' scores
MEAN = 4.0  #: RMS of the common mean of ``sinks``, in standard deviations of the keys
SINKS, SINK_SCALE = 4, 3.0  #: first tokens of ``sinks``, and the factor of their keys
FIRST = 16  #: tokens at the start of a recorded window that appear only at the start of a context
RECORDINGS = Path(__file__).parent / "results"
#: The model whose recorded keys have a head size, and whether its heads are paired for it.
MODELS = {
    64: ("SmolLM2-135M-Instruct", False),
    128: ("SmolLM2-135M-Instruct", True),
    256: ("gemma-3-270m", False),
}


class Contexts:
    """One query and one context of keys for each of R rows.

    Args:
        name: a key of ``DISTRIBUTIONS``.
        tokens: T, tokens of every context.
        rows: R.
        generator: everything is drawn from it, on its device; rows are made in ascending order.

    Attributes:
        query: float32 ``[R, Hq, D]``.
    """

    def __init__(self, name: str, heads: Heads, tokens: int, rows: int, generator: torch.Generator):
        self.name, self.heads, self.tokens, self.generator = name, heads, tokens, generator
        if name == "real":
            recording = Recording.of(heads.size, generator.device)
            self.query = torch.stack([recording.query(heads, row) for row in range(rows)])
        else:
            self.query = self.normal(rows, heads.query, heads.size)
        self._make = DISTRIBUTIONS[name]

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal values, float32."""
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def keys(self, row: int) -> Iterator[torch.Tensor]:
        """The keys of a row's context in the order of positions: float32 ``[tokens of a chunk, Hkv, D]``."""
        return self._make(self, row)

    def chunks(self, size: int = CHUNK) -> Iterator[torch.Tensor]:
        """The positions of a context, int64 ``[size]`` and fewer at the end."""
        yield from torch.arange(self.tokens, device=self.generator.device).split(size)


def gaussian(contexts: Contexts, row: int) -> Iterator[torch.Tensor]:
    """Independent standard normal values."""
    for positions in contexts.chunks():
        yield contexts.normal(len(positions), *contexts.heads[1:])


def drift(contexts: Contexts, row: int) -> Iterator[torch.Tensor]:
    """A stationary AR(1) process over the positions in every dimension: neighbours score alike."""
    decay = math.exp(-1 / CORRELATION)
    last = contexts.normal(1, *contexts.heads[1:])
    for positions in contexts.chunks(DRIFT_CHUNK):
        noise = contexts.normal(len(positions), *contexts.heads[1:]) * math.sqrt(1 - decay**2)
        steps = torch.arange(1, len(positions) + 1, device=noise.device)
        power = (decay**steps)[:, None, None]  # [T, 1, 1]
        chunk = power * (last + (noise / power).cumsum(0))
        last = chunk[-1:]
        yield chunk


def region(contexts: Contexts, row: int) -> Iterator[torch.Tensor]:
    """Gaussian but for ``REGION`` tokens at a random place, which hold all of the best scores.

    Their keys have a component along the group's queries: the smallest vector whose score with each of
    them is ``PROMINENCE`` standard deviations of the other tokens' scores.
    """
    heads = contexts.heads
    group = contexts.query[row].view(heads.kv, heads.group, heads.size)
    wanted = PROMINENCE * group.norm(dim=-1, keepdim=True)  # [Hkv, G, 1]
    component = (torch.linalg.pinv(group) @ wanted).squeeze(-1)  # [Hkv, D]
    last_start = max(1, contexts.tokens - REGION)
    device = contexts.generator.device
    start = torch.randint(last_start, (1,), generator=contexts.generator, device=device)
    for positions, keys in zip(contexts.chunks(), gaussian(contexts, row), strict=True):
        inside = (positions >= start) & (positions < start + REGION)
        yield keys + inside[:, None, None] * component


def sinks(contexts: Contexts, row: int) -> Iterator[torch.Tensor]:
    """A common mean of RMS ``MEAN``, and ``SINKS`` first tokens whose keys are ``SINK_SCALE`` times as large.

    Scores are the same but for an offset, which is what models with QK-norm have. For about half of the
    queries the sinks score best, for the others worst.
    """
    mean = contexts.normal(*contexts.heads[1:])
    mean *= MEAN / mean.square().mean(-1, keepdim=True).sqrt()
    for positions, keys in zip(contexts.chunks(), gaussian(contexts, row), strict=True):
        yield (keys + mean) * torch.where(positions < SINKS, SINK_SCALE, 1.0)[:, None, None]


def repeated(distinct: int) -> Callable[[Contexts, int], Iterator[torch.Tensor]]:
    """``distinct`` keys in a repeating pattern, as of a line that was pasted again and again."""

    def make(contexts: Contexts, row: int) -> Iterator[torch.Tensor]:
        keys = contexts.normal(distinct, *contexts.heads[1:])
        for positions in contexts.chunks():
            yield keys[positions % distinct]

    return make


def real(contexts: Contexts, row: int) -> Iterator[torch.Tensor]:
    """Recorded keys; see :class:`Recording`."""
    recording = Recording.of(contexts.heads.size, contexts.generator.device)
    for positions in contexts.chunks():
        yield recording.keys(contexts.heads.kv, row, positions, contexts.tokens)


#: Generators of a row's keys, by name.
DISTRIBUTIONS: dict[str, Callable[[Contexts, int], Iterator[torch.Tensor]]] = {
    "gaussian": gaussian,
    "drift": drift,
    "region": region,
    "sinks": sinks,
    "repeat1": repeated(1),
    "repeat2": repeated(2),
    "repeat16": repeated(16),
    "real": real,
}


class Recording:
    """Keys of a few KV heads of a model and the queries of the last positions, over windows of text.

    A layer has more KV heads than were recorded: KV head h has the keys of recorded head h mod S, and its
    queries are from other positions. The same holds for query heads beyond those of the recorded group.

    A context ends in one window, with the token of the row's query, and goes back through the other
    windows; rows end in different windows and positions. Beyond all windows they repeat, so a key then
    appears several times. The first ``FIRST`` tokens of a window, which models make attention sinks, are
    left out everywhere but at the start of a context.

    Args:
        key: ``[W, T, S, D]``, W windows of T tokens, S heads.
        query: ``[W, P, S, G, D]``, of the last P positions.
    """

    def __init__(self, key: torch.Tensor, query: torch.Tensor):
        self.key, self.query_of_position = key, query
        self.windows, self.tokens, self.heads, _ = key.shape
        self.positions, self.group = query.shape[1], query.shape[3]

    @classmethod
    @cache
    def of(cls, size: int, device: torch.device) -> Recording:
        """The recording for layers of this head size.

        Raises:
            AdamasError: none was made.
        """
        if size not in MODELS:
            raise AdamasError(
                f"no keys of head size {size} were recorded: give a shape with one of "
                f"{', '.join(map(str, MODELS))}, or leave 'real' out of --keys."
            )
        model, pair = MODELS[size]
        recording = cls.load(RECORDINGS / f"keys_{model}.npz", device)
        return recording.paired() if pair else recording

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Recording:
        """A file of :func:`save`."""
        with np.load(path) as file:
            codes, scale, mean, spread, query = (
                torch.from_numpy(file[name]).to(device).float()
                for name in ("codes", "scale", "mean", "spread", "query")
            )
        return cls(codes * scale[..., None] * spread + mean, query)

    def paired(self) -> Recording:
        """Heads of twice the size: every two of the recorded ones side by side, so that scores add."""
        pairs = torch.combinations(torch.arange(self.heads), 2)  # [S', 2]
        return Recording(
            self.key[:, :, pairs].flatten(-2),
            self.query_of_position[:, :, pairs].transpose(-2, -3).flatten(-2),
        )

    def _end(self, row: int) -> tuple[int, int]:
        """The window that a row's context ends in, and the number of its tokens that follow the query."""
        return row % self.windows, row // self.windows % self.positions

    def query(self, heads: Heads, row: int) -> torch.Tensor:
        """The query of a row, ``[Hq, D]``."""
        window, behind = self._end(row)
        kv, member = torch.arange(heads.kv)[:, None], torch.arange(heads.group)[None]
        per_head = -(-heads.group // self.group)
        earlier = kv // self.heads * per_head + member // self.group  # [Hkv, G]
        position = (self.positions - 1 - behind - earlier).clamp_min(0)
        found = self.query_of_position[window, position, kv % self.heads, member % self.group]
        return found.flatten(0, 1)

    def keys(self, kv_heads: int, row: int, positions: torch.Tensor, tokens: int) -> torch.Tensor:
        """Keys at some positions of a row's context of ``tokens`` tokens, ``[positions, Hkv, D]``."""
        window, behind = self._end(row)
        back = tokens - 1 - positions.clamp_min(FIRST) + behind
        body = self.tokens - FIRST
        windows = (window - back // body) % self.windows
        place = torch.where(positions < FIRST, positions, self.tokens - 1 - back % body)
        return self.key[windows, place][:, torch.arange(kv_heads) % self.heads]


def save(path: Path, key: torch.Tensor, query: torch.Tensor, about: dict) -> None:
    """Writes a recording: queries as float16, keys as 8-bit codes.

    A key less the head's mean, over the spread of each channel, is coded with a scale per token. Without
    the mean and the spread the rounding of keys with a large mean would drown what tells them apart.

    Args:
        key, query: as in :class:`Recording`.
        about: what was recorded, as JSON.
    """
    mean, spread = key.mean((0, 1)), key.std((0, 1)).clamp_min(1e-6)  # [S, D]
    centred = (key - mean) / spread
    scale = (centred.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float16).tiny).half()
    codes = (centred / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    arrays = {
        "codes": codes,
        "scale": scale,
        "mean": mean,
        "spread": spread,
        "query": query.half(),
    }
    np.savez_compressed(
        path,
        about=np.array(json.dumps(about)),
        **{name: array.numpy() for name, array in arrays.items()},
    )
