"""What was measured of a request, and statistics over requests."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllm_adamas.serving.loadtest.scenario import Objectives

SHARES = (0.5, 0.9, 0.99)  #: of the percentiles in a report


@dataclass
class Sample:
    """One request; times in seconds.

    Args:
        start: when it was sent, after the first request of its run.
        prompt_tokens: as the server counted them.
        output_tokens: as the server counted them.
        ttft: time to the first token.
        gaps: times between the events of the stream, an event being one token as a rule.
        error: None if it was answered in full.
    """

    start: float
    prompt_tokens: int
    output_tokens: int
    ttft: float = 0.0
    gaps: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def e2e(self) -> float:
        """Time to the last token."""
        return self.ttft + sum(self.gaps)

    @property
    def tpot(self) -> float | None:
        """Mean time per token after the first; None if there is one token only."""
        return sum(self.gaps) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def meets(self, slo: Objectives) -> bool:
        """Whether it was answered within all objectives."""
        limits = ((slo.ttft_ms, self.ttft), (slo.tpot_ms, self.tpot), (slo.e2e_ms, self.e2e))
        return self.error is None and all(
            limit is None or value is None or 1e3 * value <= limit for limit, value in limits
        )


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of times or ratios, and their number."""
    if len(samples) == 1:
        low = middle = high = samples[0]
    else:
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "n": len(samples)}


#: Latencies of a request by name.
LATENCIES = {
    "ttft": lambda sample: sample.ttft,
    "tpot": lambda sample: sample.tpot,
    "e2e": lambda sample: sample.e2e,
}


def values(samples: Iterable[Sample], name: str) -> list[float]:
    """A latency of the requests that were answered and have it."""
    found = (LATENCIES[name](sample) for sample in samples if sample.error is None)
    return [value for value in found if value is not None]


def ratios(stock: Sequence[Sample], adamas: Sequence[Sample], name: str) -> list[float]:
    """stock / adamas of a latency, for each request that both servers answered."""
    pairs = [
        (LATENCIES[name](a), LATENCIES[name](b))
        for a, b in zip(stock, adamas, strict=True)
        if a.error is None and b.error is None
    ]
    return [a / b for a, b in pairs if a is not None and b is not None]
