"""The command `vllm-adamas storm`: traffic, then checks, then a verdict."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

from vllm_adamas import __version__
from vllm_adamas.environment import Environment
from vllm_adamas.errors import AdamasError
from vllm_adamas.serving.storm.client import Endpoint, Outcome, name_of
from vllm_adamas.serving.storm.reference import Verdict, replay, score
from vllm_adamas.serving.storm.report import Report
from vllm_adamas.serving.storm.traffic import COMPLETIONS, TURNS, WEIGHTS, Traffic, Unit
from vllm_adamas.serving.storm.watch import Watch, memory

#: Arguments that are copied into the record.
FACTS = ("url", "seed", "seconds", "requests", "concurrency", "block_size", "max_prompt")
FACTS += ("max_tokens", "burst", "oracle", "distance")
ENOUGH = 10  #: wrong tokens after which checking stops
GONE = 20  #: transport errors in a row after which the server counts as gone
WARM_UP = 0.2  #: share of the storm during which memory may grow
EXACT = 0.1  #: largest distance, in nats, that implies float32
PATIENCE = 60.0  #: seconds within which a server without clients must become idle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("url", metavar="URL", help="URL of the server, such as http://127.0.0.1:8000")
    add("--seed", type=int, default=0)
    add("--seconds", type=float, help="duration; default: 60, or unlimited if --requests is given")
    add("--requests", type=int, help="maximum number of requests")
    add(
        "--limit",
        type=float,
        help="seconds for everything, checks included; default: from --seconds",
    )
    add("--timeout", type=float, default=120.0, help="seconds for one request")
    add(
        "--concurrency",
        type=int,
        default=8,
        help="units in flight; a unit may send several requests at once",
    )
    add("--block-size", type=int, default=16, help="the KV cache's, in tokens, or a divisor of it")
    add("--max-prompt", type=int, default=768, help="tokens of an ordinary prompt")
    add("--max-tokens", type=int, default=32, help="tokens of an ordinary output")
    add("--burst", type=int, default=12, help="long requests at once")
    add("--kinds", help=f"comma-separated; default: all of {', '.join(WEIGHTS)}")
    add("--oracle", metavar="URL", help="a server with dense attention, to score answers with")
    add("--replay", action="store_true", help="replay answers even if there is an oracle")
    add(
        "--distance",
        type=float,
        default=0.5,
        help="most nats between a right token and the best; 0.01 for float32",
    )
    add("--check", type=int, default=200, metavar="N", help="answers to check; 0 for none")
    add("--pid", type=int, help="pid of the server, to watch its memory")
    add("--growth", type=float, default=512.0, help="MiB that its memory may grow by after warm-up")
    add("--json", metavar="FILE", help="where to write the record")


def storm(args: argparse.Namespace) -> int:
    """Runs the command; returns exit status 0 if all is well and 1 if there are problems.

    Raises:
        AdamasError: an argument is invalid, or the server or the oracle does not answer.
    """
    _check(args)
    report = asyncio.run(_bounded(args))
    if args.json:
        Path(args.json).write_text(json.dumps(report.record(), indent=2) + "\n")
    print(report.text())
    return int(bool(report.problems()))


def _check(args) -> None:
    for name in ("seconds", "requests", "limit", "timeout", "distance"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise AdamasError(f"--{name} {value:g} is not above 0: give a larger one.")
    for name in ("concurrency", "block_size", "max_prompt", "max_tokens", "burst"):
        if (value := getattr(args, name)) < 1:
            raise AdamasError(
                f"--{name.replace('_', '-')} {value} is not above 0: give a larger one."
            )
    args.kinds = args.kinds.split(",") if args.kinds else list(WEIGHTS)
    if unknown := [kind for kind in args.kinds if kind not in WEIGHTS]:
        raise AdamasError(f"--kinds {unknown[0]} is none of {', '.join(WEIGHTS)}: leave it out.")
    if args.seconds is None and args.requests is None:
        args.seconds = 60.0
    if args.limit is None:
        args.limit = 3600.0 if args.seconds is None else 2 * args.seconds + 900.0
    if args.pid is not None and not memory(args.pid):
        raise AdamasError(
            f"the memory of --pid {args.pid} cannot be read: give the pid of the "
            "server's first process, and install psutil."
        )


async def _bounded(args) -> Report:
    facts = {name: getattr(args, name) for name in FACTS}
    run = _Storm(args, Report(facts, args.growth))
    try:
        await asyncio.wait_for(run.run(), args.limit)
    except asyncio.TimeoutError:
        run.report.other.append(f"not done after {args.limit:g} s")
    return run.report


class _Storm:
    """One storm: the traffic, the watch, the checks."""

    def __init__(self, args, report: Report):
        self.args, self.report = args, report
        self.greedy: list[Outcome] = []  # answers that can be checked
        self.started = time.monotonic()
        self._errors_in_a_row = 0  # transport errors
        self._phase = "storm"

    async def run(self) -> None:
        args = self.args
        async with Endpoint(args.url, args.timeout) as self.server:
            self.watch = Watch(self.server)
            await self._prepare()
            side = asyncio.ensure_future(self._watch())
            try:
                await asyncio.gather(*(self._send_units() for _ in range(args.concurrency)))
                if not self._server_gone() and await self._becomes_idle() and args.check:
                    await self._check()
            finally:
                side.cancel()
                await self.watch.look()
                self.report.restarts = self.watch.restarts
                self.report.unhealthy = self.watch.unhealthy
                self.report.moved = self.watch.moved()
                self._record_memory("end")

    async def _prepare(self) -> None:
        """Checks the server and prepares the traffic, before the first request."""
        args, server = self.args, self.server
        if not await self.watch.look():
            raise AdamasError(
                f"{args.url} is not healthy ({self.watch.unhealthy[0]}): start it first."
            )
        if args.max_tokens * TURNS + 256 > server.max_model_len:
            raise AdamasError(
                f"--max-tokens {args.max_tokens} leaves no room for prompts in the server's "
                f"max_model_len of {server.max_model_len}: give a smaller one."
            )
        if args.oracle:
            async with Endpoint(args.oracle, args.timeout):
                pass  # it answers
        text = await server.book()
        names = ("block_size", "max_prompt", "max_tokens", "burst", "kinds")
        limits = {name: getattr(args, name) for name in names}
        self.traffic = Traffic(args.seed, text, server.max_model_len, **limits)
        self.report.facts |= {"model": server.model, "max_model_len": server.max_model_len}
        self.report.facts |= {"environment": (await self._environment()).record()}
        self.started = time.monotonic()

    async def _environment(self) -> Environment:
        """The server's vLLM, perhaps on another host, and the release that generated the traffic."""
        versions = {"vllm-adamas": __version__}
        status, body = await self.server.get("/version")
        if status == 200:
            versions["vllm"] = json.loads(body)["version"]
        return Environment(versions=versions)

    def _progress(self) -> float:
        """Share of the storm that is over."""
        args = self.args
        shares = [self.traffic.sent / args.requests] if args.requests else []
        if args.seconds:
            shares.append((time.monotonic() - self.started) / args.seconds)
        return max(shares)

    def _server_gone(self) -> bool:
        return self._errors_in_a_row >= GONE

    async def _send_units(self) -> None:
        while self._progress() < 1 and not self._server_gone():
            await self._send(self.traffic.unit())

    async def _send(self, unit: Unit) -> None:
        history: list = []
        for requests in unit.rounds:
            calls = (self.server.send(request, unit.number, history) for request in requests)
            for request, outcome in zip(requests, await asyncio.gather(*calls), strict=True):
                self._record(outcome)
                if unit.chat and not outcome.error:
                    answer = {"role": "assistant", "content": outcome.choices[0].text}
                    history += [*request.body["messages"], answer]

    def _record(self, outcome: Outcome) -> None:
        self.report.add(outcome)
        if "warm" not in self.report.memory and self._progress() > WARM_UP:
            self._record_memory("warm")
        lost = (outcome.error or "").startswith("transport")
        self._errors_in_a_row = self._errors_in_a_row + 1 if lost else 0
        comparable = not outcome.request.unstable or self.args.distance <= EXACT
        if outcome.request.greedy and comparable and not outcome.error and outcome.choices:
            self.greedy.append(outcome)

    async def _watch(self) -> None:
        """Polls the server every second and prints a line every ten."""
        for second in range(1, sys.maxsize):
            await asyncio.sleep(1)
            await self.watch.look()
            if second % 10 == 0:
                self._print_progress()

    def _record_memory(self, when: str) -> None:
        if self.args.pid:
            self.report.memory[when] = memory(self.args.pid)

    def _print_progress(self) -> None:
        errors = sum(sum(found.values()) for found in self.report.errors.values())
        checked = sum(verdict.compared for verdict in self.report.checks.values())
        print(
            f"{time.monotonic() - self.started:5.0f} s, {self._phase}: "
            f"{sum(self.report.requests.values())} requests, {errors} errors, "
            f"{self.watch.restarts} restarts, {self.watch.busy()} under way, {checked} tokens compared",
            file=sys.stderr,
            flush=True,
        )

    async def _becomes_idle(self) -> bool:
        """Whether the server becomes idle, also after clients that left.

        Its gauges change only in a step, so a small request is sent before each look.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                await self.server.json(COMPLETIONS, {"prompt": [1], "max_tokens": 1})
            except Exception as error:
                self.report.other.append(f"the quiet server does not answer: {name_of(error)}")
                return False
            await self.watch.look()
            if not self.watch.busy():
                return True
            if time.monotonic() > deadline:
                self.report.other.append(
                    f"{self.watch.busy()} requests are in the server {PATIENCE:g} s after the last client"
                )
                return False
            await asyncio.sleep(0.5)

    async def _check(self) -> None:
        args, answers = self.args, chosen(self.greedy, self.args.check, self.args.seed)
        if args.oracle:
            async with Endpoint(args.oracle, args.timeout) as oracle:
                await self._judge("scored", score, oracle, answers)
        if args.replay or not args.oracle:
            await self._judge("replayed", replay, self.server, answers)

    async def _judge(self, name: str, how, reference: Endpoint, answers: list[Outcome]) -> None:
        self._phase = name
        verdict = self.report.checks[name] = Verdict()
        for answer in answers:
            verdict.add(await how(reference, answer, self.args.distance))
            if len(verdict.wrong) >= ENOUGH:
                break


def chosen(answers: list[Outcome], count: int, seed: int) -> list[Outcome]:
    """At most ``count`` answers, spread over the kinds as evenly as possible."""
    order = list(answers)
    random.Random(seed).shuffle(order)
    seen: Counter = Counter()
    ranks = []
    for answer in order:
        seen[answer.request.kind] += 1
        ranks.append(seen[answer.request.kind])
    ranked = sorted(zip(ranks, order, strict=True), key=lambda pair: pair[0])
    return [answer for _, answer in ranked[:count]]
