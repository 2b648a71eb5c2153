"""The command `vllm-adamas loadtest`: the servers in turn, and a report."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_adamas.environment import Environment
from vllm_adamas.errors import INTERRUPTED, AdamasError
from vllm_adamas.identity import model_folder, text_config
from vllm_adamas.serving.launch import Server
from vllm_adamas.serving.loadtest import aiperf
from vllm_adamas.serving.loadtest.drive import Run
from vllm_adamas.serving.loadtest.reconcile import Layers, options_in_force
from vllm_adamas.serving.loadtest.record import ADAMAS, Results
from vllm_adamas.serving.loadtest.report import as_html, as_markdown, ratios
from vllm_adamas.serving.loadtest.scenario import (
    Agents,
    Scenario,
    Soak,
    check_fits,
    load,
    shipped,
)
from vllm_adamas.tables import plain

STOCK = {"cpu": "cpu_attn", "cuda": "flash_attn"}  #: vLLM's backend by the type of the device
CLIENTS = ("vllm", "aiperf")
#: Arguments of `vllm serve` that the load test gives itself, or that would hide the server or its counters.
RESERVED = ("--attention-backend", "--additional-config", "--host", "--port", "--uds", "--api-key")
RESERVED += ("--ssl-keyfile", "--ssl-certfile", "--root-path", "--headless", "--disable-log-stats")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("scenario", metavar="SCENARIO", help=f"a YAML file, or one of {', '.join(shipped())}")
    add("model", metavar="MODEL", help="folder or hub name")
    add("--config", default="{}", metavar="JSON", help="the options you would give under 'adamas'")
    add("--stock", metavar="BACKEND", help="what to compare with; default: cpu_attn or flash_attn")
    add("--client", choices=CLIENTS, default=CLIENTS[0], help="sends requests without state")
    add("--scale", type=float, default=1.0, help="factor on the lengths of prompts")
    add("--load", type=float, default=1.0, help="factor on requests, their rate and concurrency")
    add("--repeats", type=int, help="servers of each backend; default: the scenario's")
    add("--output", metavar="DIR", default="adamas-loadtest", help="for the report and the logs")
    add("--limit", type=float, default=3600.0, help="seconds for the traffic of one server")
    add("--start-limit", type=float, default=1800.0, help="seconds for the start of one server")


def loadtest(args, options: dict[str, Any]) -> int:
    """Runs the command.

    Args:
        args: ``server_args`` are the arguments of `vllm serve` after ``--``.
        options: the parsed ``--config``.

    Returns:
        Exit status 0 if all is well, 1 with problems, 130 after an interrupt.

    Raises:
        AdamasError: an argument or the scenario is not valid.
    """
    scenario = _scenario(args)
    client = aiperf.program() if args.client == "aiperf" else None
    folder = Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdamasError(
            f"--output {folder} cannot be made a folder ({error.strerror}): give another path."
        ) from None
    results = _results(args, scenario, options)
    status = 1
    with _interruptible():
        try:
            _run(args, results, folder, client)
        except KeyboardInterrupt:
            results.ended, status = "interrupted; no server is left", INTERRUPTED
        except AdamasError:
            raise
        except RuntimeError as error:  # of a server or a client; it has the end of their log
            results.ended = str(error).partition(". The end of ")[0]
            print(error, file=sys.stderr)
        record = _write(results, folder)
    table = ratios(record)
    print(plain(table.headers, table.rows))
    for problem in record["problems"]:
        print(f"PROBLEM: {problem}")
    print(f"wrote {folder / 'report.html'}, report.md and record.json")
    return 0 if record["ok"] else status


def _scenario(args) -> Scenario:
    for name in ("scale", "load", "limit", "start_limit", "repeats"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise AdamasError(
                f"--{name.replace('_', '-')} {value:g} is impossible: give a finite number above 0."
            )
    if args.stock and args.stock.lower() == ADAMAS:
        raise AdamasError(f"--stock {args.stock} would compare adamas with itself: leave it out.")
    scenario = load(args.scenario).scaled(args.scale, args.load)
    if args.client != CLIENTS[0] and isinstance(scenario.traffic, Agents | Soak):
        raise AdamasError(
            f"--client {args.client} cannot send traffic of kind {scenario.traffic.kind}: leave --client out, "
            "since this kind has a client of its own."
        )
    server_args = (*scenario.server_args, *args.server_args)
    for argument in server_args:
        if (name := argument.partition("=")[0].replace("_", "-")) in RESERVED:
            raise AdamasError(f"{name} cannot be passed to the servers: leave it out.")
    changed = {"server_args": server_args, "repeats": args.repeats or scenario.repeats}
    scenario = scenario.model_copy(update=changed)
    if (admitted := known_max_model_len(args.model, server_args)) is not None:
        check_fits(scenario.traffic, admitted)
    return scenario


def known_max_model_len(model: str, server_args: Sequence[str]) -> int | None:
    """The longest context, as far as it is known before a server starts."""
    given = re.findall(r"--max[-_]model[-_]len[ =](\S*)", " ".join(server_args))
    if given:
        return int(given[-1]) if given[-1].isdecimal() else None
    if (folder := model_folder(model)) is None:
        return None
    config = text_config(str(folder))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # vLLM multiplies by the factors of some position encodings.
    return None if "factor" in rope else config.get("max_position_embeddings")


def _results(args, scenario: Scenario, options: dict[str, Any]) -> Results:
    environment = Environment.capture()
    facts = {
        "name": Path(args.scenario).stem,
        "model": Path(args.model).name,
        "options": options,
        "scale": args.scale,
        "load": args.load,
        "client": args.client,
        "environment": environment.record(),
    }
    stock = args.stock or STOCK["cuda" if environment.gpu else "cpu"]
    return Results(facts, scenario, stock)


def _run(args, results: Results, folder: Path, client: str | None) -> None:
    """Runs the servers one after another; what is written after each survives the next one's end.

    Args:
        client: path of aiperf, if it sends the requests.
    """
    scenario = results.scenario
    # adamas first: what it refuses is refused before anything has run.
    order = [(name, n) for n in range(scenario.repeats) for name in (ADAMAS, results.stock)]
    for number, (backend, repeat) in enumerate(order, 1):
        name = f"{backend}-{repeat + 1}"
        print(f"{name}, server {number} of {len(order)}: starting", file=sys.stderr, flush=True)
        with Server(
            args.model,
            backend,
            results.facts["options"] if backend == ADAMAS else None,
            scenario.server_args,
            log_path=folder / f"{name}.server.log",
            timeout=args.start_limit,
        ) as server:
            print(f"{name}: started", file=sys.stderr, flush=True)
            seed = scenario.seed + repeat
            run = Run(scenario, server, name, folder, seed, args.limit, client)
            outcome = asyncio.run(run.drive())
            layers, remark = _layers(server) if backend == ADAMAS else (None, "")
        results.add(backend, outcome, layers, remark)
        _write(results, folder)


def _layers(server: Server) -> tuple[Layers | None, str]:
    """The sparse layers under a server, or why they are unknown."""
    reason = "the model's config.json is not here"
    if (folder := model_folder(server.model)) is not None:
        try:
            config = options_in_force(server.get("/metrics"))
            return Layers.of(text_config(str(folder)), config), ""
        except KeyError as error:
            reason = f"config.json has no {error}"
        except (OSError, ValueError) as error:
            reason = str(error)
    return None, f"the counters of adamas are not reconciled: {reason}"


def _write(results: Results, folder: Path) -> dict[str, Any]:
    """Writes the record and its reports; returns the record."""
    record = results.record()
    (folder / "record.json").write_text(json.dumps(record) + "\n")
    (folder / "report.md").write_text(as_markdown(record))
    (folder / "report.html").write_text(as_html(record))
    return record


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the run as an interrupt does, and a second signal does not stop the first from cleaning up."""

    def interrupt(number, frame):
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    for one in before:
        signal.signal(one, interrupt)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
