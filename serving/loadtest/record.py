"""The record of a load test: what each server did, statistics, and what went wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_adamas.serving.loadtest.drive import Outcome
from vllm_adamas.serving.loadtest.measure import LATENCIES, Sample, ratios, spread, values
from vllm_adamas.serving.loadtest.reconcile import Layers, reconcile
from vllm_adamas.serving.loadtest.scenario import Objectives, Scenario
from vllm_adamas.serving.storm.report import percentiles

ADAMAS = "adamas"
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
COLUMNS = ("start_s", "prompt_tokens", "output_tokens", "ttft_ms", "tpot_ms", "e2e_ms", "error")
MOST = 10  #: kinds of errors that a record names


@dataclass
class Results:
    """Collects the outcomes of servers; :meth:`record` is the result of a load test.

    Args:
        facts: inputs: scenario, factors, model, options, environment.
        stock: name of the backend that adamas is compared with.
        ended: what ended the load test before its end; empty if nothing did.
    """

    facts: dict[str, Any]
    scenario: Scenario
    stock: str
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    ended: str = ""

    def add(self, backend: str, outcome: Outcome, layers: Layers | None, remark: str = "") -> None:
        """
        Args:
            layers: sparse layers of the model under adamas; None without, or if unknown.
            remark: why they are unknown.
        """
        repeats = self.outcomes.setdefault(backend, [])
        repeats.append(outcome)
        errors = Counter(sample.error for sample in outcome.samples if sample.error)
        run = {
            "backend": backend,
            "repeat": len(repeats),
            "seconds": round(outcome.seconds, 3),
            "problems": [
                *outcome.problems,
                *(f"{count} x {error}" for error, count in errors.most_common(MOST)),
            ],
            "counters": outcome.moved,
            "reconciled": [],
            "remarks": [remark] if remark else [],
        }
        if outcome.storm is not None:
            run["storm"] = outcome.storm
            run["remarks"].append("not reconciled: clients of a storm leave before the end")
        else:
            run["requests"] = [_request(sample) for sample in outcome.samples]
            if errors:
                run["remarks"].append("not reconciled: what failed requests took is unknown")
            else:
                sent = [(one.prompt_tokens, one.output_tokens) for one in outcome.samples]
                rows, remarks = reconcile([*sent, *outcome.others], outcome.moved, layers)
                run["reconciled"] = [{**asdict(row), "agrees": row.agrees} for row in rows]
                run["remarks"] += remarks
        self.runs.append(run)

    def problems(self) -> list[str]:
        """One line each; empty if all is well."""
        found = []
        for run in self.runs:
            where = f"{run['backend']}, repeat {run['repeat']}"
            found += [f"{where}: {problem}" for problem in run["problems"]]
            found += [
                f"{where}: {row['counter']} is {row['counted']}, and the requests add {between(row)}"
                for row in run["reconciled"]
                if not row["agrees"]
            ]
        if self.ended:
            found.append(self.ended)
        return [_line(problem) for problem in found]

    def record(self) -> dict[str, Any]:
        """As JSON. Ratios of latencies are stock / adamas, those of throughput adamas / stock."""
        return {
            "ok": not self.problems(),
            "problems": self.problems(),
            **self.facts,
            "scenario": self.scenario.model_dump(mode="json"),
            "stock": self.stock,
            "backends": {
                name: _summary(outcomes, self.scenario.slo)
                for name, outcomes in self.outcomes.items()
                if outcomes[0].storm is None
            },
            "ratios": self._ratios(),
            "columns": COLUMNS,
            "runs": self.runs,
        }

    def _ratios(self) -> dict[str, dict[str, float]]:
        """The spread over pairs of requests, and of throughput over pairs of servers."""
        pairs = [
            (stock, adamas)
            for stock, adamas in zip(
                self.outcomes.get(self.stock, ()), self.outcomes.get(ADAMAS, ()), strict=False
            )
            if stock.samples and adamas.samples
        ]
        found = {
            name: [ratio for a, b in pairs for ratio in ratios(a.samples, b.samples, name)]
            for name in LATENCIES
        }
        speeds = [(_tokens_per_s(stock), _tokens_per_s(adamas)) for stock, adamas in pairs]
        found["output_tokens_per_s"] = [ours / theirs for theirs, ours in speeds if theirs]
        return {name: _rounded(spread(each)) for name, each in found.items() if each}


def between(row: dict[str, Any]) -> str:
    """The values that agree, in words."""
    if row["low"] == row["high"]:
        return f"{row['low']:,}"
    return f"{row['low']:,} to {row['high']:,}"


def _line(text: str) -> str:
    """What a server answered may be in the text, so line breaks and control characters become spaces."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _request(sample: Sample) -> list[Any]:
    times = (1e3 * value if value is not None else None for value in _latencies(sample))
    counts = (round(sample.start, 3), sample.prompt_tokens, sample.output_tokens)
    return [*counts, *(None if t is None else round(t, 3) for t in times), sample.error]


def _latencies(sample: Sample) -> list[float | None]:
    return [latency(sample) for latency in LATENCIES.values()]


def _tokens_per_s(outcome: Outcome) -> float:
    answered = (one.output_tokens for one in outcome.samples if one.error is None)
    return sum(answered) / outcome.seconds


def _summary(outcomes: Sequence[Outcome], slo: Objectives) -> dict[str, Any]:
    samples = [sample for outcome in outcomes for sample in outcome.samples]
    seconds = sum(outcome.seconds for outcome in outcomes)
    good = sum(sample.meets(slo) for sample in samples)
    answered = [sample for sample in samples if sample.error is None]
    gaps = [gap for sample in answered for gap in sample.gaps]
    return {
        "requests": len(samples),
        "errors": len(samples) - len(answered),
        "seconds": round(seconds, 3),
        "requests_per_s": round(len(answered) / seconds, 4),
        "output_tokens_per_s": _rounded(spread([_tokens_per_s(one) for one in outcomes])),
        "good": good,
        "good_per_s": round(good / seconds, 4),
        **{f"{name}_ms": _percentiles(values(samples, name)) for name in LATENCIES},
        "itl_ms": _percentiles(gaps),
    }


def _percentiles(times: Sequence[float]) -> dict[str, float]:
    found = percentiles(times, 1e3, PERCENTILES)
    return {"n": len(times), **{name: round(value, 3) for name, value in found.items()}}


def _rounded(found: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in found.items()}
