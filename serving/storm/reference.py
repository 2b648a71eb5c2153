"""Checks greedy answers against a reference server.

**The rule.** A token of a greedy answer is right if, given the prompt and the answer's preceding tokens,

- the reference's log probability of it is at most ``distance`` nats below that of its best token, and
- the log probability that the server returned, if the request asked for one, is at most ``distance`` nats
  from the reference's.

Two runs may diverge where rounding decides between two tokens. The rest of the answer is compared all the
same, because the reference continues from the answer's own tokens.

*Scored* (:func:`score`): the reference is another server with dense attention. Prompt and answer are sent
to it as one prompt. This is for answers that were decoded densely.

*Replayed* (:func:`replay`): the reference is the same server, idle, with nothing cached. It decodes the
prompt again. A preempted request recomputes its tokens as a prompt, and prompts are dense. If a token is not
right, the run is therefore repeated for every earlier position, with the tokens before that position as part
of the prompt. A token that is right in one of these runs is right, and the check continues with that run.
"""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass, field

from vllm_adamas.serving.storm.client import Endpoint, Outcome, name_of
from vllm_adamas.serving.storm.traffic import COMPLETIONS, GREEDY

BEST = 20  #: log probabilities per step, the most that a server returns by default

Step = dict[int, float]  #: log probabilities of a position's best tokens


@dataclass
class Wrong:
    """A wrong token; ``distance`` is None if the reference did not list the token."""

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
    """The result for one or more answers.

    Args:
        tokens, compared: tokens of the answers, and those compared with the reference.
        distances: distances of the compared tokens in nats, where known.
        parted: compared tokens that are right but not the reference's best.
        failed: errors of the reference.
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
        """Distance of the token in nats; infinite if the step does not list it."""
        known = step.get(self.tokens[position])
        if known is None:
            return math.inf
        off = abs(self.logprobs[position] - known) if self.logprobs else 0.0
        return max(off, max(step.values()) - known)

    def right(self, position: int, step: Step) -> bool:
        return self.distance(position, step) <= self.limit

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
    """Applies the rule to one answer with a single prompt to another server."""
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
    """Applies the rule to one answer with the same server; stops at a wrong token."""
    verdict = Verdict()
    judge = _Judge(outcome, distance, verdict)
    try:
        await _replay(server, judge)
    except Exception as error:
        verdict.failed.append(name_of(error))
    return verdict


async def _replay(server: Endpoint, judge: _Judge) -> None:
    async def run(first: int) -> list[Step]:
        """Steps from ``first`` until the run diverges from the answer; earlier tokens are prompt."""
        prompt = judge.outcome.prompt + judge.tokens[:first]
        body = {"prompt": prompt, "max_tokens": len(judge.tokens) - first, "logprobs": BEST}
        # A unique salt finds nothing in the prefix cache.
        choice = await _answer(server, body | {"cache_salt": uuid.uuid4().hex})
        pairs = list(zip(choice["token_ids"], judge.tokens[first:], strict=True))
        same = next((i for i, (theirs, ours) in enumerate(pairs) if theirs != ours), len(pairs))
        return _steps(choice)[: same + 1]

    first, steps, done = 0, await run(0), 0
    while done < len(judge.tokens):
        if done - first == len(steps):  # the reference diverged: start it again from here
            first, steps = done, await run(done)
        nearest = steps[done - first]
        if not judge.right(done, nearest):
            for start in range(done, first, -1):
                found = await run(start)
                if done - start < len(found) and judge.right(done, found[done - start]):
                    first, steps, nearest = start, found, found[done - start]
                    break
            else:
                judge.judge(done, nearest)
                return
        judge.judge(done, nearest)
        done += 1


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
