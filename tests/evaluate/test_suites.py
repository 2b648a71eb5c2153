"""Suites: what is asked, what is kept, what is asked again, mistakes at the command line, and the real engines."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from common import MODEL, ROOT, is_one_sentence, refused

from vllm_adamas import page, worker
from vllm_adamas.cli import main
from vllm_adamas.errors import AdamasError
from vllm_adamas.evaluate import longbench, suites, texts
from vllm_adamas.evaluate.process import EngineProcess
from vllm_adamas.evaluate.ruler import TASKS
from vllm_adamas.evaluate.samples import Sample
from vllm_adamas.evaluate.study import Arm
from vllm_adamas.evaluate.suites import Ledger, Run, Suite, read

SETTINGS = {"suite": "ruler", "model": "m", "seed": 0, "dtype": "auto", "texts": {"a.txt": "00"}}
ARMS = [Arm.of("default", budget) for budget in (64, 128)]
COUNT, BATCH = 5, 2


class Killed(BaseException):
    pass


class FakeEngine:
    """Answers a prompt by its last token; counts the prompts, and stops at one of them."""

    asked: list[tuple]
    last: int | None
    capacity = 1000

    def __init__(self, model, max_model_len, arms, *, stock, **engine_options):
        self.stock = stock

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def answers(self, arm, prompts, tokens, stops):
        assert (arm is None) == self.stock
        for prompt in prompts:
            if len(self.asked) == self.last:
                raise Killed
            self.asked.append((arm.name if arm else "dense", *prompt))
        return [[prompt[-1]] * tokens for prompt in prompts]


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(suites, "EngineProcess", FakeEngine)
    FakeEngine.asked, FakeEngine.last = [], None
    return FakeEngine


TOKENIZER = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))


def made(task: str, length: int, count: int) -> list[Sample]:
    return [
        Sample([length, len(task), number], 2, lambda answer, n=number: float(f"{n} {n}" == answer))
        for number in range(count)
    ]


def run(path: Path, count: int = COUNT, arms=ARMS, tasks=("a", "bc"), samples=made, **settings):
    ledger = Ledger(path, SETTINGS | settings)
    suite = Suite("ruler", tasks, samples, {})
    Run(suite, "m", TOKENIZER, arms, (100, 200), count, BATCH, {}).into(ledger)
    return ledger


def test_every_sample_is_answered_once_in_every_configuration(engine, tmp_path: Path) -> None:
    run(tmp_path / "r.jsonl")
    head, arms, answers = read(tmp_path / "r.jsonl")
    assert head["settings"] == SETTINGS
    assert {name: arm["budget"] for name, arm in arms.items()} == {
        "default-64": 64,
        "default-128": 128,
    }
    assert len(answers) == len(engine.asked) == 2 * 2 * COUNT * 3
    assert all(answer["score"] == 1 for answer in answers)
    assert len({suites.key_of(answer) for answer in answers}) == len(answers)
    dense = [name == "dense" for name, *_ in engine.asked]
    assert dense == sorted(dense, reverse=True), "the stock engine answers first"
    assert [name for name, *_ in engine.asked[20:28]] == ["default-64"] * 2 + [
        "default-128"
    ] * 2 + ["default-64"] * 2 + ["default-128"] * 2, (
        "prompts are asked again while they are in the prefix cache"
    )


@pytest.mark.parametrize("last", [0, 7, 20, 33, 59])
@pytest.mark.parametrize("torn", [b"", b'{"task": "a", "len'])
def test_a_killed_run_goes_on_where_it_stopped(
    engine, tmp_path: Path, last: int, torn: bytes
) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    run(whole)
    every, engine.asked, engine.last = engine.asked, [], last
    with pytest.raises(Killed):
        run(part)
    with part.open("ab") as file:
        file.write(torn)
    kept = len(read(part)[2])
    assert last - BATCH < kept <= last
    engine.asked, engine.last = [], None
    run(part)
    assert len(engine.asked) == len(every) - kept
    assert sorted(part.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    run(part)
    assert len(engine.asked) == len(every) - kept, "nothing is asked again"


def test_more_samples_tasks_and_budgets_add_to_a_run(engine, tmp_path: Path) -> None:
    run(tmp_path / "r.jsonl", 2, ARMS[:1], ("a",))
    engine.asked.clear()
    run(tmp_path / "r.jsonl", 3, ARMS, ("a", "bc"))
    assert len(engine.asked) == 2 * 2 * 3 * 3 - 2 * 2 * 2
    assert len(engine.asked) == len(set(engine.asked))


def test_a_batch_fits_the_cache(engine, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(engine, "capacity", 150)
    run(tmp_path / "r.jsonl", arms=ARMS, tasks=("a",))
    names = [name for name, *_ in engine.asked[10:]]
    assert names == ["default-64", "default-128"] * 10


def test_other_settings_are_refused(engine, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run(path, 1)
    refused(lambda: run(path, seed=1, texts={}), "r.jsonl", "seed, texts", "--output")
    other = [Arm("default-64", "default", 64, {"token_budget": 64, "score": "manhattan"})]
    refused(lambda: run(path, arms=other), "default-64", "dot", "--output")

    def changed(task, length, count):
        return made(task + "!", length, count)

    refused(lambda: run(path, 2, samples=changed), "other prompts", "a at 100")
    held = path.read_text()
    path.write_text(held.replace('"version": 1', '"version": 0'))
    refused(lambda: run(path), "r.jsonl", "no answers of a suite")
    path.write_text("")
    refused(lambda: run(path), "r.jsonl", "no answers of a suite")
    head, rest = held.split("\n", 1)
    moved = json.loads(head)
    moved["environment"]["versions"]["torch"] = "0"
    path.write_text(json.dumps(moved) + "\n" + rest)
    refused(lambda: run(path), "r.jsonl", "torch")


def test_two_runs_do_not_write_to_one_file(engine, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with Ledger(path, SETTINGS).writing():
        refused(lambda: run(path), "r.jsonl", "another run")


def test_what_is_impossible_is_refused_before_an_engine_starts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(suites, "EngineProcess", None)

    def impossible(task, length, count):
        raise AdamasError(f"{task} does not fit.")

    refused(lambda: run(tmp_path / "r.jsonl", samples=impossible), "does not fit")
    assert not list(tmp_path.iterdir())


class Words:
    """A tokenizer of one token per word that begins with BOS."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [int(word) + 10 for word in text.split()]
        return SimpleNamespace(input_ids=[1, *ids] if add_special_tokens else ids)


def test_agreement_continues_pieces_of_the_texts() -> None:
    sources = [texts.Text("a", " ".join(map(str, range(90)))), texts.Text("b", "1 2 3")]
    suite = suites.agreement(Words(), sources, 20, seed=0)
    few, many = (suite.samples("agreement", 50, count) for count in (3, 6))
    assert [sample.ids for sample in few] == [sample.ids for sample in many[:3]]
    assert len({sample.digest for sample in many}) > 3
    for sample in many:
        assert (sample.tokens, sample.stops, sample.score) == (20, False, None)
        assert sample.ids == [1, *range(sample.ids[1], sample.ids[1] + 29)]
    refused(lambda: suite.samples("agreement", 20, 1), "--steps 20", "20")
    refused(lambda: suite.samples("agreement", 200, 1), "179 tokens", "--lengths")


# LongBench


class FakeTask:
    """What is used of lm-eval's tasks."""

    config = SimpleNamespace(generation_kwargs={"max_gen_toks": 4, "until": ["99"]})

    def test_docs(self):
        docs = [{"text": " ".join(map(str, range(n, n + 30))), "answer": str(n)} for n in range(3)]

        class Docs(list):
            def select(self, numbers):
                return [self[n] for n in numbers]

        return Docs(docs)

    def doc_to_text(self, doc):
        return doc["text"]

    def process_results(self, doc, results):
        return {"score": doc["answer"] in results[0], "other": 7}


@pytest.fixture
def lm_eval(monkeypatch):
    class TaskManager:
        all_subtasks = ("longbench_qasper", "longbench_qasper_e", "longbench_gone", "mmlu")

        def load(self, name):
            if name == "longbench_gone":
                raise ConnectionError("no hub")
            return {"tasks": {name: FakeTask()}}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=TaskManager))


def test_longbench_asks_and_scores_as_lm_eval_does(lm_eval) -> None:
    suite = longbench.suite(Words(), ())
    assert suite.tasks == ("qasper", "gone")
    assert suite.size("qasper") == 3
    first, second, third = suite.samples("qasper", 100, 9)
    assert first.ids == [1, *range(10, 40)]
    assert (first.tokens, first.until) == (4, ("99",))
    assert [second.score("it is 1"), third.score("it is 1")] == [1, 0]
    (cut,) = suite.samples("qasper", 15, 1)
    assert cut.ids == [1, 10, 11, 12, 13, 34, 35, 36, 37, 38, 39], "the middle is left out"


def test_longbench_without_its_data_is_refused(lm_eval) -> None:
    suite = longbench.suite(Words(), ())
    refused(lambda: suite.samples("gone", 100, 1), "gone", "Xnhyacinth/LongBench")
    refused(lambda: suite.samples("qasper", 5, 1), "qasper", "--lengths")
    refused(lambda: longbench.suite(Words(), ("mmlu",)), "mmlu", "qasper")


def test_longbench_without_lm_eval_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    refused(lambda: longbench.suite(Words(), ()), "lm_eval", "pip install")


# mistakes at the command line


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ("--suite best", ("best", "ruler, longbench, agreement")),
        ("--suite ruler --tasks riddles", ("riddles", *TASKS)),
        ("--suite ruler --tasks qa_1", ("qa_1", "--squad FILE")),
        ("--suite ruler --squad /no/such.json", ("--squad", "/no/such.json")),
        ("--suite ruler --lengths many", ("--lengths many", "--lengths 64,256")),
        ("--suite ruler --lengths 0", ("--lengths 0", "above 0")),
        ("--suite ruler --lengths 512 --tasks vt", ("vt", "512", "--lengths")),
        ("--suite ruler --budgets many", ("--budgets many", "--budgets 64,256")),
        ("--suite ruler --budgets 0", ("0", "above 0")),
        ("--suite ruler --budgets 4096", ("4096", "covers every context")),
        ("--suite ruler --arms best", ("best", "default")),
        ("--suite ruler --bound 0", ("--bound 0", "at most 100")),
        ("--suite ruler --bound nan", ("--bound nan", "at most 100")),
        ("--suite ruler --prompts 0", ("--prompts 0", "above 0")),
        ("--suite ruler --steps 5", ("--steps", "the suite ruler")),
        ("--suite ruler --context 512", ("--context", "--lengths")),
        ("--suite ruler --quick", ("--quick", "--lengths")),
        ("--suite ruler --text /no/such.txt", ("/no/such.txt", "cannot be read")),
        ("--suite ruler --profile /no/such.json", ("/no/such.json", "cannot be read")),
        ("--suite agreement --squad x", ("--squad", "the suite agreement")),
        ("--suite agreement --tasks vt", ("vt", "agreement")),
        ("--suite agreement --steps 4096", ("--steps 4096", "4096")),
        ("--suite longbench --text x", ("--text", "the suite longbench")),
        ("--lengths 512", ("--lengths", "--suite")),
        ("--squad x", ("--squad", "--suite")),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_sentence(capsys, tmp_path, monkeypatch, args: str, named) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suites, "EngineProcess", None)
    assert main(["eval", str(MODEL), *args.split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    message = error.removeprefix("vllm-adamas: ")
    assert error != message
    assert is_one_sentence(message), message
    assert all(part in message for part in named), message
    assert not list(tmp_path.iterdir())


def test_a_report_of_something_else_is_refused_before_an_engine_starts(
    capsys, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(suites, "EngineProcess", None)
    (tmp_path / "report.json").write_text("[]")
    assert main(["eval", str(MODEL), "--suite", "ruler", "--output", str(tmp_path)]) == 2
    assert "report.json is not a report of this release" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(capsys, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["eval", str(tmp_path), "--suite", "ruler"]) == 2
    message = capsys.readouterr().err.splitlines()[-1].removeprefix("vllm-adamas: ")
    assert is_one_sentence(message)
    assert f"{tmp_path} has no tokenizer" in message


def test_an_interrupt_says_where_the_command_goes_on(
    engine, capsys, tmp_path: Path, monkeypatch
) -> None:
    asked = ["eval", str(MODEL), "--suite", "ruler", "--tasks", "niah_single_1", "--lengths"]
    asked += ["600", "--prompts", "3", "--budgets", "64", "--output", str(tmp_path)]
    monkeypatch.setattr(engine, "answers", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(asked) == 130
    path = tmp_path / "ruler.jsonl"
    assert capsys.readouterr().err.endswith(f"interrupted: the same command goes on from {path}\n")
    assert not page.held(tmp_path, MODEL.name), "there is no report of a part"
    monkeypatch.setattr(engine, "answers", lambda *given: [[7] * given[-2]] * len(given[2]))
    assert main(asked) == 0
    assert len(read(path)[2]) == 6
    assert list(page.held(tmp_path, MODEL.name)) == ["ruler: SmolLM2-135M-Instruct"]


# the process of an engine


@pytest.fixture
def started(tmp_path: Path, monkeypatch):
    """``started(script)``: an EngineProcess whose process runs a script of Python instead."""

    def start(script: str) -> EngineProcess:
        program = tmp_path / "program"
        program.write_text(f"#!{sys.executable}\nimport sys, time\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(worker, "sys", SimpleNamespace(executable=str(program)))
        return EngineProcess("m", 100, ARMS, stock=True, dtype="auto")

    return start


def test_a_process_is_asked_in_lines(started) -> None:
    script = """
asked = eval(input(), {"true": True})
assert asked["engine"] == {"model": "m", "max_model_len": 100, "dtype": "auto"}
assert [options["token_budget"] for options in asked["check"]] == [64, 128]
print('{"capacity": 7}', flush=True)
assert eval(input(), {"null": None, "true": True})["prompts"] == [[1, 2]]
print('{"tokens": [[3]]}', flush=True)
sys.exit(0 if sys.stdin.read() == "" else 1)
"""
    with started(script) as engine:
        assert engine.capacity == 7
        assert engine.answers(None, [(1, 2)], 4, True) == [[3]]
    assert engine._process.returncode == 0


def test_what_a_process_refuses_is_refused(started) -> None:
    refused(lambda: started("""print('{"problem": "no such thing."}')"""), "no such thing")


@pytest.mark.parametrize("script", ["sys.exit(3)", "input(); print('{'); sys.exit(3)"])
def test_a_process_that_ends_is_told_with_its_status(started, script: str) -> None:
    with pytest.raises(RuntimeError, match="status 3"):
        started(script)


def test_a_process_does_not_outlive_an_interrupt(started) -> None:
    engine = started("""print('{"capacity": 7}', flush=True); time.sleep(3600)""")
    with pytest.raises(KeyboardInterrupt), engine:
        raise KeyboardInterrupt
    assert engine._process.returncode == -signal.SIGKILL


# the real engines


def command(suite: str, output: Path, *others: str) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm_adamas.cli", "eval", str(MODEL), "--suite", suite),
        *("--output", str(output), "--budgets", "64,256", "--prompts", "2", *others),
        *("--max-num-seqs", "4", "--kv-cache-gib", "0.25"),
    ]


def test_a_suite_from_end_to_end(tmp_path: Path) -> None:
    """The least that has every part: one prompt, one budget, the two engines and the report."""
    asked = command("ruler", tmp_path, "--lengths", "512", "--tasks", "niah_single_1")
    asked += ["--budgets", "64", "--prompts", "1"]
    here = [sys.executable, str(ROOT / "tests" / "suite_here.py"), *asked[asked.index("eval") :]]
    done = subprocess.run(here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    _, arms, answers = read(tmp_path / "ruler.jsonl")
    assert list(arms) == ["default-64"]
    assert [answer["arm"] for answer in answers] == ["dense", "default-64"]
    assert answers[0]["prompt"] == answers[1]["prompt"]
    assert all(answer["answer"] for answer in answers)
    (record,) = page.held(tmp_path, MODEL.name).values()
    assert record.findings[0].startswith("No budget "), "one prompt shows nothing"
    assert record.findings[0] in done.stdout
    assert record.findings[0] in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_a_configuration_that_cannot_be_served_is_refused_before_any_answer(tmp_path: Path) -> None:
    wrong = ("--config", '{"layer_budgets": {"99": 64}}')
    asked = command("ruler", tmp_path, "--lengths", "640", "--tasks", "niah_single_1", *wrong)
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1].removeprefix("vllm-adamas: ")
    assert is_one_sentence(message), message
    assert "layer 99" in message
    assert not read(tmp_path / "ruler.jsonl")[2]


@pytest.mark.slow
def test_a_killed_command_goes_on_and_reports(tmp_path: Path) -> None:
    asked = command("ruler", tmp_path, "--lengths", "640,1024", "--tasks", "niah_single_1,fwe")
    path = tmp_path / "ruler.jsonl"
    first = subprocess.Popen(asked, stderr=subprocess.DEVNULL)
    try:
        while not (path.exists() and path.read_bytes().count(b'"sample"') >= 4):
            assert first.poll() is None, "the command ended before it was killed"
            time.sleep(0.1)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    kept = path.read_text()
    assert "default-256" not in kept, "it was killed too late"
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert path.read_text().startswith(kept[: kept.rindex("\n") + 1])
    _, arms, answers = read(path)
    assert list(arms) == ["default-64", "default-256"]
    assert len(answers) == len({suites.key_of(answer) for answer in answers}) == 2 * 2 * 2 * 3
    assert "left out: " not in done.stderr
    assert "mean of 2 tasks" in done.stdout
    assert "niah_single_1" in (tmp_path / "report.html").read_text()
    easy = [
        a["score"] for a in answers if a["task"] == "niah_single_1" and a["arm"] != "default-64"
    ]
    assert sum(easy) >= len(easy) - 1, "the model finds a number between repeated sentences"


@pytest.mark.slow
def test_agreement_with_the_whole_context_is_nearly_complete(tmp_path: Path) -> None:
    asked = command(
        "agreement", tmp_path, "--lengths", "640", "--steps", "16", "--dtype", "float32"
    )
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "report.json").read_text())["records"][0]["values"]
    assert found["whole context at 640"]["share"][0] == 1
    assert found["whole context at 640"]["samples"] == 2


@pytest.mark.slow
def test_a_length_beyond_the_model_is_refused(tmp_path: Path) -> None:
    asked = command("ruler", tmp_path, "--lengths", "100000", "--tasks", "niah_single_1")
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1].removeprefix("vllm-adamas: ")
    assert is_one_sentence(message), message
    assert "100000 is beyond the 8192 tokens of SmolLM2-135M-Instruct" in message
