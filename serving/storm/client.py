"""The client of a storm: sends a request and checks its outcome."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from vllm_adamas.errors import AdamasError
from vllm_adamas.serving.storm.traffic import CHAT, Request

LINE_BYTES = 2**24  #: most bytes of an event: a stream's first event repeats the prompt's token ids


def aiohttp():
    """The module, imported late because only a storm needs it.

    Raises:
        AdamasError: it is not installed.
    """
    try:
        import aiohttp
    except ModuleNotFoundError:
        raise AdamasError(
            "a storm needs aiohttp, which is not installed: install it, or use the environment of a vLLM."
        ) from None
    return aiohttp


@dataclass
class Choice:
    """One of a request's n answers; logprobs are empty unless the request asked for them."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish: str | None = None


@dataclass
class Outcome:
    """The outcome of a request.

    Args:
        status: HTTP status, None without an answer.
        error: the error, such as ``HTTP 500``, ``timeout`` or ``answer: ...``; None if there was none.
        prompt: the prompt's token ids, as the server returned them.
        ttft, gaps: seconds to the first token, and between the events of a stream.
    """

    request: Request
    unit: int
    status: int | None = None
    error: str | None = None
    prompt: list[int] = field(default_factory=list)
    choices: dict[int, Choice] = field(default_factory=dict)
    ttft: float | None = None
    gaps: list[float] = field(default_factory=list)

    def read(self, event: Mapping[str, Any]) -> int:
        """Adds an event of a stream, or a whole answer; returns the number of tokens in it.

        Raises:
            ValueError: the event reports an error.
        """
        if "error" in event:
            raise ValueError(f"the stream ended with an error: {str(event['error'])[:200]}")
        if event.get("prompt_token_ids"):
            self.prompt = event["prompt_token_ids"]
        count = 0
        for part in event["choices"]:
            if part.get("prompt_token_ids"):
                self.prompt = part["prompt_token_ids"]
            choice = self.choices.setdefault(part["index"], Choice())
            message = part.get("delta") or part.get("message") or {}
            choice.text += part.get("text") or message.get("content") or ""
            choice.tokens += part.get("token_ids") or []
            count += len(part.get("token_ids") or [])
            found = part.get("logprobs") or {}
            choice.logprobs += found.get("token_logprobs") or []
            choice.logprobs += [step["logprob"] for step in found.get("content") or []]
            choice.finish = part.get("finish_reason") or choice.finish
        return count

    def fault(self) -> str | None:
        """What is wrong with a complete answer, independent of the model; None if nothing."""
        body = self.request.body
        if len(self.choices) != body.get("n", 1):
            return f"{len(self.choices)} choices"
        if self.request.path != CHAT and self.prompt != body["prompt"]:
            return "another prompt was answered"
        for choice in self.choices.values():
            if choice.finish not in ("stop", "length"):
                return f"finish_reason {choice.finish}"
            full = len(choice.tokens) == body["max_tokens"]
            if len(choice.tokens) > body["max_tokens"] or (choice.finish == "length" and not full):
                return f"{len(choice.tokens)} of {body['max_tokens']} tokens, {choice.finish}"
            if body.get("ignore_eos") and not full:
                return f"it stopped after {len(choice.tokens)} of {body['max_tokens']} tokens"
            if "logprobs" in body and len(choice.logprobs) != len(choice.tokens):
                return f"{len(choice.logprobs)} log probabilities of {len(choice.tokens)} tokens"
            if not all(math.isfinite(x) and x < 1e-3 for x in choice.logprobs):
                return "a log probability is none"
            if choice.finish == "stop" and not _matches(self.request.guide, choice.text):
                return f"{choice.text[:80]!r} is not what structured output asked for"
        return None


def _matches(guide: tuple[str, Any] | None, text: str) -> bool:
    if guide is None:
        return True
    name, value = guide
    if name == "choice":
        return text in value
    if name == "regex":
        return re.fullmatch(value, text) is not None
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return set(found) == set(value["required"])


class Endpoint:
    """A client's connection to a server, an asynchronous context manager.

    Args:
        url: URL of the server, without a path.
        timeout: seconds for one request.
    """

    def __init__(self, url: str, timeout: float):
        self.url, self.timeout, self.model = url.rstrip("/"), timeout, ""
        self.max_model_len = 0
        self._aiohttp = aiohttp()

    async def __aenter__(self) -> Endpoint:
        # One connection per request: a server may close an idle connection just as it is reused.
        no_limit = self._aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = self._aiohttp.ClientSession(
            connector=no_limit,
            timeout=self._aiohttp.ClientTimeout(total=None),
            read_bufsize=LINE_BYTES,
        )
        try:
            card = (await self.json("/v1/models"))["data"][0]
            self.model, self.max_model_len = card["id"], card["max_model_len"]
        except Exception as error:
            await self._session.close()
            raise AdamasError(
                f"{self.url} does not answer as an OpenAI-compatible vLLM server ({name_of(error)}): "
                "start it first, and give its URL without a path."
            ) from None
        return self

    async def __aexit__(self, *_) -> None:
        await self._session.close()

    async def get(self, path: str, timeout: float = 60.0) -> tuple[int, str]:
        """Status and body of a GET."""

        async def call():
            async with self._session.get(self.url + path) as response:
                return response.status, await response.text()

        return await asyncio.wait_for(call(), timeout)

    async def json(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The decoded answer to a GET, or to a POST of a body; raises what aiohttp raises."""

        async def call():
            method, data = (
                ("GET", None) if body is None else ("POST", {"model": self.model, **body})
            )
            async with self._session.request(method, self.url + path, json=data) as response:
                response.raise_for_status()
                return await response.json()

        return await asyncio.wait_for(call(), self.timeout)

    async def book(self) -> list[int]:
        """The packaged book as token ids of the server's model, for prompts to be cut from.

        Raises:
            AdamasError: the server has no ``/tokenize``.
        """
        text = files("vllm_adamas.evaluate").joinpath("data", "alice.txt").read_text("utf-8")
        try:
            return (await self.json("/tokenize", {"prompt": text}))["tokens"]
        except Exception as error:
            raise AdamasError(
                f"{self.url}/tokenize does not answer ({name_of(error)}): give the URL of a vLLM server."
            ) from None

    async def send(self, request: Request, unit: int, history: list | None = None) -> Outcome:
        """Sends a request of a storm; errors of the server are in the outcome and never raised."""
        outcome = Outcome(request, unit)
        wait = self.timeout if request.drop_after is None else request.drop_after
        try:
            await asyncio.wait_for(self._send(outcome, history or []), wait)
        except asyncio.TimeoutError:
            if request.drop_after is None:
                outcome.error = f"timeout: {wait:g} s"
        except (ValueError, KeyError, TypeError) as error:
            outcome.error = f"answer: {name_of(error)}"
        except (self._aiohttp.ClientError, OSError) as error:
            outcome.error = f"transport: {name_of(error)}"
        return outcome

    async def _send(self, outcome: Outcome, history: list) -> None:
        request, start = outcome.request, time.perf_counter()
        data = request.body
        if not isinstance(data, bytes):
            data = {"model": self.model, **data}
            if "messages" in data:
                data["messages"] = [*history, *data["messages"]]
            data = json.dumps(data).encode()
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self.url + request.path, data=data, headers=headers) as reply:
            outcome.status = reply.status
            if request.refused or reply.status != 200:
                text = await reply.text()
                if not (request.refused and 400 <= reply.status < 500):
                    outcome.error = f"HTTP {reply.status}: {text[:200]}"
                return
            if not request.body.get("stream"):
                outcome.read(await reply.json())
            elif await self._stream(outcome, reply, start):
                reply.close()
                return
        if fault := outcome.fault():
            outcome.error = f"answer: {fault}"

    async def _stream(self, outcome: Outcome, reply, start: float) -> bool:
        """Reads the events of a stream; True if the client left before the end."""
        last, count, leave = start, 0, outcome.request.leave_after
        async for line in reply.content:
            data = line.decode().strip().removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            new = outcome.read(json.loads(data))
            if not new:
                continue
            now = time.perf_counter()
            if outcome.ttft is None:
                outcome.ttft = now - start
            else:
                outcome.gaps.append(now - last)
            last, count = now, count + new
            if leave is not None and count >= leave:
                return True
        return False


def name_of(error: BaseException) -> str:
    """The exception's type and message."""
    return ": ".join(filter(None, (type(error).__name__, str(error)[:200])))
