"""The command `vllm-adamas doctor`: what runs here, whether it computes correctly, and from where on it gains."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from vllm_adamas import profile, tables
from vllm_adamas.backends.base import Backend
from vllm_adamas.backends.registry import available
from vllm_adamas.config import AdamasConfig
from vllm_adamas.doctor import crossover, host, selftest
from vllm_adamas.errors import AdamasError
from vllm_adamas.identity import Heads, text_config
from vllm_adamas.layout import TILE, PageLayout
from vllm_adamas.serving import compat
from vllm_adamas.serving.dense.stock import STOCK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", default="{}", metavar="JSON", help="the options you would give under 'adamas'")
    add(
        "--model",
        metavar="DIR",
        help="folder with a config.json, for the heads of the timed layer; default: Llama-3.1-8B's",
    )
    add("--no-timing", action="store_true", help="do not time decode")
    add("--json", action="store_true", help="print one JSON object")


def doctor(args, options: dict[str, Any]) -> int:
    """`vllm-adamas doctor`: exit status 0 if all is well, 1 with problems.

    Args:
        options: the parsed ``--config``.

    Raises:
        AdamasError: an argument is not valid.
    """
    config = AdamasConfig.parse(options)
    if config.profile is not None:
        profile.load(config.profile)
    heads = crossover.LLAMA if args.model is None else model_heads(args.model)
    record = {}
    for title, part in examine(options, None if args.no_timing else heads):
        record[title] = part
        if not args.json:
            print(title, textwrap.indent(TEXT[title](part), "  "), sep="\n", flush=True)
    if args.json:
        print(json.dumps(record, indent=2))
    return 1 if record["problems"] else 0


def model_heads(folder: str) -> Heads:
    """The heads of a model's layers.

    Raises:
        AdamasError: the folder does not tell them, or the kernels do not support them.
    """
    try:
        heads = Heads.of(text_config(folder))
    except KeyError as missing:
        raise AdamasError(
            f"{folder}/config.json has no {missing}: leave --model out to time a layer of Llama-3.1-8B."
        ) from None
    PageLayout(heads.size, TILE, crossover.DTYPE)  # refuses a head size
    if heads.query % heads.kv:
        raise AdamasError(
            f"{folder}/config.json has {heads.query} query heads for {heads.kv} KV heads: serve this model with "
            "another backend."
        )
    return heads


def examine(options: dict[str, Any], heads: Heads | None) -> Iterator[tuple[str, Any]]:
    """The parts of a host's record by title, each as soon as it is known.

    Args:
        options: valid options of the backend.
        heads: of the layer that is timed; None times nothing.
    """
    device = host.device()
    yield "versions", host.versions()
    facts, vllm = host.hardware(), host.vllm_problems(device)
    facts["vLLM"] = f"{compat.SUPPORTED} is supported"
    problems = list(vllm)
    if device == "cpu":
        facts["huge pages"], found = host.huge_pages()
        problems += found + host.memory_problems(os.environ)
    yield "host", facts
    kernels = available(device)
    told, backend = host.described(kernels), None
    try:
        backend = host.chosen(kernels, AdamasConfig.parse(options).kernels, device)
        told["used here"] = backend.description
    except AdamasError as error:
        problems.append(str(error))
    yield "kernels", told
    tested = {
        name: selftest.run(one, device)
        for name, one in kernels.items()
        if isinstance(one, Backend) and name != selftest.REFERENCE.name
    }
    wrong = {name: outcome.failures for name, outcome in tested.items() if outcome.failures}
    problems += [
        f"kernels={name!r} failed the self-test ({len(failures)} failures): choose other kernels, or serve with "
        "another --attention-backend."
        for name, failures in wrong.items()
    ]
    yield "self-test", {name: asdict(outcome) for name, outcome in tested.items()}
    if heads is not None:
        if vllm or backend is None or backend.name in wrong:
            yield "timing", {"left out": "something that would be timed has a problem"}
        else:
            try:
                timing = timed(backend, options, heads, device)
            except Exception as error:  # such as too little memory
                timing = {"left out": f"{type(error).__name__}: {error}"}
                problems.append(
                    "decode could not be timed (the reason is above): leave it out with --no-timing."
                )
            yield "timing", timing
    yield "problems", problems


def timed(backend: Backend, options: dict[str, Any], heads: Heads, device: str) -> dict[str, Any]:
    """The timing of :mod:`crossover` as a record."""
    config = AdamasConfig.parse(options)
    contexts = crossover.sparse_contexts(config)
    if not contexts:
        longest = crossover.CONTEXTS[-1]
        return {
            "left out": f"the budget ({config.budget}) reaches all contexts up to {longest} tokens"
        }
    layer = crossover.OneLayer(
        backend, STOCK[device], {"sparse": config}, heads, device, contexts[-1]
    )
    timings = crossover.measure(layer, contexts, crossover.Stopwatch(device), crossover.SECONDS)
    return {
        "heads": heads._asdict(),
        "budget": str(config.budget),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "kernels": backend.description,
        "stock": layer.stock.name,
        "contexts": [timing.record() for timing in timings],
        "not timed": contexts[len(timings) :],
        "noisy": crossover.is_noisy(timings),
        "gains from": crossover.gains_from(timings, "stock"),
        "options": crossover.suggested(options, timings),
    }


def _facts(part: dict[str, str]) -> str:
    return tables.plain([], list(part.items()), align="left")


def _self_test(part: dict[str, dict]) -> str:
    lines = [] if part else ["there are no kernels to test"]
    for name, outcome in part.items():
        failures, cases = outcome["failures"], outcome["cases"]
        verdict = f"{len(failures)} failures" if failures else "all agree with the reference"
        lines.append(f"{name}: {cases} batches in {outcome['seconds']:.1f} s, {verdict}")
        lines += [f"  {failure}" for failure in failures]
    return "\n".join(lines)


def _timing(part: dict[str, Any]) -> str:
    if "left out" in part:
        return f"left out: {part['left out']}"
    heads, stock, start = Heads(**part["heads"]), part["stock"], part["gains from"]
    threads = {None: "", 1: ", 1 thread"}.get(part["threads"], f", {part['threads']} threads")
    headers = ["context", f"{stock} ms", "dense rows ms", "sparse ms", "gain", "q1", "q3"]
    rows = [
        [
            f"{row['context']:,}",
            *(f"{row[f'{name}_ms']:.3f}" for name in ("stock", "dense", "sparse")),
            *(f"{row['gain'][name]:.2f}" for name in ("median", "q1", "q3")),
        ]
        for row in part["contexts"]
    ]
    lines = [
        "Decode attention of one layer, one request; not end to end, where a token also takes the weights.",
        f"{heads.query} query heads, {heads.kv} KV heads, head size {heads.size}, bfloat16{threads}; "
        f"{part['kernels']}, {part['budget']} per token set.",
        tables.plain(headers, rows),
    ]
    if part["not timed"]:
        left_out = ", ".join(f"{context:,}" for context in part["not timed"])
        lines.append(f"Not timed, to end in time: {left_out}.")
    if part["noisy"]:
        lines.append(
            "The gains spread widely (q1 to q3): this machine is busy, so repeat it when it is quiet."
        )
    if start is None:
        known = not (part["noisy"] or part["not timed"])
        advice = "serve without adamas" if known else "repeat it when the machine is quiet"
        lines.append(f"Sparse decode gains over {stock} at no context that was timed: {advice}.")
    else:
        options = json.dumps({"adamas": part["options"]})
        lines.append(f"Sparse decode gains over {stock} from {start:,} tokens on.")
        lines.append(f"Suggested: --attention-backend adamas --additional-config '{options}'")
    return "\n".join(lines)


def _problems(part: list[str]) -> str:
    return "\n".join(part) or "none"


#: How each part of the record is told to people.
TEXT = {
    "versions": _facts,
    "host": _facts,
    "kernels": _facts,
    "self-test": _self_test,
    "timing": _timing,
    "problems": _problems,
}
