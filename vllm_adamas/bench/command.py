"""The command `vllm-adamas bench`: attention of one layer, then engines in turn, and a report."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_adamas import page
from vllm_adamas.bench import findings
from vllm_adamas.bench.engine import Facts
from vllm_adamas.bench.results import ATTENTION, DENSE, ENGINES, TPOT, Results
from vllm_adamas.config import AdamasConfig
from vllm_adamas.doctor import host
from vllm_adamas.errors import INTERRUPTED, AdamasError
from vllm_adamas.evaluate.engine import local_model
from vllm_adamas.evaluate.study import without_folders
from vllm_adamas.identity import fingerprint, model_folder
from vllm_adamas.worker import Worker

ROUNDS = 3  #: of a cell in one engine
SHORT = 8192  #: tokens of the longest context that a CPU measures unless told otherwise
CONTEXTS = {"cpu": (SHORT // 8, SHORT // 2), "cuda": (8192, 32768)}
COUNTS = (
    "contexts",
    "batches",
    "budgets",
    "output_len",
    "repeats",
    "max_model_len",
    "kv_cache_gib",
)
BATCHES = {"cpu": (1, 4), "cuda": (1, 8)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command but for the engine's dtype and KV cache, which other commands have too."""

    def add(name: str, **how: Any) -> None:
        parser.add_argument(f"--{name}", **how)

    parser.add_argument("model", metavar="MODEL", help="folder or hub name")
    add("output", metavar="DIR", default="adamas-bench", help="for bench.json and report.html")
    counts = {"nargs": "+", "type": int, "metavar": "N"}
    add("contexts", **counts, help="tokens of a prompt with its answer")
    add("batches", **counts, help="requests that decode at once")
    add("budgets", **counts, help="token budgets to compare; default: that of --config")
    add("config", default="{}", metavar="JSON", help="the options you would give under 'adamas'")
    add("output-len", type=int, default=32, metavar="N", help="tokens of an answer; default: 32")
    add("repeats", type=int, default=2, metavar="N", help="engines of each backend; default: 2")
    add("max-model-len", type=int, metavar="N", help="as vLLM's; default: the model's own")
    add("kv-cache-dtype", default="auto", metavar="DTYPE", help="as vLLM's")
    add("load-format", default="auto", metavar="FORMAT", help="as vLLM's; dummy reads no weights")
    add("enforce-eager", action="store_true", help="as vLLM's: no compilation, no CUDA graphs")
    add("no-attention", action="store_true", help="leave the attention of one layer out")
    add("no-engines", action="store_true", help="leave the engines out")


@dataclass(frozen=True)
class Run:
    """What is measured.

    Args:
        facts: of the model.
        cells: (context, batch).
        output_len: tokens of an answer.
        repeats: engines of each backend.
        engine: arguments of the engines but for the configuration.
    """

    facts: Facts
    cells: list[tuple[int, int]]
    output_len: int
    repeats: int
    engine: dict[str, Any]

    def attention(self, results: Results) -> None:
        """Times a layer in the cells that have no times yet."""
        names = list(self.facts.options)
        missing = {
            cell: [name for name in names if results.find(ATTENTION, name, *cell) is None]
            for cell in self.cells
        }
        if self.facts.fp8:
            why = "vLLM's own attention over fp8 is timed end to end alone"
            for cell, some in missing.items():
                for name in some:
                    results.add(ATTENTION, {**_entry(name, *cell), "left out": why})
            return
        if not any(missing.values()):
            return
        asked = {
            "heads": self.facts.heads,
            "dtype": self.facts.dtype,
            "launch": self.facts.max_model_len,
            "options": self.facts.options,
        }
        with Worker("vllm_adamas.bench.attention", asked) as worker:
            results.record["layer"] |= worker.told
            for number, ((context, batch), some) in enumerate(missing.items(), 1):
                if not some:
                    continue
                found = worker.ask({"context": context, "batch": batch, "names": some})
                title = f"[{number}/{len(missing)}] attention, {context:,} tokens x {batch}"
                _tell(f"{title}: {_told(found, worker.told['attention'])}")
                for name in some:
                    entry = _entry(name, context, batch)
                    if "us" in found:
                        entry |= {"dense_us": found["us"]["stock"], "adamas_us": found["us"][name]}
                        entry["copies"] = found["copies"]
                    else:
                        entry["left out"] = found["left out"]
                    results.add(ATTENTION, entry)

    def engines(self, results: Results) -> None:
        """Times engines, one after another: dense and the configurations, in reverse order in every second repeat."""
        names = [DENSE, *self.facts.options]
        turns = [
            (repeat, name)
            for repeat in range(1, self.repeats + 1)
            for name in names[:: 1 if repeat % 2 else -1]
        ]
        for number, (repeat, name) in enumerate(turns, 1):
            missing = [
                cell for cell in self.cells if results.find(TPOT, name, repeat, *cell) is None
            ]
            if not missing:
                continue
            title = f"[{number}/{len(turns)}] engine of {name}"
            _tell(f"{title}: starting")
            adamas = None if name == DENSE else self.facts.options[name]
            with Worker("vllm_adamas.bench.engine", {**self.engine, "adamas": adamas}) as worker:
                results.add(ENGINES, {"configuration": name, "repeat": repeat, **worker.told})
                for context, batch in missing:
                    entry = {"configuration": name, "repeat": repeat}
                    entry |= {"context": context, "batch": batch}
                    entry |= self._times(worker, context, batch)
                    what = entry.get("left out") or f"{_tpot(entry):.2f} ms per token"
                    _tell(f"{title}, {context:,} tokens x {batch}: {what}")
                    results.add(TPOT, entry)

    def _times(self, worker: Worker, context: int, batch: int) -> dict[str, Any]:
        """The steps of a cell, or why there are none."""
        capacity = worker.told["capacity"]
        if batch * context > capacity:
            return {
                "left out": f"{batch * context:,} tokens do not fit into the KV cache of {capacity:,}"
            }
        asked = {"context": context, "batch": batch, "tokens": self.output_len, "count": ROUNDS}
        rounds = [steps for steps in worker.ask(asked)["rounds"] if steps]
        if len(rounds) < ROUNDS:
            return {"left out": "its requests did not decode together"}
        return {"steps_ms": rounds}


def _entry(name: str, context: int, batch: int) -> dict[str, Any]:
    return {"configuration": name, "context": context, "batch": batch}


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _told(found: dict[str, Any], attention: str) -> str:
    times = {**found.get("us", {})}
    medians = {
        attention if name == "stock" else name: statistics.median(times[name]) for name in times
    }
    each = (f"{name} {median:,.1f} µs" for name, median in medians.items())
    return found.get("left out") or ", ".join(each)


def _tpot(entry: dict[str, Any]) -> float:
    return statistics.median(statistics.fmean(steps) for steps in entry["steps_ms"])


def bench(args, options: dict[str, Any]) -> int:
    """Runs the command.

    Args:
        options: the parsed ``--config``.

    Returns:
        Exit status 0, 1 if a process ended, 130 after an interrupt.

    Raises:
        AdamasError: an argument is not valid, or the model cannot be served.
    """
    _check(args)
    model, folder, device = local_model(args.model), Path(args.output), host.device()
    name = Path(model).name
    page.held(folder, name)  # refuses what the report could not be written to
    budgets = args.budgets or [AdamasConfig.parse(options).token_budget]
    configurations = {
        f"adamas {budget}": {**options, "token_budget": budget} for budget in dict.fromkeys(budgets)
    }
    for configuration in configurations.values():
        AdamasConfig.parse(configuration)
    batches = sorted(set(args.batches or BATCHES[device]))
    vllm = {"dtype": args.dtype, "kv_cache_dtype": args.kv_cache_dtype}
    vllm |= {"load_format": args.load_format, "enforce_eager": args.enforce_eager}
    engine = {**vllm, "max_num_seqs": max(batches)}
    if args.kv_cache_gib is not None:
        engine["kv_cache_memory_bytes"] = int(args.kv_cache_gib * 2**30)
    facts = Facts.of(model, args.max_model_len, configurations, **engine)
    contexts = _contexts(args, facts.max_model_len, name, device)
    weights = model_folder(model)
    settings = {
        "model": name,
        "fingerprint": fingerprint(weights) if weights else "",
        "options": without_folders({k: v for k, v in options.items() if k != "token_budget"}),
        **vllm,
        "kv_cache_gib": args.kv_cache_gib,
        "max_model_len": facts.max_model_len,
        "output_len": args.output_len,
    }
    results = Results(folder, settings)
    results.record["layer"] |= {
        "heads": facts.heads,
        "dtype": facts.dtype,
        "max_model_len": facts.max_model_len,
    }
    cells = [(context, batch) for context in contexts for batch in batches]
    engine |= {"model": model, "max_model_len": facts.max_model_len}
    run = Run(facts, cells, args.output_len, args.repeats, engine)
    status = 0
    try:
        if not args.no_attention:
            run.attention(results)
        if not args.no_engines:
            run.engines(results)
    except KeyboardInterrupt:
        _tell(f"interrupted: the same command goes on from {results.path}")
        return INTERRUPTED
    except RuntimeError as error:
        if isinstance(error, AdamasError):
            raise
        _tell(f"vllm-adamas: {error}: the same command goes on from {results.path}.")
        status = 1
    found = findings.record(results.record)
    print("\n".join([*page.text(found), "", f"report: {page.put(found, folder)}"]))
    return status


def _check(args) -> None:
    for option in COUNTS:
        given = getattr(args, option)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and not 0 < number < math.inf:
                raise AdamasError(
                    f"--{option.replace('_', '-')} {number:g} is impossible: give a number above 0."
                )
    if args.output_len < 2:
        raise AdamasError(
            f"--output-len {args.output_len} has no time from one token to the next: give 2 or more."
        )


def _contexts(args, longest: int, model: str, device: str) -> list[int]:
    """The contexts, or those that suit the device and a model of ``longest`` tokens."""
    given = sorted(set(args.contexts or ()))
    if given and given[-1] > longest:
        raise AdamasError(
            f"the context {given[-1]} is beyond the {longest} tokens that {model} admits here: lower --contexts or "
            "raise --max-model-len."
        )
    fitting = [context for context in CONTEXTS[device] if context <= longest]
    contexts = given or fitting or [longest]
    if args.output_len >= contexts[0]:
        raise AdamasError(
            f"--output-len {args.output_len} does not fit into a context of {contexts[0]}: give fewer tokens or longer "
            "--contexts."
        )
    return contexts
