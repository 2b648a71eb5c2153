"""Forced decoding: a logits processor that records the model's distribution, then forces the token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality


class Record:
    """Measurements of F forced requests with S scored tokens each, on the logits' device."""

    def __init__(self, targets: Sequence[Sequence[int]], windows: Sequence[int], reference, keep):
        self.steps = len(targets[0]) - 1 if targets else 0
        self.targets = torch.tensor([list(target) for target in targets])  # [F, S + 1]
        self.windows = torch.tensor(list(windows))  # [F]
        self.reference, self.keep = reference, keep
        self.nll = torch.full((len(targets), self.steps), torch.nan)
        self.kl = self.nll.clone()
        self.log_probs: torch.Tensor | None = None

    def kl_or_none(self) -> torch.Tensor | None:
        return None if self.reference is None else self.kl.cpu()

    def take(self, which: torch.Tensor, step: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Records the distributions ``[K, vocabulary]`` of some requests; returns the forced tokens."""
        device = logits.device
        if self.targets.device != device:
            moved = ("targets", "windows", "nll", "kl")
            self.__dict__.update({name: getattr(self, name).to(device) for name in moved})
        late = (step > 0).nonzero()[:, 0]  # the first token was predicted by the prefill
        which, step, late = (x.to(device) for x in (which, step, late))
        token = self.targets[which, step]
        if len(late):
            which, step = which[late], step[late] - 1
            log_probs = logits[late].float().log_softmax(-1)
            self.nll[which, step] = -log_probs.gather(1, token[late][:, None])[:, 0]
            if self.reference is not None:
                wanted = self.reference[self.windows[which], step]
                gap = (wanted.exp() * (wanted - log_probs)).nan_to_num_(0.0)
                self.kl[which, step] = gap.sum(1)
            if self.keep:
                if self.log_probs is None:
                    shape = (*self.nll.shape, log_probs.shape[1])
                    self.log_probs = torch.empty(shape, device=device)
                self.log_probs[which, step] = log_probs
        return token


class ForcedContinuation(LogitsProcessor):
    """Forces each request with ``FORCED`` in its ``SamplingParams.extra_args`` to emit that target.

    ``FORCED`` is the index of a target in the current record. The distributions come from real decode
    steps, which attend to every earlier token, forced or not, as the configuration says.
    """

    BUDGET, FORCED = "adamas_budget", "adamas_forced"
    _record: Record | None = None  # of the current run; the engine is in this process

    @classmethod
    @contextmanager
    def recording(cls, forced: Sequence, reference, keep: bool) -> Iterator[Record]:
        """Records the forced requests that run inside the block."""
        targets, windows = [r.target for r in forced], [r.window for r in forced]
        cls._record = Record(targets, windows, reference, keep)
        try:
            yield cls._record
        finally:
            cls._record = None

    def __init__(self, vllm_config, device, is_pin_memory):
        # row -> index of the forced request, its output so far
        self._rows: dict[int, tuple[int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, _, output in batch_update.added:
            index = (params.extra_args or {}).get(self.FORCED)
            self._rows.pop(row, None)
            if index is not None:
                self._rows[row] = (index, output)
        for source, target, direction in batch_update.moved:
            moved, displaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if displaced is not None and direction == MoveDirectionality.SWAP:
                self._rows[source] = displaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._rows or self._record is None:
            return logits
        rows = torch.tensor(list(self._rows), device=logits.device)
        which = torch.tensor([index for index, _ in self._rows.values()])
        step = torch.tensor([len(output) for _, output in self._rows.values()])
        token = self._record.take(which, step, logits[rows])
        logits[rows] = -torch.inf
        logits[rows, token] = 0.0
        return logits
