"""A test of a compute backend on its own device: a few small batches with corners, against the reference.

Queries, keys and the seeds are such that no code depends on the order in which floats are added. So codes,
scores and tokens have to be equal; outputs are compared within ``TOLERANCE``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from vllm_adamas.backends.base import COUNTERS, Backend, DecodeBatch, Params
from vllm_adamas.backends.inspect import Inspectable
from vllm_adamas.backends.reference import ReferenceBackend
from vllm_adamas.config import AdamasConfig
from vllm_adamas.identity import Heads
from vllm_adamas.layout import PageLayout

DTYPE = torch.bfloat16
#: Largest ||output - reference|| / ||reference|| of a query head. Some kernels round weights to bfloat16,
#: all round the output.
TOLERANCE = 6e-3
PADDING = 2  #: trailing rows and tokens that belong to no request
REFERENCE = ReferenceBackend()


@dataclass(frozen=True)
class Case:
    """One batch of R rows.

    Args:
        options: of the layer, as in ``--additional-config``.
        lengths, budgets: tokens in the context and in the budget of each row; a row may be empty.
        distinct: so many different keys, whose scores tie; 0 for as many as there are tokens.
    """

    options: dict[str, str]
    heads: Heads
    lengths: tuple[int, ...] = (300, 1, 65, 0, 129)
    budgets: tuple[int, ...] = (40, 1, 64, 5, 1000)
    distinct: int = 0
    seed: int = 0


SHARED = {"score": "dot", "selection": "kv_head", "combine": "max"}
SUMMED = {"score": "dot", "selection": "kv_head", "combine": "sum"}
PAPER = {"score": "manhattan", "selection": "query_head"}
CASES = {
    "dense rows": Case(SHARED, Heads(8, 2, 128), budgets=(1000,) * 5, seed=25),
    "dot, kv_head, max": Case(SHARED, Heads(8, 2, 128), seed=25),
    "dot, kv_head, max, equal keys": Case(SHARED, Heads(8, 2, 128), distinct=3, seed=1),
    "dot, kv_head, sum, groups of 3": Case(SUMMED, Heads(6, 2, 64), seed=2),
    "manhattan, query_head": Case(PAPER, Heads(4, 2, 128), seed=11),
    "manhattan, query_head, equal keys": Case(PAPER, Heads(3, 1, 64), distinct=3),
}


@dataclass
class Outcome:
    """What :func:`run` found.

    Args:
        failures: one sentence each, empty if all is well.
        seconds: what it took, compilation included.
    """

    cases: int
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(eq=False)
class Batch:
    """A built case on a device, its pages not yet written: every byte is 0xFF, which is NaN in any plane."""

    params: Params
    pages: torch.Tensor  # [blocks, Hkv, N, C]
    key: torch.Tensor  # [T + PADDING, Hkv, D]
    value: torch.Tensor
    slots: torch.Tensor  # [T + PADDING]
    query: torch.Tensor  # [R + PADDING, Hq, D]
    rows: DecodeBatch

    @classmethod
    def build(cls, case: Case, device: torch.device | str) -> Batch:
        """The same numbers on every device."""
        g = torch.Generator().manual_seed(case.seed)
        heads, tokens = case.heads, sum(case.lengths)
        layout = PageLayout(heads.size, 32, DTYPE)
        used = [-(-length // layout.block_size) for length in case.lengths]
        blocks = torch.randperm(sum(used) + 1, generator=g).to(torch.int32)  # one is never written
        table = blocks[-1].repeat(len(used), max(used) + 1)  # [R, blocks]
        slots = [torch.full((PADDING,), -1)]
        for row, own in reversed(list(enumerate(blocks[:-1].split(used)))):
            table[row, : len(own)] = own
            token = torch.arange(case.lengths[row])
            start = own.long()[token // layout.block_size] * layout.block_size
            slots.insert(0, start + token % layout.block_size)
        # Keys and values are slices of one tensor, as a fused projection leaves them.
        kv = torch.randn(tokens + PADDING, 2 * heads.kv, heads.size, generator=g)
        if case.distinct:
            which = torch.randint(0, case.distinct, (len(kv),), generator=g)
            kv[:, : heads.kv] = kv[which, : heads.kv]
        query = torch.randn(len(used) + PADDING, heads.query, heads.size, generator=g)
        size = (len(blocks), heads.kv, layout.block_size, layout.token_bytes)
        key, value = kv.to(device, DTYPE).split(heads.kv, 1)
        lengths, budgets = (
            torch.tensor(numbers, dtype=torch.int32, device=device)
            for numbers in (case.lengths, case.budgets)
        )
        return cls(
            params=Params.of(
                AdamasConfig.parse(case.options),
                layout,
                num_query_heads=heads.query,
                num_kv_heads=heads.kv,
                softmax_scale=heads.size**-0.5,
            ),
            pages=torch.full(size, 0xFF, dtype=torch.uint8, device=device).view(DTYPE),
            key=key,
            value=value,
            slots=torch.cat(slots).to(device),
            query=query.to(device, DTYPE),
            rows=DecodeBatch(table.to(device), lengths, budgets),
        )

    def decode(self, backend: Backend, dtype: torch.dtype) -> tuple[torch.Tensor, list[int]]:
        """Output float32 ``[R + PADDING, Hq, D]`` on the host, NaN where nothing was written, and the counters."""
        output = torch.full_like(self.query, torch.nan, dtype=dtype)
        stats = torch.zeros(COUNTERS, dtype=torch.int64, device=output.device)
        layer = backend.bind(self.params, self.pages)
        backend.decode(layer, self.query, self.rows, output, stats)
        return output.cpu().float(), stats.tolist()

    def scan(self, backend: Inspectable) -> torch.Tensor:
        """Scores float32 ``[R, sets, L]`` on the device."""
        rows, layer = self.rows, backend.bind(self.params, self.pages)
        return backend.scan(layer, self.query[:-PADDING], rows.block_table, rows.seq_lens)

    def gather(self, backend: Backend) -> torch.Tensor:
        """K and V of all contexts, ``[2, T, Hkv, D]`` on the host."""
        out = torch.zeros_like(torch.stack((self.key, self.value))[:, :-PADDING])
        layer = backend.bind(self.params, self.pages)
        backend.gather(layer, self.rows.block_table, self.rows.seq_lens, *out)
        return out.cpu()


def run(backend: Backend, device: torch.device | str) -> Outcome:
    """Tests a backend over all of ``CASES``."""
    outcome, start = Outcome(len(CASES)), time.perf_counter()
    for name, case in CASES.items():
        try:
            outcome.failures += [f"{name}: {wrong}." for wrong in check(case, backend, device)]
        except Exception as error:  # whatever a broken installation raises
            first = (str(error).splitlines() or [""])[0]
            outcome.failures.append(f"{name}: {type(error).__name__}: {first}")
    outcome.seconds = time.perf_counter() - start
    return outcome


def check(case: Case, backend: Backend, device: torch.device | str) -> Iterator[str]:
    """Every operation of a backend over one batch: what is wrong, operation by operation."""
    ours, theirs = Batch.build(case, device), Batch.build(case, "cpu")
    for some, one in ((ours, backend), (theirs, REFERENCE)):
        one.append(one.bind(some.params, some.pages), some.key, some.value, some.slots)
    yield from _append(ours.params.layout, ours.pages.cpu(), theirs.pages)
    # What follows reads the same pages: scales may differ in their last bit.
    theirs.pages.copy_(ours.pages)
    if isinstance(backend, Inspectable):
        scores, expected = ours.scan(backend), theirs.scan(REFERENCE)
        yield from _first("scan", scores.cpu() != expected, "scores")
        lens, budgets = theirs.rows.seq_lens, theirs.rows.budgets
        tokens = backend.select(ours.params, scores, ours.rows.seq_lens, ours.rows.budgets).cpu()
        wanted = REFERENCE.select(theirs.params, expected, lens, budgets)
        yield from _first("select", tokens != wanted, "selected tokens")
    output, counted = ours.decode(backend, DTYPE)
    exact, expected = theirs.decode(REFERENCE, torch.float32)
    yield from _first("decode", ~output[-PADDING:].isnan().all(-1), "padding rows")
    error = (output - exact)[:-PADDING].norm(dim=-1)  # [R, Hq]
    # Written so that NaN fails. An empty row's output is 0.
    yield from _first(
        "decode", ~(error <= TOLERANCE * exact[:-PADDING].norm(dim=-1)), "heads of the output"
    )
    if (
        counted[:-1] != expected[:-1]
    ):  # the last counts a slow path, which the reference does not have
        yield f"decode: counted {counted[:-1]} where {expected[:-1]} is right"
    yield from _first("gather", ours.gather(backend) != theirs.gather(REFERENCE), "values")


def _append(layout: PageLayout, ours: torch.Tensor, theirs: torch.Tensor) -> Iterator[str]:
    """All bytes of the pages, those that no token has among them; of scales the last bit may differ."""
    for plane in ("k", "v", "hi", "lo"):
        got, wanted = (
            getattr(layout, plane)(pages).contiguous().view(torch.uint8) for pages in (ours, theirs)
        )
        yield from _first("append", got != wanted, f"bytes of the {plane} plane")
    got, wanted = (
        layout.scale(pages).contiguous().view(torch.int16).int() for pages in (ours, theirs)
    )
    yield from _first("append", (got - wanted).abs() > 1, "scales")


def _first(operation: str, wrong: torch.Tensor, what: str) -> Iterator[str]:
    if wrong.any():
        at = ", ".join(map(str, wrong.nonzero()[0].tolist()))
        yield f"{operation}: {int(wrong.sum())} of {wrong.numel()} {what} are wrong, the first at [{at}]"
