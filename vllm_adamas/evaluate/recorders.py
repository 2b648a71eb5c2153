"""Recorders that sit between the attention layers and their backend."""

from __future__ import annotations

from collections import defaultdict

import torch

from vllm_adamas.backends.base import Backend, Layer
from vllm_adamas.backends.compare import (
    chosen_weights,
    dense_weights,
    output_error,
    per_query_head,
)
from vllm_adamas.evaluate.delegate import DelegatingBackend

ROWS = 8  #: maximum rows per budget that are compared in a step; they take turns


class MassRecord:
    """Sums over sampled sparse rows, per layer and budget: each value is a float64 tensor ``[Hq]``.

    The values are those of :mod:`vllm_adamas.backends.compare`. ``mass`` is the kept mass and ``oracle`` that
    of the tokens with the largest weights. ``error`` is the output error of each head, and ``together`` that
    of all heads of the layer as one vector, a float64 scalar.

    Args:
        budgets: set sizes to measure, in dense rows too, where the output is that of attention over the
            set; empty measures each row's own budget and the output of its decode.
        pooled: whether to add rows of all budgets up, under budget 0.
    """

    def __init__(self, budgets: tuple[int, ...] = (), pooled: bool = False):
        self.budgets, self.pooled = budgets, pooled
        self.rows: dict[tuple[int, int], int] = defaultdict(int)
        # Sums stay on the device of the pages, so that rows are compared without a sync.
        self.mass: dict[tuple[int, int], torch.Tensor | float] = defaultdict(float)
        self.oracle: dict[tuple[int, int], torch.Tensor | float] = defaultdict(float)
        self.error: dict[tuple[int, int], torch.Tensor | float] = defaultdict(float)
        self.together: dict[tuple[int, int], torch.Tensor | float] = defaultdict(float)

    def layers(self) -> list[int]:
        """Layers that had sparse rows."""
        return sorted({layer for layer, _ in self.rows})

    def mean(self, what: str, budget: int) -> torch.Tensor:
        """One of the values averaged over rows: ``[sparse layers, Hq]``; ``together`` ``[sparse layers]``."""
        table = getattr(self, what)
        return torch.stack([table[n, budget] / self.rows[n, budget] for n in self.layers()]).cpu()


class Shadow(DelegatingBackend):
    """Compares every ``stride``-th decode step with dense attention over the same pages.

    Tokens are chosen by the backend's own scan and select.

    Args:
        number: index of the layer in the record.
    """

    def __init__(self, inner: Backend, number: int, record: MassRecord, stride: int = 8):
        super().__init__(inner)
        self.number, self.record, self.stride = number, record, stride
        self._steps = 0

    def decode(self, layer, query, batch, output, stats):
        self.inner.decode(layer, query, batch, output, stats)
        self._steps += 1
        if layer.params.sliding_window or self._steps % self.stride:
            return
        by_budget = defaultdict(list)
        lengths, limits = batch.seq_lens.tolist(), self.record.budgets
        for row, (budget, length) in enumerate(zip(batch.budgets.tolist(), lengths, strict=True)):
            if budget < length or (limits and max(limits) < length):
                by_budget[budget].append(row)
        for budget, rows in by_budget.items():
            turn = self._steps // self.stride * ROWS % len(rows)
            for row in (rows[turn:] + rows[:turn])[:ROWS]:
                one = slice(row, row + 1)
                seen = (query[one], batch.block_table[one], batch.seq_lens[one])
                self._compare(layer, *seen, output[row], budget, lengths[row])

    def _compare(self, layer: Layer, query, table, lens, output, budget, length) -> None:
        record, number, params = self.record, self.number, layer.params
        shape = (2, length, params.num_kv_heads, params.layout.head_size)
        both = torch.empty(shape, dtype=output.dtype, device=output.device)
        self.inner.gather(layer, table, lens, *both)
        value = both[1].float().transpose(0, 1)  # [Hkv, L, D]
        weights = dense_weights(layer, query, table, lens, length)  # [1, Hq, L]
        heads = (params.num_kv_heads, params.group)
        dense = (weights[0].unflatten(0, heads) @ value).flatten(0, 1)  # [Hq, D]
        sink = 0.0 if params.sinks is None else 1 - weights[0].sum(-1)  # [Hq]
        sizes = record.budgets or (budget,)
        scores = self.inner.scan(layer, query, table, lens)
        best = weights[0].topk(min(max(sizes), length), -1).values.cumsum(-1)  # [Hq, K]
        for size in sizes:
            wanted = torch.full_like(lens, size)
            tokens = self.inner.select(params, scores, lens, wanted)  # [1, sets, K]
            kept = chosen_weights(weights, tokens)[0]  # [Hq, K]
            mass = kept.sum(-1)
            if record.budgets:
                at = per_query_head(tokens, len(mass))[0].clamp_min(0)  # [Hq, K]
                share = torch.zeros_like(weights[0])
                share.scatter_add_(1, at, kept / (mass + sink)[:, None])
                output = (share.unflatten(0, heads) @ value).flatten(0, 1)  # [Hq, D]
            name = 0 if record.pooled else size
            record.rows[number, name] += 1
            record.mass[number, name] += mass.double()
            record.error[number, name] += output_error(output, dense, -1).double()
            record.together[number, name] += output_error(output, dense, (0, 1)).double()
            record.oracle[number, name] += best[:, min(size, length) - 1].double()


class ChannelRecord:
    """Sums per layer, each float64 ``[Hkv, D]``: of appended keys, of their squares, and of the squares
    of decode queries over the group of a KV head."""

    def __init__(self):
        self.tokens: dict[int, int] = defaultdict(int)
        self.rows: dict[int, int] = defaultdict(int)
        self.key: dict[int, torch.Tensor | float] = defaultdict(float)
        self.key_squares: dict[int, torch.Tensor | float] = defaultdict(float)
        self.query_squares: dict[int, torch.Tensor | float] = defaultdict(float)


class Capture(DelegatingBackend):
    """Adds every appended key, after RoPE and before coding, and every decode query to a record."""

    def __init__(self, inner: Backend, number: int, record: ChannelRecord):
        super().__init__(inner)
        self.number, self.record = number, record

    def append(self, layer, key, value, slot_mapping):
        self.inner.append(layer, key, value, slot_mapping)
        record, number = self.record, self.number
        kept = key[: len(slot_mapping)][slot_mapping >= 0].double()
        record.tokens[number] += len(kept)
        record.key[number] += kept.sum(0).cpu()
        record.key_squares[number] += kept.square().sum(0).cpu()

    def decode(self, layer, query, batch, output, stats):
        self.inner.decode(layer, query, batch, output, stats)
        params, query = layer.params, query[: len(batch.seq_lens)]
        squares = query.double().unflatten(1, (params.num_kv_heads, params.group)).square()
        self.record.rows[self.number] += len(query) * params.group
        self.record.query_squares[self.number] += squares.sum((0, 2)).cpu()
