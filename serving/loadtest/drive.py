"""Drives one server with the traffic of a scenario, and reads its counters before and after."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_adamas.serving.launch import LOG_LINES, Server
from vllm_adamas.serving.loadtest import aiperf
from vllm_adamas.serving.loadtest.measure import Sample
from vllm_adamas.serving.loadtest.scenario import Agents, Scenario, Soak, check_fits
from vllm_adamas.serving.loadtest.traffic import chunk_tokens, lines
from vllm_adamas.serving.storm.client import Endpoint, name_of
from vllm_adamas.serving.storm.traffic import COMPLETIONS, GREEDY, Request
from vllm_adamas.serving.storm.watch import Watch

MODULE = [sys.executable, "-m"]
VLLM = [*MODULE, "vllm.entrypoints.cli.main"]
PROGRESS = 10.0  #: seconds between two lines of progress
SETTLE = 1.1  #: seconds within which counters are copied once
QUIET = ([11, 12, 13, 14, 15, 16, 17, 18], 1)  #: a prompt, and its tokens of output: prefill alone
GRACE = 20  #: seconds within which a server that does not answer may end
WARM_UP = 1024  #: most tokens of the first request, which is not measured


@dataclass
class Outcome:
    """What one server did.

    Args:
        seconds: from the first request to the last answer.
        samples: the requests, in the order of the scenario.
        others: (prompt, output) tokens of requests that belong to no sample, but are in ``moved``.
        moved: increase of the server's counters.
        storm: the record of a storm, for a soak.
        problems: what went wrong besides failed requests.
    """

    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    others: list[tuple[int, int]] = field(default_factory=list)
    moved: dict[str, float] = field(default_factory=dict)
    storm: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)


@dataclass
class Run:
    """One server under the traffic of a scenario.

    Args:
        name: for the lines of progress and the files of logs.
        folder: where the logs of the clients go.
        seed: of the traffic.
        limit: seconds for the traffic.
        aiperf: path of the program aiperf, which then sends requests without state in place of `vllm bench serve`.
    """

    scenario: Scenario
    server: Server
    name: str
    folder: Path
    seed: int
    limit: float
    aiperf: str | None = None

    async def drive(self) -> Outcome:
        """Warms the server up, sends the traffic and reads the counters.

        Raises:
            RuntimeError: the server or a client ended; the message has the end of its log.
            AdamasError: the longest context does not fit, or the server does not answer.
        """
        traffic, outcome = self.scenario.traffic, Outcome()
        client: Callable[[Outcome], Awaitable[None]] = self._aiperf if self.aiperf else self._bench
        if isinstance(traffic, Agents):
            client = self._agents
        elif isinstance(traffic, Soak):
            client = self._soak
        async with Endpoint(self.server.url, self.limit) as self._endpoint:
            check_fits(traffic, self._endpoint.max_model_len)
            await self._warm_up()
            await self._settle()
            self._watch = Watch(self._endpoint)
            await self._watch.look()
            await self._bounded(client(outcome))
            outcome.others += await self._settle()
            await self._watch.look()
        outcome.moved = self._watch.moved()
        if self._watch.restarts:
            outcome.problems.append(f"the server was restarted {self._watch.restarts} x")
        if self._watch.unhealthy:
            outcome.problems.append(f"unhealthy, first {self._watch.unhealthy[0]}")
        return outcome

    async def _warm_up(self) -> None:
        tokens = min(WARM_UP, self._endpoint.max_model_len // 2)
        prompt = [100 + 7 * n % 400 for n in range(tokens)]
        await self._complete(prompt, 8)

    async def _settle(self) -> list[tuple[int, int]]:
        """Waits until the counters hold everything so far; returns the requests that it took.

        On GPUs each step brings the copy that the step before it began, and copies are a second apart.
        """
        prompt, tokens = QUIET
        for _ in range(2):
            await asyncio.sleep(SETTLE)
            await self._complete(prompt, tokens)
        await asyncio.sleep(SETTLE)
        return [(len(prompt), tokens)] * 2

    async def _complete(self, prompt: list[int], tokens: int) -> None:
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **GREEDY}
        try:
            await self._endpoint.json(COMPLETIONS, body)
        except Exception as error:
            for _ in range(GRACE):  # a server whose engine has died is about to end
                self.server.raise_if_ended()
                await asyncio.sleep(1)
            raise RuntimeError(
                f"The server does not answer ({name_of(error)}). The end of {self.server.log_path}:\n"
                f"{self.server.log_tail()}"
            ) from None

    async def _bounded(self, traffic: Awaitable[None]) -> None:
        """Waits for the traffic, as long as the server lives and the limit is not over."""
        tasks = [asyncio.ensure_future(traffic), asyncio.ensure_future(self._look_after())]
        try:
            done, _ = await asyncio.wait(
                tasks, timeout=self.limit, return_when=asyncio.FIRST_COMPLETED
            )
            for task in reversed(tasks):  # a dead server explains a failed client
                if task in done:
                    await task
            if not done:
                raise RuntimeError(
                    f"{self.name} was not done after {self.limit:g} s: give a larger --limit or a "
                    "smaller --load."
                )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look_after(self) -> None:
        """Prints progress until the server ends, which raises."""
        start = last = time.monotonic()
        while True:
            await asyncio.sleep(1)
            self.server.raise_if_ended()
            if time.monotonic() - last >= PROGRESS:
                last = time.monotonic()
                await self._watch.look()
                self.server.raise_if_ended()
                answered = self._watch.moved().get("vllm:request_success_total", 0)
                print(
                    f"{self.name}: {last - start:.0f} s, {answered:.0f} requests answered, "
                    f"{self._watch.busy()} under way",
                    file=sys.stderr,
                    flush=True,
                )

    async def _bench(self, outcome: Outcome) -> None:
        """Requests without state: `vllm bench serve` replays them as a trace."""
        traffic = self.scenario.traffic
        wanted = lines(traffic, self.seed)
        trace, result = (self.folder / f"{self.name}.{kind}" for kind in ("jsonl", "result.json"))
        trace.write_text("".join(json.dumps(asdict(line)) + "\n" for line in wanted))
        command = [
            *VLLM, "bench", "serve", "--base-url", self.server.url, "--model", self.server.model,
            "--served-model-name", self._endpoint.model, "--dataset-name", "timed_trace",
            "--dataset-path", str(trace), "--timed-trace-chunk-hash-size", str(chunk_tokens(traffic)),
            "--num-prompts", str(len(wanted)), "--temperature", "0", "--seed", str(self.seed),
            "--ready-check-timeout-sec", "0", "--disable-tqdm", "--save-result", "--save-detailed",
            "--result-dir", str(self.folder), "--result-filename", result.name,
        ]  # fmt: skip
        if traffic.concurrency:
            command += ["--max-concurrency", str(traffic.concurrency)]
        if "--trust-remote-code" in self.scenario.server_args:
            command.append("--trust-remote-code")
        try:
            # Hashes of a trace become tokens through Python's own, which differ between processes.
            await self._subprocess("vllm bench serve", command, {"PYTHONHASHSEED": "0"})
            found = json.loads(result.read_text())
        finally:
            for file in (trace, result):
                file.unlink(missing_ok=True)
        outcome.samples = samples(found, [line.output_length for line in wanted])
        outcome.seconds = found["duration"]

    async def _aiperf(self, outcome: Outcome) -> None:
        """Requests without state: aiperf sends them, their bodies made here."""
        traffic = self.scenario.traffic
        wanted = lines(traffic, self.seed)
        vocabulary = sorted(set(await self._endpoint.book()))
        made = aiperf.bodies(
            wanted, chunk_tokens(traffic), vocabulary, self._endpoint.model, self.seed
        )
        with tempfile.TemporaryDirectory(prefix="aiperf-") as folder:
            trace = Path(folder, "trace.jsonl")
            trace.write_text("".join(f"{line}\n" for line in made))
            command = aiperf.command(
                self.aiperf,
                self.server.url,
                self._endpoint.model,
                self.server.model,
                trace,
                traffic.concurrency,
            )
            if "--trust-remote-code" in self.scenario.server_args:
                command.append("--tokenizer-trust-remote-code")
            await self._subprocess("aiperf", command, {"TMPDIR": folder, **aiperf.ENVIRONMENT})
            records = Path(folder, aiperf.RECORDS).read_text().splitlines()
        outcome.samples, outcome.seconds = aiperf.samples(records, wanted)

    async def _soak(self, outcome: Outcome) -> None:
        traffic = self.scenario.traffic
        file = self.folder / f"{self.name}.storm.json"
        arguments = {
            "requests": traffic.requests,
            "concurrency": traffic.concurrency,
            "max-prompt": traffic.prompt_tokens,
            "max-tokens": traffic.output_tokens,
            "burst": traffic.burst,
            "check": traffic.check,
            "growth": traffic.growth_mib,
            "limit": self.limit,
            "seed": self.seed,
            "pid": self.server.pid,
            "json": file,
        }
        command = [*MODULE, "vllm_adamas.cli", "storm", self.server.url]
        for name, value in arguments.items():
            command += [f"--{name}", str(value)]
        begin = time.monotonic()
        await self._subprocess("the storm", command, statuses=(0, 1))
        outcome.seconds = time.monotonic() - begin
        outcome.storm = json.loads(file.read_text())
        file.unlink()
        for fact in ("url", "oracle", "model", "environment"):  # the load test's record has them
            outcome.storm.pop(fact)
        outcome.problems += outcome.storm["problems"]

    async def _subprocess(
        self,
        what: str,
        command: Sequence[str],
        env: dict[str, str] | None = None,
        statuses: Sequence[int] = (0,),
    ) -> None:
        """Runs a client; it ends with this task at the latest."""
        log = self.folder / f"{self.name}.client.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(env or {})},
                start_new_session=True,  # an interrupt at the terminal is for this process to handle
            )
        try:
            status = await process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if status not in statuses:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise RuntimeError(f"{what} ended with status {status}. The end of {log}:\n{tail}")

    async def _agents(self, outcome: Outcome) -> None:
        """Agents have state, so a client of our own sends their turns."""
        traffic = self.scenario.traffic
        book = await self._endpoint.book()
        gate = asyncio.Semaphore(traffic.concurrency or traffic.agents)
        start = time.perf_counter()

        async def agent(number: int) -> list[Sample]:
            async with gate:
                return await self._agent(number, book, start)

        answered = await asyncio.gather(*map(agent, range(traffic.agents)))
        outcome.samples = [sample for turns in answered for sample in turns]
        outcome.seconds = time.perf_counter() - start

    async def _agent(self, number: int, book: list[int], start: float) -> list[Sample]:
        """One agent's turns; after a failed one the others fail too, since they would need its answer."""
        traffic, rng = self.scenario.traffic, random.Random(f"{self.seed} {number}")

        def text(span: tuple[int, int]) -> list[int]:
            length, at = rng.randint(*span), rng.randrange(len(book))
            return [book[(at + n) % len(book)] for n in range(length)]

        context, turns = text(traffic.first_tokens), []
        for turn in range(traffic.turns):
            tokens = rng.randint(*traffic.output_tokens)
            if turns and turns[-1].error:
                turns.append(Sample(0.0, 0, 0, error="not sent: an earlier turn failed"))
                continue
            if turn:
                await asyncio.sleep(rng.uniform(*traffic.pause_s))
            body = {
                "prompt": context,
                "max_tokens": tokens,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
                **GREEDY,
            }
            sent = time.perf_counter() - start
            answer = await self._endpoint.send(Request("agent", COMPLETIONS, body), number)
            turns.append(
                Sample(
                    sent,
                    len(context),
                    tokens,
                    answer.ttft or 0.0,
                    answer.gaps,
                    answer.error,
                )
            )
            if not answer.error:
                context = context + answer.choices[0].tokens + text(traffic.result_tokens)
        return turns


def samples(result: dict[str, Any], outputs: Sequence[int]) -> list[Sample]:
    """The requests in a detailed result of `vllm bench serve`.

    Args:
        outputs: tokens that each request asked for.
    """
    first = min(result["start_times"])
    columns = (
        result[name]
        for name in ("start_times", "input_lens", "output_lens", "ttfts", "itls", "errors")
    )
    found = []
    for start, prompt, output, ttft, gaps, error, wanted in zip(*columns, outputs, strict=True):
        problem = error.strip().rpartition("\n")[2] or None
        if problem is None and output != wanted:
            problem = f"{output} of {wanted} tokens"
        found.append(Sample(start - first, prompt, output, ttft, gaps, problem))
    return found
