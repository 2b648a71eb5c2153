"""The audit of a running server: now and then, sampled decode rows of one layer are compared with dense attention.

Between two audited steps nothing happens. In an audited step the layer whose turn it is keeps the queries and outputs
of a few rows; before the next step they are compared with dense attention over the pages, which hold the same tokens
until that step writes. No layer waits for it, and on a GPU nothing synchronises.

A step that a full CUDA graph replays runs no Python. Where such graphs are captured, one layer of each group therefore
keeps its rows in every replay, and only these layers are audited. The copies are part of the graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from vllm_adamas.backends.base import DecodeBatch
from vllm_adamas.backends.compare import compare_rows
from vllm_adamas.backends.workspace import capturing
from vllm_adamas.budget import TokenBudget
from vllm_adamas.config import AdamasConfig
from vllm_adamas.serving import compat
from vllm_adamas.serving.histograms import GROUP, GroupAudit, Histograms

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention

logger = init_logger("vllm.adamas")

ROWS = 4  #: maximum rows of an audited step that are compared; they take turns
WARN_ROWS = 8  #: audited rows of a group of layers that are judged together
WARN_INTERVAL = 60.0  #: minimum seconds between two warnings of an engine


class Kept(NamedTuple):
    """What a layer keeps of an audited step, ``[ROWS, Hq, D]`` each."""

    query: torch.Tensor
    output: torch.Tensor


class Sample(NamedTuple):
    """Rows of an audited step that have not been compared yet.

    Args:
        layer: the layer's name.
        rows: one batch for each row, with the length that the host knew as ``max_seq_len``.
    """

    layer: str
    rows: list[DecodeBatch]


class Audit:
    """The audit of the layers of one KV cache group in one worker.

    Args:
        interval: decode steps from one audited step to the next.
        layers: the audited layers by name, in model order; their turns go round.
        device: of their pages.
    """

    def __init__(
        self,
        interval: int,
        layers: dict[str, Attention],
        histograms: Histograms,
        device: torch.device,
    ):
        self._interval, self._layers, self._histograms = interval, layers, histograms
        self._names = list(layers)
        # Captured graphs read and write these tensors.
        self._rows = torch.zeros(ROWS, dtype=torch.int64, device=device)
        self._kept = {name: self._empty(layer, device) for name, layer in layers.items()}
        self._sample: Sample | None = None
        self._steps = 0
        self._judged = histograms.read()
        self._next_warning = 0.0

    @staticmethod
    def _empty(layer: Attention, device: torch.device) -> Kept:
        shape, dtype = (ROWS, layer.impl.num_decode_heads, layer.impl.head_size), layer.impl.dtype
        return Kept(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))

    @classmethod
    def of(
        cls, vllm_config, config: AdamasConfig, layer_names: list[str], device: torch.device
    ) -> Audit | None:
        """The audit of a KV cache group; None if it is turned off or all of the group's layers are dense."""
        interval = config.audited_every(device.type)
        layers = compat.layers_of(vllm_config)
        sparse = {
            name: layers[name]
            for name in layer_names
            if interval
            and not config.is_dense(extract_layer_index(name))
            and layers[name].impl.sliding_window is None
            and not compat.attention_chunk(layers[name])
        }
        if not sparse:
            return None
        if compat.captures_decode(vllm_config):
            sparse = one_of_each_group(sparse)
        engine = compat.engine_index(vllm_config)
        num_layers = vllm_config.model_config.get_total_num_hidden_layers()
        histograms = Histograms(config, device.type, engine, num_layers)
        return cls(interval, sparse, histograms, device)

    def step(
        self,
        decode: dict[TokenBudget, DecodeBatch],
        sparse_rows: Callable[[TokenBudget], list[tuple[int, int]]] | None,
    ) -> Audit | None:
        """Called once per step before its layers run; compares the last sample first.

        Args:
            decode: the rows of the step by the budget of a layer.
            sparse_rows: returns the rows that a budget makes sparse, with upper bounds of their lengths; called in
                audited steps. None if the step decodes for no request.

        Returns:
            this object if the step is audited.
        """
        if self._sample is not None:
            try:
                self._compare(*self._sample)
            except torch.OutOfMemoryError:  # no reason to end a server
                logger.warning_once(
                    "Audit: a comparison was skipped, because the memory for it is not free: pass a smaller "
                    "--gpu-memory-utilization, or audit_interval=0 to turn the audit off."
                )
            self._sample = None
            self._rows.zero_()  # a graph of any size may read them in the steps that follow
        self._histograms.copy(time.monotonic())
        if sparse_rows is None:
            return None
        self._steps += 1
        turn, rest = divmod(self._steps, self._interval)
        if rest:
            return None
        name = self._names[turn % len(self._names)]
        budget = self._layers[name].impl.config.budget_of(extract_layer_index(name))
        rows = sparse_rows(budget)
        if not rows:
            return None
        first = turn * ROWS % len(rows)
        rows = (rows[first:] + rows[:first])[:ROWS]
        indices = torch.tensor([row for row, _ in rows])
        self._rows[: len(rows)] = indices.to(self._rows.device, non_blocking=True)
        self._kept[name].query.fill_(torch.nan)  # rows that are not kept are not counted
        self._sample = Sample(name, [_copy(decode[budget], *row) for row in rows])
        return self

    def keep(self, name: str, query: torch.Tensor, output: torch.Tensor) -> None:
        """Called by every layer of an audited or captured step after its decode.

        Args:
            query, output: ``[tokens, Hq, D]``, decode rows first.
        """
        asked = self._sample is not None and name == self._sample.layer
        if asked or (capturing(output.device) and name in self._kept):
            kept = self._kept[name]
            torch.index_select(query, 0, self._rows, out=kept.query)
            torch.index_select(output, 0, self._rows, out=kept.output)

    def _compare(self, name: str, rows: list[DecodeBatch]) -> None:
        """Row by row, so that a long context takes little memory."""
        layer, kept = self._layers[name], self._kept[name]
        bound = layer.impl.bind(layer, layer.kv_cache)
        for at, row in enumerate(rows):
            query, output = kept.query[at : at + 1], kept.output[at : at + 1]
            sparse = bound.params.attended(row.seq_lens, row.budgets) < row.seq_lens
            valid = sparse & ~query.isnan().flatten(1).any(1)
            found = compare_rows(layer.impl.backend, bound, query.nan_to_num(), output, row)
            self._histograms.add(extract_layer_index(name), torch.stack(found), valid)
        self._judge()

    def reset(self) -> None:
        """Forgets the steps so far, which captured graphs with made-up requests."""
        self._sample, self._steps = None, 0
        self._rows.zero_()

    def _judge(self) -> None:
        """Warns if most rows of a group of layers that were not judged yet are above the threshold."""
        found = self._histograms.read()
        for at, group in enumerate(self._histograms.groups):
            new = GroupAudit(found[at] - self._judged[at])
            if new.rows < WARN_ROWS:
                continue
            self._judged[at] = found[at]
            if 2 * new.exceeded > new.rows and time.monotonic() >= self._next_warning:
                self._next_warning = time.monotonic() + WARN_INTERVAL
                logger.warning(
                    "Audit: %d of %d decode rows of layers %s differ from dense attention by more than "
                    "audit_threshold (mean error %.2f, kept mass %.2f, with the best tokens %.2f, recall "
                    "%.2f): raise token_budget if the best tokens keep little too, otherwise check the "
                    "calibration profile and run `vllm-adamas doctor` (docs/audit.md).",
                    new.exceeded,
                    new.rows,
                    group,
                    *map(new.mean, new.measures),
                )


def _copy(batch: DecodeBatch, row: int, seq_len: int) -> DecodeBatch:
    """One row of a batch, whose tensors the next step overwrites."""
    own = (batch.block_table, batch.seq_lens, batch.budgets)
    return DecodeBatch(*(x[row : row + 1].clone() for x in own), max_seq_len=seq_len)


def one_of_each_group(layers: dict[str, Attention]) -> dict[str, Attention]:
    """The middle one of each group of layers."""
    by_group: dict[int, list[str]] = {}
    for name in layers:
        by_group.setdefault(extract_layer_index(name) // GROUP, []).append(name)
    middle = {names[len(names) // 2] for names in by_group.values()}
    return {name: layer for name, layer in layers.items() if name in middle}
