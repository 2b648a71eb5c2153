"""The results of a storm: a record, its problems, and both as text."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_adamas.serving.storm.client import Outcome
from vllm_adamas.serving.storm.reference import Verdict
from vllm_adamas.tables import plain

COMPARED_AT_LEAST = 0.7  #: share of the tokens of checked answers
EXAMPLES = 20  #: most examples of each kind of problem in the record


@dataclass
class Report:
    """Collects outcomes; :meth:`record` is the result and :meth:`problems` lists what went wrong.

    Args:
        facts: inputs of the storm: seed, limits, versions.
        growth: MiB that the server's memory may grow by after warm-up, for RSS and GPU memory each.
    """

    facts: dict[str, Any]
    growth: float
    requests: Counter = field(default_factory=Counter)
    errors: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    examples: list[dict] = field(default_factory=list)
    refused: int = 0
    left: int = 0
    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    checks: dict[str, Verdict] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    restarts: int = 0
    unhealthy: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)  #: problems that are none of the above

    def add(self, outcome: Outcome) -> None:
        request = outcome.request
        self.requests[request.kind] += 1
        if outcome.error:
            self.errors[request.kind][outcome.error.partition(":")[0]] += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append(
                    {
                        "kind": request.kind,
                        "unit": outcome.unit,
                        "error": outcome.error,
                        "prompt_tokens": len(outcome.prompt),
                    }
                )
        self.refused += request.refused and not outcome.error
        self.left += request.leave_after is not None or request.drop_after is not None
        if outcome.ttft is not None:
            self.ttft.append(outcome.ttft)
            self.gaps += outcome.gaps

    def problems(self) -> list[str]:
        """One line each; empty if all is well."""
        found = []
        for kind, errors in self.errors.items():
            found += [f"{kind}: {count} x {what}" for what, count in errors.items()]
        if self.restarts:
            found.append(f"the server was restarted {self.restarts} x")
        if self.unhealthy:
            found.append(f"unhealthy {len(self.unhealthy)} x, first {self.unhealthy[0]}")
        for name, verdict in self.checks.items():
            if verdict.failed:
                found.append(
                    f"{len(verdict.failed)} answers could not be {name}: {verdict.failed[0]}"
                )
            if verdict.wrong:  # checking then stops early
                found.append(f"{len(verdict.wrong)} wrong tokens, {name}")
            elif verdict.compared < max(1, COMPARED_AT_LEAST * verdict.tokens):
                found.append(
                    f"only {verdict.compared} of {verdict.tokens} tokens were compared ({name})"
                )
        if "scored" in self.checks and self.moved.get("vllm:adamas_sparse_rows_total"):
            found.append(
                "sparse rows were scored by a server that attends to everything: serve with a "
                "token_budget above the contexts, or leave out --oracle"
            )
        for name, grown in self.grown().items():
            if grown > self.growth:
                found.append(f"{name} grew by {grown:.0f} MiB, more than {self.growth:g}")
        return found + self.other

    def grown(self) -> dict[str, float]:
        warm, end = (self.memory.get(when, {}) for when in ("warm", "end"))
        return {name: end[name] - warm[name] for name in warm if name in end}

    def unwatched(self) -> list[str]:
        """Kinds of memory that were not measured, for lack of a pid, psutil or a driver."""
        known = self.memory.get("end", {})
        return [name for name in ("rss", "gpu") if name not in known]

    def record(self) -> dict[str, Any]:
        """As JSON, with times in milliseconds and memory in MiB."""
        return {
            "ok": not self.problems(),
            "problems": self.problems(),
            **self.facts,
            "requests": dict(sorted(self.requests.items())),
            "errors": {kind: dict(errors) for kind, errors in self.errors.items()},
            "examples": self.examples,
            "refused_as_they_should": self.refused,
            "left_by_the_client": self.left,
            "restarts": self.restarts,
            "checks": {name: _summary(verdict) for name, verdict in self.checks.items()},
            "counters": self.moved,
            "memory_mib": self.memory,
            "memory_not_watched": self.unwatched(),
            "ttft_ms": percentiles(self.ttft, 1e3),
            "itl_ms": percentiles(self.gaps, 1e3),
        }

    def _tables(self) -> list[str]:
        """Lines of the tables of checks, times and memory, as far as there are any."""
        made = []
        if self.checks:
            headers = ["checked", "tokens", "compared", "right, not best", "wrong"]
            rows = [
                [
                    name,
                    verdict.tokens,
                    verdict.compared,
                    verdict.parted,
                    len(verdict.wrong),
                    *_numbers(percentiles(verdict.distances), PERCENTILES),
                ]
                for name, verdict in self.checks.items()
            ]
            made.append(plain([*headers, *(f"distance {p}" for p in PERCENTILES)], rows))
        times = {"TTFT": self.ttft, "ITL": self.gaps}
        rows = [
            [name, *_numbers(percentiles(values, 1e3), PERCENTILES)]
            for name, values in times.items()
        ]
        made.append(plain(["ms", *PERCENTILES], rows))
        if self.memory:
            names = sorted({name for found in self.memory.values() for name in found})
            rows = [[when, *_numbers(found, names)] for when, found in self.memory.items()]
            made.append(plain(["memory, MiB", *names], rows))
        return "\n\n".join(made).splitlines()

    def text(self) -> str:
        """The report as text."""
        lines = [f"{sum(self.requests.values())} requests: {_listed(self.requests)}"]
        lines.append(f"{self.refused} were refused as they should, {self.left} left by the client")
        lines += ["", *self._tables(), ""]
        for verdict in self.checks.values():
            lines += [
                f"  {w.kind}, unit {w.unit}: token {w.position} after {w.prompt_tokens} of prompt is {w.token}, "
                f"not {w.best}; distance {w.distance}"
                for w in verdict.wrong[:5]
            ]
        lines.append(f"counters: {_listed(self.moved)}")
        lines += [f"memory not watched: {name}" for name in self.unwatched()]
        lines += [f"  {e['kind']}, unit {e['unit']}: {e['error']}" for e in self.examples[:5]]
        found = self.problems()
        lines += [f"PROBLEM: {problem}" for problem in found] or ["All is well."]
        return "\n".join(lines)


def _numbers(values: dict[str, float], names: Iterable[str]) -> list[str]:
    """The named values as table cells; empty if missing."""
    return [f"{values[name]:.6g}" if name in values else "" for name in names]


def _summary(verdict: Verdict) -> dict[str, Any]:
    return {
        "tokens": verdict.tokens,
        "compared": verdict.compared,
        "right_but_not_best": verdict.parted,
        "distance": percentiles(verdict.distances),
        "wrong": len(verdict.wrong),
        "first_wrong": [asdict(wrong) for wrong in verdict.wrong[:EXAMPLES]],
        "failed": verdict.failed[:EXAMPLES],
    }


PERCENTILES = {"p50": 0.5, "p99": 0.99, "max": 1.0}


def percentiles(
    values: Sequence[float], scale: float = 1.0, shares: Mapping[str, float] = PERCENTILES
) -> dict[str, float]:
    """Percentiles by the nearest rank, times ``scale``; empty without values.

    Args:
        shares: the share of the values that are at most as large, by the percentile's name.
    """
    if not values:
        return {}
    ordered = sorted(values)
    return {
        name: round(scale * ordered[math.ceil(share * len(ordered)) - 1], 6)
        for name, share in shares.items()
    }


def _listed(values: dict) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items()) or "none"
