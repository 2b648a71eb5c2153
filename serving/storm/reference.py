"""Whether greedy answers are right, by what a reference server says.

**The rule.** A token of a greedy answer is right when, given the prompt and the answer's tokens before it,

- the reference's log probability of it is at most ``distance`` below that of the reference's best token, and
- the log probability that the server gave it, where the request asked for one, is at most ``distance``
  from the reference's.

Two runs may part where rounding decides between two tokens; what follows is then compared all the same,
because the reference is asked to go on from the answer's own tokens.

*Scored* (:func:`score`): the reference is another server that attends to everything. Prompt and answer are
sent to it as one prompt. For answers that were decoded densely.

*Replayed* (:func:`replay`): the reference is the same server, quiet, with nothing cached. It decodes the
prompt again. Where a token is not right, the prompt and the answer's tokens before it are sent once more as
one prompt: a request that was preempted computes its tokens so, and a token that is right by either is right.
"""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass, field

from vllm_adamas.serving.storm.client import Endpoint, Outcome, name_of
from vllm_adamas.serving.storm.traffic import COMPLETIONS, GREEDY

BEST = 20  #: of a step, as many as a server gives by default
WRONG_AT_MOST = 3  #: tokens of an answer; the rest of it is not compared

Step = dict[int, float]  #: log probabilities of a position's best tokens


@dataclass
class Wrong:
    """A token that is not right. ``distance`` is None if the reference did not name the token."""

    kind: str
    unit: int
    prompt_tokens: int
    position: int
    token: int
    best: int
    distance: float | None
    reported: float | None
    reference: float | None
    prompt: list[int] = field(repr=False)
    answer: list[int] = field(repr=False)


@dataclass
class Verdict:
    """Of one or of many answers.

    Args:
        tokens, compared: of the answers, and those that the reference has judged.
        distances: of the compared tokens, where known.
        parted: compared tokens that are right, but not the reference's best.
        failed: why a reference did not answer.
    """

    tokens: int = 0
    compared: int = 0
    parted: int = 0
    distances: list[float] = field(default_factory=list)
    wrong: list[Wrong] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, other: Verdict) -> None:
        for name in ("tokens", "compared", "parted", "distances", "wrong", "failed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class _Judge:
    """Applies the rule to the tokens of one answer."""

    outcome: Outcome
    limit: float
    verdict: Verdict

    def __post_init__(self) -> None:
        (choice,) = self.outcome.choices.values()
        self.tokens, self.logprobs = choice.tokens, choice.logprobs
        self.verdict.tokens += len(self.tokens)

    def distance(self, position: int, step: Step) -> float:
        """How far the token is from right; infinite if the step does not name it."""
        known = step.get(self.tokens[position])
        if known is None:
            return math.inf
        off = abs(self.logprobs[position] - known) if self.logprobs else 0.0
        return max(off, max(step.values()) - known)

    def judge(self, position: int, step: Step) -> None:
        token, distance = self.tokens[position], self.distance(position, step)
        best = max(step, key=step.get)
        self.verdict.compared += 1
        if math.isfinite(distance):
            self.verdict.distances.append(distance)
        if distance <= self.limit:
            self.verdict.parted += token != best
            return
        self.verdict.wrong.append(
            Wrong(
                kind=self.outcome.request.kind,
                unit=self.outcome.unit,
                prompt_tokens=len(self.outcome.prompt),
                position=position,
                token=token,
                best=best,
                distance=distance if math.isfinite(distance) else None,
                reported=self.logprobs[position] if self.logprobs else None,
                reference=step.get(token),
                prompt=self.outcome.prompt,
                answer=self.tokens,
            )
        )


async def score(oracle: Endpoint, outcome: Outcome, distance: float) -> Verdict:
    """The rule for one answer, by one prompt of another server."""
    verdict = Verdict()
    judge = _Judge(outcome, distance, verdict)
    prompt = outcome.prompt + judge.tokens[:-1]
    body = {"prompt": prompt, "max_tokens": 1, "logprobs": BEST, "prompt_logprobs": 1}
    try:
        choice = await _answer(oracle, body)
        steps = [
            {int(token): entry["logprob"] for token, entry in position.items()}
            for position in choice["prompt_logprobs"][len(outcome.prompt) :]
        ]
    except Exception as error:
        verdict.failed.append(name_of(error))
        return verdict
    for position, step in enumerate([*steps, *_steps(choice)]):
        judge.judge(position, step)
    return verdict


async def replay(server: Endpoint, outcome: Outcome, distance: float) -> Verdict:
    """The rule for one answer, by the same server."""
    verdict = Verdict()
    judge = _Judge(outcome, distance, verdict)
    start = 0  # the tokens before it are part of the prompt
    while start < len(judge.tokens) and len(verdict.wrong) < WRONG_AT_MOST:
        prompt = outcome.prompt + judge.tokens[:start]
        body = {"prompt": prompt, "max_tokens": len(judge.tokens) - start, "logprobs": BEST}
        body["cache_salt"] = uuid.uuid4().hex  # nothing is found in the prefix cache
        try:
            choice = await _answer(server, body)
            steps = _steps(choice)
        except Exception as error:
            verdict.failed.append(name_of(error))
            break
        if len(steps) != body["max_tokens"]:
            verdict.failed.append(f"{len(steps)} of {body['max_tokens']} tokens")
            break
        for position, (step, taken) in enumerate(
            zip(steps, choice["token_ids"], strict=True), start
        ):
            right = judge.distance(position, step) <= distance
            if not right and position > start:
                start = position  # once more, as a prompt
                break
            judge.judge(position, step)
            start = position + 1
            if judge.tokens[position] != taken:
                break
    return verdict


async def _answer(server: Endpoint, body: dict) -> dict:
    fixed = {
        "ignore_eos": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        **GREEDY,
    }
    return (await server.json(COMPLETIONS, fixed | body))["choices"][0]


def _steps(choice: dict) -> list[Step]:
    return [
        {int(token.removeprefix("token_id:")): value for token, value in step.items()}
        for step in choice["logprobs"]["top_logprobs"]
    ]
