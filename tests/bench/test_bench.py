"""The command `vllm-adamas bench`: what is measured, what is kept and continued, what is said, and a real run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from common import MODEL, ROOT, is_one_sentence
from pydantic import ValidationError

from vllm_adamas import page
from vllm_adamas.bench import command, findings, results
from vllm_adamas.bench.engine import Facts, TimedEngine
from vllm_adamas.cli import main
from vllm_adamas.errors import reason
from vllm_adamas.identity import Heads

CELLS = [(512, 1), (512, 4), (2048, 1), (2048, 4)]


class Killed(BaseException):
    pass


class FakeWorker:
    """Takes as long as it is told: a thousandth of a token's attention in dense, a fifth of it in adamas."""

    asked: list[tuple]
    last: int | None
    stop: BaseException
    capacity = 100_000

    def __init__(self, module: str, first: dict):
        self.part = module.rpartition(".")[2]
        self.name = None
        self.told = {"threads": 1, "attention": "CPU_ATTN"}
        if self.part == "attention":
            self.told["kernels"] = "cpu (none)"
        else:
            adamas = first["adamas"]
            self.name = f"adamas {adamas['token_budget']}" if adamas else "dense"
            self.told["capacity"] = self.capacity
            self.asked.append(("start", self.name))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ask(self, question: dict) -> dict:
        if len(self.asked) == self.last:
            raise self.stop
        context, batch = question["context"], question["batch"]
        self.asked.append((self.name or self.part, context, batch))
        time = context * batch / 1000
        if self.part == "attention":
            times = {name: [time / 5, time / 4, time / 5] for name in question["names"]}
            return {"us": {"stock": [time] * 3, **times}, "copies": 1}
        time = 10 + (time if self.name == "dense" else time / 5)
        return {"rounds": [[time] * (question["tokens"] - 1)] * question["count"]}


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setattr(command, "Worker", FakeWorker)
    FakeWorker.asked, FakeWorker.last, FakeWorker.stop = [], None, Killed()

    def facts(cls, model, max_model_len, configurations, **engine_options):
        fp8 = engine_options["kv_cache_dtype"] == "fp8"
        return cls(Heads(9, 3, 64), "bfloat16", max_model_len or 8192, fp8, configurations)

    monkeypatch.setattr(Facts, "of", classmethod(facts))
    monkeypatch.setattr(command.host, "device", lambda: "cpu")
    return FakeWorker


def bench(folder: Path, *more: str) -> int:
    asked = ["bench", str(MODEL), "--output", str(folder), "--contexts", "512", "2048"]
    return main([*asked, "--batches", "1", "4", *more])


def held(folder: Path) -> dict:
    return results.load(folder / "bench.json")


def test_every_cell_is_measured_once_and_engines_take_turns(worker, tmp_path: Path) -> None:
    assert bench(tmp_path, "--budgets", "64", "256") == 0
    names = [asked[1] for asked in worker.asked if asked[0] == "start"]
    assert names == ["dense", "adamas 64", "adamas 256", "adamas 256", "adamas 64", "dense"]
    rest = [asked for asked in worker.asked if asked[0] != "start"]
    assert sorted(rest) == sorted(
        [("attention", *cell) for cell in CELLS]
        + [(name, *cell) for name in ("dense", "adamas 64", "adamas 256") for cell in CELLS * 2]
    )
    data = held(tmp_path)
    assert len(data["attention"]) == 2 * len(CELLS)
    assert len(data["end to end"]) == 2 * 3 * len(CELLS)
    assert data["end to end"][0]["steps_ms"] == [[10.512] * 31] * command.ROUNDS
    worker.asked.clear()
    assert bench(tmp_path, "--budgets", "64", "256") == 0
    assert worker.asked == [], "nothing is measured again"
    assert bench(tmp_path, "--budgets", "128", "--repeats", "1") == 0
    assert {asked[1] for asked in worker.asked if asked[0] == "start"} == {"adamas 128"}


@pytest.mark.parametrize("last", [0, 3, 5, 8, 10, 13])
def test_a_killed_run_goes_on_where_it_stopped(worker, tmp_path: Path, last: int) -> None:
    assert bench(tmp_path / "whole", "--repeats", "1") == 0
    cells = [asked for asked in worker.asked if asked[0] != "start"]
    worker.asked.clear()
    worker.last = last
    with pytest.raises(Killed):
        bench(tmp_path / "part", "--repeats", "1")
    before = [asked for asked in worker.asked if asked[0] != "start"]
    worker.asked.clear()
    worker.last = None
    assert bench(tmp_path / "part", "--repeats", "1") == 0
    after = [asked for asked in worker.asked if asked[0] != "start"]
    assert before + after == cells
    assert held(tmp_path / "part") == held(tmp_path / "whole")


def test_the_report_tells_ratios_with_their_quartiles(worker, tmp_path: Path, capsys) -> None:
    assert bench(tmp_path, "--repeats", "1") == 0
    (record,) = page.held(tmp_path, MODEL.name).values()
    layer, whole = record.tables
    assert layer.headers == ["context x requests", "dense", "adamas 256", "ratio"]
    assert layer.rows[0] == [
        "512 x 1", "0.51 [0.51, 0.51]", "0.10 [0.10, 0.12]", "5.00x [4.50, 5.00]"
    ]  # fmt: skip
    assert [row[0] for row in layer.rows] == ["512 x 1", "2,048 x 1", "512 x 4", "2,048 x 4"]
    assert whole.rows[-1][1:3] == ["18.19 [18.19, 18.19]", "11.64 [11.64, 11.64]"]
    assert whole.rows[-1][3] == "1.56x [1.56, 1.56]"
    assert (
        "End to end, 4 requests: adamas 256 is faster than dense from 512 tokens on (1.56x [1.56, 1.56] at 2,048)."
        in record.findings
    )
    for chart in record.charts:
        assert chart.base == 1
        assert chart.lines.keys() == {"adamas 256, 1 request", "adamas 256, 4 requests"}
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 2
    assert all(sentence in text for sentence in record.findings)
    assert record.findings[0] in capsys.readouterr().out


def test_a_ratio_needs_rounds_of_both_backends() -> None:
    def entry(name: str, repeat: int, ms: float) -> dict:
        key = {"configuration": name, "repeat": repeat, "context": 512, "batch": 1}
        return key | {"steps_ms": [[ms, ms + 2], [ms]]}

    entries = [entry("dense", 1, 10.0), entry("dense", 2, 20.0), entry("adamas 64", 2, 4.0)]
    (cell,) = findings.tpot({"end to end": entries})
    assert (cell.dense, cell.adamas) == ([21.0, 20.0], [5.0, 4.0])
    assert findings.tpot({"end to end": entries[:2]}) == []


def test_what_is_not_shown_to_be_faster_is_said() -> None:
    slow = findings.Cell("adamas 64", 512, 1, [1.0, 1.0, 0.5, 1.0], [0.9, 0.9, 0.9, 0.9])
    (said,) = findings._verdicts("Attention of one layer", [slow])
    assert "is not shown to be faster than dense at the longest context (1.11x [0.97, 1.11]" in said


def test_cells_that_do_not_fit_are_named(worker, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(worker, "capacity", 2500)
    assert bench(tmp_path, "--repeats", "1") == 0
    (record,) = page.held(tmp_path, MODEL.name).values()
    assert [row[0] for row in record.tables[1].rows] == ["512 x 1", "2,048 x 1", "512 x 4"]
    why = "because 8,192 tokens do not fit into the KV cache of 2,500."
    for name in ("dense", "adamas 256"):
        assert f"Left out: end to end, 2,048 tokens x 4, {name}, {why}" in record.notes
    assert f"{why}</li>" in (tmp_path / "report.html").read_text()
    worker.asked.clear()
    assert bench(tmp_path, "--repeats", "1") == 0
    assert worker.asked == []


def test_attention_over_fp8_is_named_and_engines_run(worker, tmp_path: Path) -> None:
    assert bench(tmp_path, "--repeats", "1", "--kv-cache-dtype", "fp8") == 0
    (record,) = page.held(tmp_path, MODEL.name).values()
    (table,) = record.tables
    assert table.title.startswith("End to end")
    assert sum(note.startswith("Left out: attention") for note in record.notes) == len(CELLS)


def test_requests_that_never_decode_together_are_named(worker, tmp_path: Path, monkeypatch) -> None:
    ask = worker.ask

    def preempted(self, question: dict) -> dict:
        alone = self.part == "engine" and question["batch"] > 1
        return {"rounds": [[], [], []]} if alone else ask(self, question)

    monkeypatch.setattr(worker, "ask", preempted)
    assert bench(tmp_path, "--repeats", "1") == 0
    left_out = [entry for entry in held(tmp_path)["end to end"] if "left out" in entry]
    assert [entry["batch"] for entry in left_out] == [4] * 4
    assert left_out[0]["left out"] == "its requests did not decode together"


def test_both_commands_share_one_report(worker, tmp_path: Path) -> None:
    def quality(**changes) -> page.Record:
        facts = {
            "title": "ruler: m",
            "model": MODEL.name,
            "setting": "s",
            "findings": ["It is so."],
        }
        return page.Record(**facts | changes)

    page.put(quality(), tmp_path)
    assert bench(tmp_path, "--repeats", "1") == 0
    page.put(quality(findings=["It is still so."]), tmp_path)
    assert list(page.held(tmp_path, MODEL.name)) == ["ruler: m", f"bench: {MODEL.name}"]
    text = (tmp_path / "report.html").read_text()
    assert text.count("<section>") == 2
    assert "It is still so." in text
    assert "faster than dense" in text


def test_an_interrupt_and_a_dead_process_leave_what_there_is(
    worker, tmp_path: Path, capsys
) -> None:
    worker.last, worker.stop = 6, KeyboardInterrupt()
    assert bench(tmp_path) == 130
    assert f"goes on from {tmp_path / 'bench.json'}" in capsys.readouterr().err
    assert not page.held(tmp_path, MODEL.name), "there is no report of a part"
    worker.asked.clear()
    worker.last, worker.stop = 3, RuntimeError("the process of x ended with status -9")
    assert bench(tmp_path) == 1
    assert "status -9" in capsys.readouterr().err
    (record,) = page.held(tmp_path, MODEL.name).values()
    assert record.tables[0].title.startswith("Attention")


def message(capsys) -> str:
    error = capsys.readouterr().err.splitlines()[-1]
    text = error.removeprefix("vllm-adamas: ")
    assert text != error
    assert is_one_sentence(text), text
    return text


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ("--contexts 512 9000", ("9000", "8192", "--contexts")),
        ("--contexts 4000 --max-model-len 2048", ("4000", "2048", "--max-model-len")),
        ("--contexts 0", ("--contexts 0", "above 0")),
        ("--batches 0 1", ("--batches 0", "above 0")),
        ("--budgets -1", ("--budgets -1", "above 0")),
        ("--repeats 0", ("--repeats 0", "above 0")),
        ("--max-model-len 0", ("--max-model-len 0", "above 0")),
        ("--kv-cache-gib nan", ("--kv-cache-gib nan", "above 0")),
        ("--output-len 1", ("--output-len 1", "2 or more")),
        ("--output-len 512 --contexts 512", ("--output-len 512", "512", "--contexts")),
        ('--config {"budget":1}', ("adamas.budget", "token_budget")),
        ("--config {", ("--config", "JSON")),
    ],
)
def test_mistakes_end_in_one_sentence(worker, capsys, tmp_path, args: str, named) -> None:
    folder = tmp_path / "out"
    assert main(["bench", str(MODEL), "--output", str(folder), *args.split()]) == 2
    text = message(capsys)
    assert all(part in text for part in named), text
    assert worker.asked == []
    assert not folder.exists()


def test_a_folder_of_another_run_is_refused(worker, tmp_path: Path, capsys) -> None:
    assert bench(tmp_path, "--repeats", "1") == 0
    worker.asked.clear()
    assert bench(tmp_path, "--dtype", "float32", "--config", '{"score": "manhattan"}') == 2
    text = message(capsys)
    assert all(part in text for part in ("bench.json", "options, dtype", "--output"))
    (tmp_path / "bench.json").write_text("{}")
    assert bench(tmp_path) == 2
    assert "holds no times of this release" in message(capsys)
    (tmp_path / "bench.json").unlink()
    report = json.loads((tmp_path / "report.json").read_text())
    report["records"][0]["model"] = "other"
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert bench(tmp_path) == 2
    assert f"is about other and not about {MODEL.name}" in message(capsys)
    assert worker.asked == []


def test_default_contexts_fit_the_model_and_the_device(worker, tmp_path: Path, monkeypatch) -> None:
    def chosen(*more: str) -> list[tuple]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        worker.asked.clear()
        assert main(["bench", str(MODEL), "--output", str(folder), "--no-engines", *more]) == 0
        return [asked[1:] for asked in worker.asked]

    assert chosen() == [(1024, 1), (1024, 4), (4096, 1), (4096, 4)]
    assert chosen("--max-model-len", "2048") == [(1024, 1), (1024, 4)]
    assert chosen("--max-model-len", "600") == [(600, 1), (600, 4)]
    monkeypatch.setattr(command.host, "device", lambda: "cuda")
    assert chosen() == [(8192, 1), (8192, 8)]
    assert chosen("--max-model-len", "131072")[-1] == (32768, 8)


# the engine


class FakeLLM:
    """Gives each request a token per step, but for the first step, which serves the first request alone."""

    def __init__(self):
        self.waiting: dict[str, int] = {}
        self.first, self.prompts = True, []

    def add_request(self, name, prompt, params) -> None:
        assert params.ignore_eos
        assert name not in self.waiting
        self.prompts.append(prompt["prompt_token_ids"])
        self.waiting[name] = params.max_tokens

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list:
        served = list(self.waiting)[: 1 if self.first else None]
        self.first = False
        for name in served:
            self.waiting[name] -= 1
            if not self.waiting[name]:
                del self.waiting[name]
        return served


def test_steps_count_in_which_every_request_got_a_token() -> None:
    engine, fake = object.__new__(TimedEngine), FakeLLM()
    model = SimpleNamespace(get_vocab_size=lambda: 1000)
    engine.llm = SimpleNamespace(
        llm_engine=SimpleNamespace(
            vllm_config=SimpleNamespace(model_config=model),
            add_request=fake.add_request,
            has_unfinished_requests=fake.has_unfinished_requests,
            step=fake.step,
        )
    )
    engine._asked = 0
    rounds = engine.rounds(context=40, batch=2, tokens=8, count=3)
    assert list(map(len, rounds)) == [7, 7, 7], "the fill came before and met the lonely step"
    assert all(time >= 0 for times in rounds for time in times)
    assert [len(prompt) for prompt in fake.prompts] == [32] * 8
    assert fake.prompts[0] == fake.prompts[2] != fake.prompts[1]
    assert {100 <= token < 500 for prompt in fake.prompts for token in prompt} == {True}
    fake.first = True
    (lonely,) = engine.rounds(context=40, batch=2, tokens=8, count=1)
    assert len(lonely) == 7
    longer = engine._prompt(1, 50)
    assert longer[:32] == fake.prompts[1], "a longer context begins with the shorter one's tokens"


def test_a_lonely_step_breaks_the_chain() -> None:
    engine, fake = object.__new__(TimedEngine), FakeLLM()
    engine.llm, engine._asked = SimpleNamespace(llm_engine=fake), 0
    assert len(engine._round([[1], [2]], 8)) == 6, "one request ends a step before the other"


def test_reasons_are_one_line() -> None:
    assert reason(ValueError("No such\ndtype. Please look.")) == "No such dtype"
    with pytest.raises(ValidationError) as error:
        page.Point(x=1, y="high", low=0, high=1)
    assert reason(error.value).startswith("y='high', Input should be a valid number")
    assert reason(RuntimeError()) == "RuntimeError"


# real models, and the real engines


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (".", ("holds no config.json",)),
        ("no-such/model/at-all", ("vLLM cannot read a model at-all", "hub name")),
        (f"{MODEL} --max-model-len 9000", ("--max-model-len 9000", "8192")),
        (f"{MODEL} --dtype float7", ("vLLM refuses SmolLM2-135M-Instruct", "float7")),
        (f'{MODEL} --config {{"layer_budgets":{{"99":64}}}}', ("layer 99",)),
    ],
)
def test_what_vllm_or_the_backend_refuses_ends_in_one_sentence(
    capsys, tmp_path, monkeypatch, args: str, named
) -> None:
    monkeypatch.setattr(command, "Worker", None)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *args.split()]) == 2
    text = message(capsys)
    assert all(part in text for part in named), text
    assert not list(tmp_path.iterdir())


def test_facts_of_a_model() -> None:
    facts = Facts.of(str(MODEL), None, {"a": {"token_budget": 64}}, dtype="auto", max_num_seqs=4)
    assert (facts.heads, facts.dtype, facts.max_model_len) == (Heads(9, 3, 64), "bfloat16", 8192)
    assert not facts.fp8
    assert facts.options["a"]["token_budget"] == 64
    assert facts.options["a"]["combine"] == "max", "a default of the model"


SMALL = ("--contexts", "256", "--batches", "2", "--output-len", "6", "--kv-cache-gib", "0.25")


@pytest.mark.slow
def test_from_end_to_end(tmp_path: Path) -> None:
    """The least that has every part: one cell of a layer, and the two engines."""
    asked = ["bench", str(MODEL), "--output", str(tmp_path), *SMALL, "--budgets", "64"]
    asked += ["--repeats", "1", "--enforce-eager", "--load-format", "dummy"]
    here = [sys.executable, str(ROOT / "tests" / "bench_here.py"), *asked]
    done = subprocess.run(here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    data = held(tmp_path)
    (layer,) = data["attention"]
    assert len(layer["dense_us"]) == len(layer["adamas_us"]) > 10
    assert min(layer["dense_us"] + layer["adamas_us"]) > 0
    assert [engine["attention"] for engine in data["engines"]] == ["CPU_ATTN", "ADAMAS"]
    assert data["engines"][0]["capacity"] > data["engines"][1]["capacity"], "pages have signatures"
    for entry in data["end to end"]:
        assert [len(steps) for steps in entry["steps_ms"]] == [5] * command.ROUNDS
    (record,) = page.held(tmp_path, MODEL.name).values()
    assert record.findings[-1] in done.stdout
    assert any("random" in note and "weights" in note for note in record.notes)
    assert (tmp_path / "report.html").read_text().count("<svg") == 2


@pytest.mark.slow
def test_a_killed_command_goes_on_and_reports(tmp_path: Path) -> None:
    """In processes of their own, compiled as a server is."""
    asked = [sys.executable, "-m", "vllm_adamas.cli", "bench", str(MODEL)]
    asked += ["--output", str(tmp_path), *SMALL, "--repeats", "1"]
    first = subprocess.Popen(asked, stderr=subprocess.PIPE, text=True)
    try:
        for line in first.stderr:
            if "engine of dense, 256 tokens" in line:
                break
    finally:
        first.kill()
        first.wait()
        first.stderr.close()
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "attention, 256" not in done.stderr
    data = held(tmp_path)
    assert [entry["configuration"] for entry in data["end to end"]] == ["dense", "adamas 256"]
    assert "End to end, 2 requests" in done.stdout
