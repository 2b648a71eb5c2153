"""Ask a real server a question about a long text, with sparse and with dense decode attention."""

import argparse
import random
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from vllm_adamas.serving.launch import Server
from vllm_adamas.tables import plain

SENTENCES = 230
ANSWER_TOKENS = 32
TIMED_TOKENS = 64
PASS_KEY = "68412"
QUESTION = "What is the pass key mentioned in the harbour log?"
CONFIG = {"token_budget": 256, "log_interval": 0}
SERVER_ARGS = ["--max-model-len", "8192", "--max-num-seqs", "4"]


def harbour_log() -> str:
    """A monotonous text of about 5,000 tokens with one fact in the middle; the same on every call."""
    rng = random.Random(2510)
    ships = ["Aurora", "Bellona", "Cormorant", "Dorothea", "Esperance", "Fulmar", "Gannet"]
    goods = ["tea", "copper wire", "oranges", "window glass", "oats", "paper", "olive oil"]
    lines = [
        f"On day {day} the {rng.choice(ships)} unloaded {rng.randrange(20, 900)} crates of "
        f"{rng.choice(goods)} at pier {rng.randrange(1, 9)}."
        for day in range(1, SENTENCES + 1)
    ]
    fact = f"The pass key is {PASS_KEY}. Remember it: {PASS_KEY} is the pass key."
    lines.insert(SENTENCES // 2, fact)
    return " ".join(lines)


@dataclass
class Result:
    backend: str
    answer: str
    context: int  # prompt tokens
    tpot_ms: float
    metrics: dict[str, float]

    def count(self, name: str) -> int:
        return int(self.metrics.get(f"vllm:adamas_{name}_total", 0))


def ask(model: str, backend: str, config: dict | None) -> Result:
    print(f"\n{backend}: starting the server", flush=True)
    with Server(model, backend, config, SERVER_ARGS) as server:
        messages = [
            {"role": "user", "content": f"Here is a harbour log.\n{harbour_log()}\n{QUESTION}"}
        ]
        request = {"messages": messages, "temperature": 0}
        path = "/v1/chat/completions"
        reply = server.post(path, {**request, "max_tokens": ANSWER_TOKENS})

        timed = {
            **request,
            "max_tokens": TIMED_TOKENS,
            "ignore_eos": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        arrivals = [
            (event["usage"]["completion_tokens"], time.perf_counter())
            for event in server.stream(path, timed)
            if event["choices"] and event["usage"]["completion_tokens"]
        ]
        gaps = [(b - a) / (n - m) for (m, a), (n, b) in pairwise(arrivals) if n > m]
        return Result(
            backend=backend,
            answer=(reply["choices"][0]["message"]["content"] or "").strip(),
            context=reply["usage"]["prompt_tokens"],
            tpot_ms=1e3 * statistics.median(gaps),  # other load on the machine stretches a mean
            metrics=server.metrics(),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="folder of the model to serve")
    model = str(parser.parse_args().model)
    for number in (signal.SIGINT, signal.SIGTERM):  # exit normally, so that servers are stopped
        signal.signal(number, lambda received, _: sys.exit(128 + received))

    print(f"question: {QUESTION}")
    sparse = ask(model, "adamas", CONFIG)
    context = sparse.count("decode_context_tokens")
    attended = sparse.count("decode_attended_tokens")
    share = f" ({attended / context:.1%})" if context else ""
    print(f"prompt:   {sparse.context:,} tokens, the fact in the middle")
    print(f"answer:   {sparse.answer}")
    print(f"attended: {attended:,} of {context:,} tokens in context{share}, over the query heads")
    print(f"          of {sparse.count('sparse_rows'):,} sparse rows, one per layer and token")

    dense = ask(model, "flash_attn" if torch.cuda.is_available() else "cpu_attn", None)
    print(f"answer:   {dense.answer}")

    results = [[result.backend, f"{result.tpot_ms:.1f} ms"] for result in (sparse, dense)]
    print(f"\n{plain(['backend', 'median TPOT'], results)}")
    if not sparse.answer:
        return fail("the server gave no answer")
    if sparse.count("sparse_rows") == 0:
        return fail("no row was decoded sparsely")
    if not attended < context:
        return fail("no fewer tokens were attended than are in context")
    return 0


def fail(reason: str) -> int:
    print(f"The demonstration failed: {reason}.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
