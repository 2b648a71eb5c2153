"""aiperf as the client of a load test: what it is given to send, and how its records are read.

It runs as a program, since its requirements are not those of vLLM. It sends the bodies that are made here as they
are, so that prompts have the tokens that the scenario says and no text is tokenized again.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from vllm_adamas.errors import AdamasError
from vllm_adamas.serving.loadtest.measure import Sample
from vllm_adamas.serving.loadtest.traffic import Line
from vllm_adamas.serving.storm.traffic import GREEDY

RECORDS = "profile_export.jsonl"  #: what it writes into its folder, a line per request
#: It would keep every trace in the user's cache.
ENVIRONMENT = {"AIPERF_DATASET_MMAP_CACHE_ENABLED": "false"}


def program() -> str:
    """The path of aiperf.

    Raises:
        AdamasError: it is not installed.
    """
    if (found := shutil.which("aiperf")) is None:
        raise AdamasError(
            "--client aiperf needs the program aiperf on PATH: install it from PyPI, in a virtual environment "
            "of its own."
        )
    return found


def command(
    aiperf: str, url: str, model: str, tokenizer: str, trace: Path, concurrency: int | None
) -> list[str]:
    """Replays a trace of :func:`bodies` and writes :data:`RECORDS` beside it.

    Args:
        model: the name that the server serves.
        tokenizer: folder or hub name; aiperf loads one even where the server counts tokens.
        concurrency: most requests in flight; None for no limit.
    """
    found = [
        aiperf, "profile", "--url", url, "--model", model, "--endpoint-type", "completions", "--streaming",
        "--input-file", str(trace), "--custom-dataset-type", "mooncake_trace", "--fixed-schedule",
        "--use-server-token-count", "--tokenizer", tokenizer, "--export-level", "records",
        "--artifact-dir", str(trace.parent), "--no-server-metrics", "--no-gpu-telemetry", "--ui", "none",
    ]  # fmt: skip
    return found if concurrency is None else [*found, "--concurrency", str(concurrency)]


def bodies(
    lines: Sequence[Line], chunk: int, vocabulary: Sequence[int], model: str, seed: int
) -> list[str]:
    """The lines of a trace whose requests are complete bodies of ``/v1/completions``.

    Args:
        chunk: tokens that one hash stands for.
        vocabulary: token ids to draw prompts from.
    """

    def tokens(hash_id: int) -> list[int]:
        return random.Random(f"{seed} {hash_id}").choices(vocabulary, k=chunk)

    def body(line: Line) -> dict:
        prompt = [token for hash_id in line.hash_ids for token in tokens(hash_id)]
        return {
            "model": model,
            "prompt": prompt[: line.input_length],
            "max_tokens": line.output_length,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **GREEDY,
        }

    return [
        json.dumps({"session_id": str(n), "timestamp": 1e3 * line.timestamp, "payload": body(line)})
        for n, line in enumerate(lines)
    ]


def samples(records: Iterable[str], lines: Sequence[Line]) -> tuple[list[Sample], float]:
    """The requests in the records of aiperf, in the order of the trace, and the seconds that they took.

    Args:
        records: lines of :data:`RECORDS`, in any order.
        lines: what was to be sent.
    """
    found = {}
    for record in map(json.loads, records):
        found[int(record["metadata"]["conversation_id"])] = record
    times = [record["metadata"] for record in found.values()]
    first = min((one["request_start_ns"] for one in times), default=0)
    last = max((one["request_end_ns"] for one in times), default=0)
    made = []
    for n, line in enumerate(lines):
        if n not in found:
            made.append(Sample(0.0, 0, 0, error="aiperf has no record of it"))
            continue
        metrics = {name: one["value"] for name, one in found[n]["metrics"].items()}
        sample = Sample(
            (found[n]["metadata"]["request_start_ns"] - first) / 1e9,
            int(metrics.get("input_sequence_length", 0)),
            int(metrics.get("output_sequence_length", 0)),
            metrics.get("time_to_first_token", 0.0) / 1e3,
            [gap / 1e3 for gap in metrics.get("inter_chunk_latency", ())],
        )
        if problem := found[n].get("error"):
            sample.error = problem["message"].strip().rpartition("\n")[2]
        elif sample.output_tokens != line.output_length:
            sample.error = f"{sample.output_tokens} of {line.output_length} tokens"
        made.append(sample)
    return made, (last - first) / 1e9
