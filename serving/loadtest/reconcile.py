"""Whether the counters of a server are those that the requests sent to it must leave behind."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from prometheus_client.parser import text_string_to_metric_families

from vllm_adamas.budget import TokenBudget
from vllm_adamas.config import AdamasConfig
from vllm_adamas.serving.checks import WITHOUT_BUDGET

REQUESTS, PROMPTS, OUTPUTS = (
    f"vllm:{name}_total" for name in ("request_success", "prompt_tokens", "generation_tokens")
)
PREEMPTIONS, DRAFTS = "vllm:num_preemptions_total", "vllm:spec_decode_num_drafts_total"
SPARSE, DENSE, CONTEXT, ATTENDED = (
    f"vllm:adamas_{name}_total"
    for name in ("sparse_rows", "dense_rows", "decode_context_tokens", "decode_attended_tokens")
)


@dataclass(frozen=True)
class Row:
    """A counter, and the values from ``low`` to ``high`` that agree with the requests."""

    counter: str
    low: int
    high: int
    counted: int

    @property
    def agrees(self) -> bool:
        return self.low <= self.counted <= self.high


@dataclass(frozen=True)
class Layers:
    """The sparse layers of a model.

    Args:
        budgets: the number of layers of each budget.
        query_heads: Hq.
    """

    budgets: Mapping[TokenBudget, int]
    query_heads: int

    @classmethod
    def of(cls, model: Mapping[str, Any], config: AdamasConfig) -> Layers:
        """
        Args:
            model: the config.json of a model, that of its text part above all.
            config: the options in force.

        Raises:
            ValueError: the file does not tell which layers have a sliding window.
        """
        kinds = model.get("layer_types")
        if kinds is None and model.get("sliding_window") and model.get("use_sliding_window", True):
            raise ValueError("config.json does not tell which layers have a sliding window")
        layers = range(model["num_hidden_layers"])
        sparse = [
            n
            for n in layers
            if not config.is_dense(n) and not (kinds and kinds[n] in WITHOUT_BUDGET)
        ]
        return cls(Counter(map(config.budget_of, sparse)), model["num_attention_heads"])


def options_in_force(metrics: str) -> AdamasConfig:
    """The configuration that a server shows at ``/metrics``.

    Raises:
        ValueError: it shows none, or those of several engines.
    """
    shown = [
        sample.labels
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == "vllm:adamas_config_info"
    ]
    if len(shown) != 1:
        raise ValueError(f"the server shows the options of {len(shown)} engines")
    (labels,) = shown
    return AdamasConfig.parse(
        {name: _value(labels[name]) for name in AdamasConfig.model_fields if name in labels}
    )


def _value(label: str) -> Any:
    try:
        return json.loads(label)
    except ValueError:
        return label  # a string is its own label


def expected(layers: Layers, requests: Iterable[tuple[int, int]]) -> dict[str, int]:
    """The counters after requests of so many (prompt, output) tokens.

    A request's first token is prefill's. The n-th after it is a row of prompt + n tokens of context.
    """
    found = Counter({SPARSE: 0, DENSE: 0, CONTEXT: 0, ATTENDED: 0})
    for prompt, output in requests:
        contexts = torch.arange(prompt + 1, prompt + output, dtype=torch.int32)
        attended = torch.empty_like(contexts)
        for budget, count in layers.budgets.items():
            budget.fill(contexts, attended)
            sparse = int((attended < contexts).sum())
            found[SPARSE] += count * sparse
            found[DENSE] += count * (len(contexts) - sparse)
            found[CONTEXT] += count * layers.query_heads * int(contexts.sum())
            found[ATTENDED] += count * layers.query_heads * int(attended.sum())
    return dict(found)


def reconcile(
    requests: Sequence[tuple[int, int]], moved: Mapping[str, float], layers: Layers | None
) -> tuple[list[Row], list[str]]:
    """Compares what requests must add to the counters with what they added.

    Two things that requests do not show move the counters. A preempted request computes its output so far
    as a prompt, so a row is missing. The last token of a prompt, if it is alone in its step, is a dense row
    more. Both are known from the counters by number, not by context, so they widen what agrees.

    Args:
        requests: (prompt, output) tokens of all that the server answered.
        moved: increase of each counter; one that the server does not export is 0.
        layers: sparse layers; None for a server without.

    Returns:
        The rows, and remarks about what widened them.
    """
    count, longest = len(requests), max(map(sum, requests))
    counted = Counter({name: int(value) for name, value in moved.items()})
    preempted = counted[PREEMPTIONS]
    prompts, outputs = (sum(tokens) for tokens in zip(*requests, strict=True))
    plain = ((REQUESTS, count, 0), (PROMPTS, prompts, preempted * longest), (OUTPUTS, outputs, 0))
    rows = [Row(name, low, low + more, counted[name]) for name, low, more in plain]
    remarks = [f"{preempted} requests were preempted"] if preempted else []
    if layers is None:
        return rows, remarks
    if counted[DRAFTS]:
        return rows, [*remarks, "speculative decoding: rows depend on what was drafted"]
    wanted = expected(layers, requests)
    total = sum(layers.budgets.values())
    more = counted[SPARSE] + counted[DENSE] - wanted[SPARSE] - wanted[DENSE]
    alone = max(0, -(-more // total) + preempted) if total else 0
    if alone > count + preempted:
        alone = 0  # more than there are prompts: the counters are wrong
    if alone:
        remarks.append(f"{alone} prompts ended in a step of one token")
    tokens = total * layers.query_heads * longest
    for name, step, extra in (
        (SPARSE, total, 0),
        (DENSE, total, total),
        (CONTEXT, tokens, tokens),
        (ATTENDED, tokens, tokens),
    ):
        low, high = wanted[name] - preempted * step, wanted[name] + alone * extra
        rows.append(Row(name, max(0, low), high, counted[name]))
    return rows, remarks
