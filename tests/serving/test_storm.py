"""The traffic generator: what it sends, how it judges, and that it finds what is wrong with a server."""

import asyncio
import itertools
import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import web
from common import MODEL, ROOT, is_one_sentence, random_llama
from extension import with_path

from vllm_adamas import __version__
from vllm_adamas.cli import main
from vllm_adamas.serving.storm import command
from vllm_adamas.serving.storm.client import Choice, Outcome
from vllm_adamas.serving.storm.reference import Verdict, replay, score
from vllm_adamas.serving.storm.report import Report
from vllm_adamas.serving.storm.traffic import COMPLETIONS, WEIGHTS, Request, Traffic

TEXT = list(range(100, 900))
MAX_MODEL_LEN = 512


def traffic(seed: int = 0, **limits) -> Traffic:
    return Traffic(seed, TEXT, MAX_MODEL_LEN, **limits)


# What is sent


def test_a_seed_gives_the_same_traffic_again() -> None:
    first, again, other = ([one.unit() for _ in range(200)] for one in map(traffic, (7, 7, 8)))
    assert first == again
    assert first != other


def test_every_kind_is_sent_and_fits() -> None:
    """Except for what must be refused, a prompt and its output are within the longest context."""
    source, kinds = traffic(max_prompt=2000), set()
    for _ in range(1500):
        unit = source.unit()
        kinds.add(unit.kind)
        for request in [request for requests in unit.rounds for request in requests]:
            if request.kind == "too_long":
                assert len(request.body["prompt"]) == MAX_MODEL_LEN + 1
            elif not request.refused and request.path == COMPLETIONS:
                prompt = request.body["prompt"]
                assert 0 < len(prompt) <= MAX_MODEL_LEN - request.body["max_tokens"]
                assert (
                    unit.kind != "longest"
                    or len(prompt) == MAX_MODEL_LEN - request.body["max_tokens"]
                )
    assert kinds == set(WEIGHTS)


@pytest.mark.parametrize("block", [16, 64])
def test_edges_are_of_every_residue_and_resent(block: int) -> None:
    source, found = traffic(block_size=block, kinds=["edge"]), Counter()
    for _ in range(4000):
        prompts = [request.body["prompt"] for (request,) in source.unit().rounds]
        assert len(prompts) > 1
        assert all(prompt == prompts[0] for prompt in prompts)
        found[len(prompts[0]) % block] += 1
    assert set(found) == set(range(block))
    often = {residue for residue, _ in found.most_common(4)}
    assert often == {0, 1, 2, block - 1}


# How it is judged


class Model:
    """A reference whose steps are a function of the context, as an endpoint."""

    def __init__(self, step, failing: bool = False):
        self.step, self.failing = step, failing
        self.prompts: list[list[int]] = []

    async def json(self, path: str, body: dict) -> dict:
        if self.failing:
            raise OSError("nobody answers")
        context = list(body["prompt"])
        self.prompts.append(list(context))
        choice = {"token_ids": [], "logprobs": {"top_logprobs": []}, "prompt_logprobs": [None]}
        for end in range(1, len(context)):
            found = self.step(context[:end], False)
            choice["prompt_logprobs"].append({str(t): {"logprob": x} for t, x in found.items()})
        for i in range(body["max_tokens"]):
            found = self.step(context, i > 0)
            choice["logprobs"]["top_logprobs"].append(
                {f"token_id:{t}": x for t, x in found.items()}
            )
            context.append(max(found, key=found.get))
            choice["token_ids"].append(context[-1])
        return {"choices": [choice]}


def steps(context: list[int], decoded: bool) -> dict[int, float]:
    """The next token is one more than the last; two more is 0.1 behind, three more 1.0."""
    last = context[-1]
    return {last + 1: -1.0, last + 2: -1.1, last + 3: -2.0}


def judged(
    how, tokens: list[int], logprobs=(), model: Model | None = None
) -> tuple[Verdict, Model]:
    model = model or Model(steps)
    outcome = Outcome(Request("edge", COMPLETIONS, {}, greedy=True), 3, prompt=[1, 2])
    outcome.choices[0] = Choice(list(tokens), list(logprobs))
    return asyncio.run(how(model, outcome, 0.2)), model


def summary(verdict: Verdict) -> tuple[int, int, int]:
    return verdict.compared, verdict.parted, len(verdict.wrong)


@pytest.mark.parametrize("how", [score, replay])
@pytest.mark.parametrize(
    ("tokens", "logprobs", "compared", "parted", "wrong"),
    [
        ([3, 4, 5, 6], (), 4, 0, 0),
        ([3, 4, 5, 6], (-1.0, -1.1, -0.9, -1.0), 4, 0, 0),
        ([3, 5, 6, 8], (-1.0, -1.1, -1.0, -1.1), 4, 2, 0),  # two tokens that are 0.1 behind
        ([3, 6], (), 2, 0, 1),  # a token that is 1.0 behind
        ([3, 90], (), 2, 0, 1),  # one that the reference does not name
        ([3, 4], (-1.0, -1.5), 2, 0, 1),  # the best, but with another log probability
    ],
)
def test_the_rule(how, tokens, logprobs, compared: int, parted: int, wrong: int) -> None:
    verdict, _ = judged(how, tokens, logprobs)
    assert summary(verdict) == (compared, parted, wrong)
    assert verdict.tokens == len(tokens)
    for found in verdict.wrong:
        assert (found.unit, found.prompt_tokens, found.position) == (3, 2, 1)


def test_scoring_takes_one_request_and_a_replay_one_for_each_parting() -> None:
    assert len(judged(score, [3, 5, 6, 8])[1].prompts) == 1
    _, model = judged(replay, [3, 5, 6, 8])
    assert model.prompts == [[1, 2], [1, 2, 3, 5]]


def test_what_a_preempted_request_computes_is_right() -> None:
    """Its tokens become part of the prompt: then the same position has other log probabilities."""

    def step(context: list[int], decoded: bool) -> dict[int, float]:
        shift = 5 if len(context) == 4 and not decoded else 0
        return {context[-1] + shift + 1: -1.0, context[-1] + 90: -3.0}

    verdict, model = judged(replay, [3, 4, 10, 11], model=Model(step))
    assert summary(verdict) == (4, 0, 0)
    assert model.prompts == [[1, 2], [1, 2, 3, 4]]
    assert summary(judged(replay, [3, 4, 12, 13], model=Model(step))[0]) == (3, 0, 1)


def test_a_preemption_may_show_later() -> None:
    """The request was preempted at its second token, and the log probabilities part at its fourth."""

    class Preempted(Model):
        async def json(self, path: str, body: dict) -> dict:
            start = len(body["prompt"])
            self.step = lambda context, decoded: {
                context[-1] + (9 if start == 3 and len(context) == 5 else 1): -1.0
            }
            return await super().json(path, body)

    verdict, model = judged(replay, [3, 4, 5, 14, 15], model=Preempted(None))
    assert summary(verdict) == (5, 0, 0)
    assert [len(prompt) for prompt in model.prompts] == [2, 5, 4, 3]


@pytest.mark.parametrize("how", [score, replay])
def test_a_reference_that_does_not_answer_is_a_failure(how) -> None:
    verdict, _ = judged(how, [3, 4], model=Model(steps, failing=True))
    assert (verdict.compared, verdict.tokens) == (0, 2)
    assert "nobody answers" in verdict.failed[0]


# What the report makes of it


def report(**found) -> Report:
    made = Report({"seed": 0}, growth=100.0)
    for name, value in found.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"restarts": 1}, "restarted"),
        ({"unhealthy": ["/health 503"]}, "503"),
        ({"checks": {"replayed": Verdict(tokens=10, compared=6)}}, "only 6 of 10"),
        ({"checks": {"replayed": Verdict()}}, "only 0 of 0"),
        ({"memory": {"warm": {"rss": 500.0}, "end": {"rss": 601.0}}}, "rss grew by 101 MiB"),
        ({"memory": {"warm": {"gpu": 500.0}, "end": {"gpu": 601.0}}}, "gpu grew"),
        (
            {
                "checks": {"scored": Verdict(tokens=1, compared=1)},
                "moved": {"vllm:adamas_sparse_rows_total": 5.0},
            },
            "token_budget",
        ),
    ],
)
def test_each_problem_is_named(found: dict, named: str) -> None:
    (problem,) = report(**found).problems()
    assert named in problem
    assert f"PROBLEM: {problem}" in report(**found).text()
    assert report(**found).record()["ok"] is False


def test_nothing_is_a_problem_without_cause() -> None:
    fine = report(
        checks={"replayed": Verdict(tokens=10, compared=7, distances=[0.1])},
        memory={"warm": {"rss": 500.0}, "end": {"rss": 599.0}},
        moved={"vllm:adamas_sparse_rows_total": 5.0},
    )
    assert fine.problems() == []
    assert json.loads(json.dumps(fine.record(), allow_nan=False))["ok"] is True


def test_the_text_has_the_numbers_in_tables() -> None:
    text = report(
        checks={"replayed": Verdict(tokens=10, compared=7, parted=2, distances=[0.1, 0.3])},
        ttft=[0.5, 1.5],
        memory={"warm": {"rss": 500.0, "gpu": 70.0}, "end": {"rss": 599.0}},
    ).text()
    lines = [line.split() for line in text.splitlines()]
    assert ["replayed", "10", "7", "2", "0", "0.1", "0.3", "0.3"] in lines
    assert ["TTFT", "500", "1500", "1500"] in lines
    assert ["ITL"] in lines
    assert ["warm", "70", "500"] in lines
    assert ["end", "599"] in lines


# A whole storm, against a server that is not a model


def following(context: list[int]) -> int:
    """The token that a sound server gives."""
    return (context[-1] * 7 + 13 * len(context)) % 700


@dataclass
class Fake:
    """Answers as vLLM does. What is wrong with it is one of: ``500``, ``tokens``, ``restart``, ``hang``,
    ``503``, ``prompt``, ``short``, ``leak``, ``stream``, ``closed``; each from its 30th completion on."""

    wrong: str = ""
    completions: int = 0

    @property
    def now(self) -> str:
        return self.wrong if self.completions > 30 else ""

    async def models(self, request):
        return web.json_response({"data": [{"id": "fake", "max_model_len": MAX_MODEL_LEN}]})

    async def version(self, request):
        return web.json_response({"version": "0"})

    async def health(self, request):
        return web.Response(status=503 if self.now == "503" else 200)

    async def tokenize(self, request):
        return web.json_response({"tokens": TEXT})

    async def metrics(self, request):
        lines = [f"process_start_time_seconds {2 if self.now == 'restart' else 1}"]
        lines.append(f'vllm:num_requests_running{{engine="0"}} {int(self.now == "leak")}')
        return web.Response(text="\n".join(lines))

    async def complete(self, request):
        self.completions += 1
        body = await request.json()
        if self.now == "500":
            return web.Response(status=500, text="EngineDeadError")
        if self.now == "hang":
            await asyncio.sleep(600)
        if self.now == "closed":
            request.transport.close()
        chat = "messages" in body
        prompt = [len(json.dumps(body["messages"])) % 700] if chat else body["prompt"]
        if len(prompt) > MAX_MODEL_LEN:
            return web.json_response({"error": "too long"}, status=400)
        choices = [self.choice(i, prompt, body, chat) for i in range(body.get("n", 1))]
        if chat:
            for choice in choices:
                choice["message"] = {"content": choice.pop("text")}
        shown = prompt[1:] if self.now == "prompt" else prompt
        if not body.get("stream"):
            for choice in choices:
                choice["prompt_token_ids"] = shown
            return web.json_response({"choices": choices})
        stream = web.StreamResponse()
        await stream.prepare(request)
        for choice in choices:
            event = {"choices": [choice], "prompt_token_ids": shown}
            await stream.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            if self.now == "stream":
                await stream.write(b'data: {"error": "EngineDeadError"}\n\n')
        await stream.write(b"data: [DONE]\n\n")
        return stream

    def choice(self, index: int, prompt: list[int], body: dict, chat: bool) -> dict:
        context, tops = list(prompt), []
        replayed = "cache_salt" in body
        for _ in range(body["max_tokens"] - (self.now == "short")):
            token = following(context)
            if self.now == "tokens" and not replayed and len(context) % 5 == 0:
                token += 1
            context.append(token)
            tops.append({f"token_id:{token}": -0.5, f"token_id:{token + 2}": -2.0})
        tokens = context[len(prompt) :]
        values = [-0.5] * len(tokens)
        logprobs = {"token_logprobs": values, "top_logprobs": tops}
        if chat:
            logprobs = {"content": [{"logprob": value} for value in values]}
        return {
            "index": index,
            "text": "x",
            "token_ids": tokens,
            "finish_reason": "length",
            "logprobs": logprobs if body.get("logprobs") is not None else None,
            "prompt_logprobs": [
                None,
                *(
                    {str(following(prompt[:end])): {"logprob": -0.5}}
                    for end in range(1, len(prompt))
                ),
            ],
        }


@contextmanager
def running(fake: Fake):
    """The URL of a fake server, which runs in a thread."""
    loop, ready, urls = asyncio.new_event_loop(), threading.Event(), []

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=2**24)
        app.add_routes(
            [
                web.get("/v1/models", fake.models),
                web.get("/version", fake.version),
                web.get("/health", fake.health),
                web.get("/metrics", fake.metrics),
                web.post("/tokenize", fake.tokenize),
                web.post("/v1/completions", fake.complete),
                web.post("/v1/chat/completions", fake.complete),
            ]
        )
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(30)
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


ORDINARY = (
    "edge,one_token,repeated,fork,chat,steady,sampled,several,cut,dropped,too_long,longest,burst"
)


def storm(tmp_path: Path, url: str, *args: str) -> tuple[int, dict]:
    """Exit status and record."""
    file = tmp_path / "storm.json"
    status = main(["storm", url, "--json", str(file), *args])
    return status, json.loads(file.read_text())


def test_a_server_without_fault_passes(tmp_path, capsys) -> None:
    with running(Fake()) as url:
        status, record = storm(tmp_path, url, "--requests", "300", "--kinds", ORDINARY)
    assert (status, record["problems"]) == (0, [])
    assert record["checks"]["replayed"]["compared"] == record["checks"]["replayed"]["tokens"] > 500
    assert sum(record["requests"].values()) >= 300
    assert (record["seed"], record["max_model_len"]) == (0, MAX_MODEL_LEN)
    versions = {"vllm-adamas": __version__, "vllm": "0"}
    assert record["environment"] == {"versions": versions}
    assert record["ttft_ms"]["p50"] > 0
    assert record["memory_not_watched"] == ["rss", "gpu"]  # no --pid
    assert "All is well." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("500", "HTTP 500"),
        ("tokens", "wrong tokens, replayed"),
        ("restart", "restarted"),
        ("hang", "timeout"),
        ("503", "/health 503"),
        ("prompt", "answer"),
        ("short", "answer"),
        ("stream", "answer"),
        ("closed", "transport"),
        ("leak", "1 requests are in the server"),
    ],
)
def test_what_is_wrong_with_a_server_is_found(
    tmp_path, monkeypatch, wrong: str, named: str
) -> None:
    monkeypatch.setattr(command, "PATIENCE", 1.0)
    args = ["--requests", "120", "--kinds", ORDINARY, "--limit", "120"]
    args += ["--timeout", "0.5" if wrong == "hang" else "60"]
    with running(Fake(wrong)) as url:
        status, record = storm(tmp_path, url, *args, "--check", "40")
    assert status == 1
    assert any(named in problem for problem in record["problems"]), record["problems"]


@pytest.mark.parametrize("wrong", ["", "tokens"])
def test_a_second_server_scores(tmp_path, wrong: str) -> None:
    args = ["--requests", "120", "--kinds", ORDINARY, "--check", "40"]
    with running(Fake(wrong)) as url, running(Fake()) as oracle:
        status, record = storm(tmp_path, url, *args, "--oracle", oracle)
    assert list(record["checks"]) == ["scored"]
    assert record["checks"]["scored"]["compared"] > 50
    assert (status, bool(record["checks"]["scored"]["wrong"])) == (bool(wrong), bool(wrong))


def test_a_storm_ends_at_its_limit(tmp_path) -> None:
    args = ["--requests", "1000", "--kinds", "one_token", "--timeout", "600", "--limit", "2"]
    with running(Fake("hang")) as url:
        status, record = storm(tmp_path, url, *args)
    assert status == 1
    assert any("not done after 2 s" in problem for problem in record["problems"])


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--seconds", "-1"], "--seconds -1"),
        (["--concurrency", "0"], "--concurrency 0"),
        (["--kinds", "edge,squall"], "squall"),
        (["--max-tokens", "512"], "max_model_len"),
        (["--pid", "4194305"], "--pid 4194305"),
        (["--oracle", "http://127.0.0.1:9"], "http://127.0.0.1:9 does not answer"),
    ],
)
def test_mistakes_give_one_sentence(capsys, args: list[str], named: str) -> None:
    with running(Fake()) as url:
        assert main(["storm", url, *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vllm-adamas: ")
    assert named in error
    assert is_one_sentence(error.removeprefix("vllm-adamas: ").rstrip("\n")), error


def test_a_server_that_is_not_there_gives_one_sentence(capsys) -> None:
    assert main(["storm", "http://127.0.0.1:9"]) == 2
    error = capsys.readouterr().err
    assert "http://127.0.0.1:9 does not answer" in error
    assert is_one_sentence(error.removeprefix("vllm-adamas: ").rstrip("\n")), error


@pytest.mark.parametrize("swap", [False, True])
def test_properties_of_benchmark_servers_meet_in_all_pairs(swap: bool) -> None:
    """A fault that takes two of them to show is met by one of the eight servers."""
    code = f"import json, storm; print(json.dumps(list(storm.gpu_configurations({swap}))))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    rows = [name.split(", ") for name in json.loads(done.stdout)]
    for one, other in itertools.combinations(range(len(rows[0])), 2):
        assert len({(row[one], row[other]) for row in rows}) == 4


# A whole storm against vLLM, and servers that are made wrong: see faults/adamas_fault.py

BENCHMARKS = ROOT / "benchmarks"
FAULTS = ROOT / "tests" / "faults"
BUDGET = 128
SERVER = (
    "--dtype float32 --enforce-eager --block-size 32 --max-num-seqs 16 --max-model-len 1024 "
    "--num-gpu-blocks-override 48"  # 1,536 tokens, so that bursts of prompts of 200 to 400 do not fit
)
STORM = "--block-size 32 --max-prompt 400 --max-tokens 24 --distance 0.01 --timeout 300"


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = random_llama(tmp_path_factory.mktemp("llama"))
    shutil.copy(MODEL / "chat_template.jinja", folder)
    return folder


@dataclass(frozen=True)
class Spec:
    """A server of the random Llama; ``fault`` names what is wrong with it."""

    model: Path
    fault: str = ""

    def arguments(self) -> tuple:
        env = {"ADAMAS_FAULT": self.fault, "PYTHONPATH": with_path(FAULTS)} if self.fault else {}
        return self.model, "adamas", {"token_budget": BUDGET}, SERVER.split(), env


@pytest.mark.serve
@pytest.mark.timeout(900)
def test_a_storm_over_sparse_decode_finds_nothing(serve, llama, tmp_path) -> None:
    """Few blocks: requests are preempted, and blocks are written again and again."""
    server = serve(Spec(llama))
    args = f"{STORM} --seed 6 --requests 300 --burst 16 --check 60 --growth 2048".split()
    status, record = storm(tmp_path, server.url, *args, "--pid", str(server.pid))
    assert (status, record["problems"]) == (0, []), server.log_tail()
    assert set(record["requests"]) == set(WEIGHTS)
    checked, counters = record["checks"]["replayed"], record["counters"]
    assert checked["compared"] == checked["tokens"] > 200
    assert counters["vllm:adamas_sparse_rows_total"] > 0
    assert counters["vllm:num_preemptions_total"] > 0
    assert counters["vllm:prefix_cache_hits_total"] > 0
    assert all(record["memory_mib"][when]["rss"] > 0 for when in ("warm", "end"))


@pytest.mark.serve
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "fault",
    [
        "stale_signature",
        *(
            pytest.param(fault, marks=pytest.mark.slow)
            for fault in ("neighbours_block", "missed_slot")
        ),
    ],
)
def test_a_storm_finds_a_fault(serve, llama, tmp_path, fault: str) -> None:
    """The server lives and answers; only its tokens are wrong."""
    server = serve(Spec(llama, fault))
    args = [*STORM.split(), "--requests", "120", "--check", "40"]
    status, record = storm(tmp_path, server.url, *args, "--kinds", "edge,steady,fork,burst")
    assert status == 1, server.log_tail()
    assert [problem.partition(" ")[2] for problem in record["problems"]] == [
        "wrong tokens, replayed"
    ], (record["problems"], server.log_tail())
