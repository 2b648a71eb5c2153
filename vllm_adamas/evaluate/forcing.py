"""Forced decoding: a logits processor that records the model's distribution, then dictates the token."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

KEY = "adamas_forced"


class ForcedContinuation(AdapterLogitsProcessor):
    """Requests that carry :meth:`arguments` emit the given tokens and no others.

    The distributions come from real decode steps, in which every earlier token, forced ones too, was
    attended as the configuration says.
    """

    _record = (
        None  # (scores, reference, keep) of the call in progress; the engine is in this process
    )

    @classmethod
    @contextmanager
    def recording(cls, scores, reference: torch.Tensor | None, keep: bool):
        """Requests that run inside the block are recorded into ``scores``."""
        cls._record = (scores, reference, keep)
        try:
            yield
        finally:
            cls._record = None

    @staticmethod
    def arguments(window: int, target: list[int]) -> dict:
        """``SamplingParams.extra_args`` of a request."""
        return {KEY: (window, target)}

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params):
        forced = (params.extra_args or {}).get(KEY)
        if forced is None:
            return None
        window, target = forced

        def dictate(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            step = len(output_ids)
            if step:  # the first token was predicted by the prefill
                self._take(window, step - 1, target[step], logits)
            logits.fill_(-torch.inf)
            logits[target[step]] = 0.0
            return logits

        return dictate

    @classmethod
    def _take(cls, window: int, step: int, token: int, logits: torch.Tensor) -> None:
        scores, reference, keep = cls._record
        log_probs = logits.float().log_softmax(-1)
        scores.nll[window, step] = -log_probs[token]
        if reference is not None:
            wanted = reference[window, step]
            scores.kl[window, step] = (wanted.exp() * (wanted - log_probs)).nan_to_num(0.0).sum()
        if keep:
            if scores.log_probs is None:
                shape = (*scores.nll.shape, len(log_probs))
                scores.log_probs = torch.empty(shape, device=logits.device)
            scores.log_probs[window, step] = log_probs
