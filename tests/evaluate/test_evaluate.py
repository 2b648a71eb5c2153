"""The pieces of the evaluation: prompts, texts, statistics, results files, mistakes."""

import dataclasses
import json
import statistics
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from common import MODEL, is_one_sentence, refused
from hypothesis import given
from hypothesis import strategies as st

from vllm_adamas.cli import main
from vllm_adamas.config import Coding
from vllm_adamas.errors import AdamasError
from vllm_adamas.evaluate import report, tasks, texts
from vllm_adamas.evaluate.command import write_report
from vllm_adamas.evaluate.engine import StockEngine
from vllm_adamas.evaluate.study import (
    DEFAULT,
    DENSE,
    FAMILIES,
    TASKS,
    Arm,
    Settings,
    Study,
    load,
    merge,
)
from vllm_adamas.page import Record, held, put


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


class Words:
    """A tokenizer of one token per word, without a chat template, that begins with BOS."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [hash(word) for word in text.split()]
        return SimpleNamespace(input_ids=[1, *ids] if add_special_tokens else ids)


# tasks


@pytest.mark.parametrize("task", tasks.TASKS)
def test_prompts_hold_their_needles_and_fit(tokenizer, task: str) -> None:
    hay = texts.packaged(calibration=False).content
    made = tasks.prompts(tokenizer, task, hay, 1500, 8, seed=3)
    expected = len(made[0].expected)
    assert len(made) == -(-8 // expected)
    for index, prompt in enumerate(made):
        text = tokenizer.decode(prompt.ids)
        assert 1300 < len(prompt.ids) <= 1500
        needles = tasks.TASKS[task](Random(f"{task} 3 {index}"))
        places = [text.index(needle) for needle in needles.needles]
        assert places == sorted(places)
        assert needles.question in text
        assert text.endswith(needles.answer)
        assert prompt.score(needles.answer) < 1.0, "the question gives the answer away"
        assert prompt.score(" ".join(prompt.expected)) == 1.0


def test_prompts_are_a_function_of_the_seed(tokenizer) -> None:
    hay = texts.packaged(calibration=False).content
    first, again, other = (
        tasks.prompts(tokenizer, "single", hay, 400, 3, seed) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_answers_are_scored_by_the_share_of_strings() -> None:
    prompt = tasks.Prompt([], ["123", "Teapot"])
    assert [prompt.score(text) for text in ("x", "it is 123", "123 and a teapot")] == [0, 0.5, 1]


def test_a_context_that_holds_no_needles_is_refused(tokenizer) -> None:
    refused(
        lambda: tasks.prompts(tokenizer, "common_words", "A. B.", 100, 1, 0), "common_words", "100"
    )


# texts


@given(st.integers(20, 60), st.integers(1, 10), st.integers(1, 5))
def test_windows_are_consecutive_text(context: int, steps: int, limit: int) -> None:
    words = [str(n) for n in range(200)]
    found = texts.windows(Words(), [texts.Text("t", " ".join(words))], context, steps, limit)
    ids = [hash(word) for word in words]
    starts = set()
    for window in found:
        assert window.prompt[0] == 1
        whole = window.prompt[1:] + window.target
        assert len(whole) == context - 1
        assert len(window.target) == steps + 1
        starts.add(ids.index(whole[0]))
        assert whole == ids[ids.index(whole[0]) :][: len(whole)]
    assert len(starts) == len(found) == min(limit, 200 // (context - 1))


def test_texts_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "short").write_text("Two words")
    refused(lambda: texts.read([str(tmp_path / "none")]), "none", "cannot be read")
    refused(lambda: texts.read([str(tmp_path)]), str(tmp_path), "cannot be read")
    refused(lambda: texts.read([str(tmp_path / "binary")]), "binary", "UTF-8")
    refused(lambda: texts.read([str(tmp_path / "empty")]), "is empty")
    short = texts.read([str(tmp_path / "short")])
    refused(lambda: texts.windows(Words(), short, 50, 5, 1), "50 tokens", "--context")


def test_calibration_and_evaluation_read_different_parts() -> None:
    parts = [texts.packaged(calibration=which).content for which in (True, False)]
    assert all(len(part) > 40_000 for part in parts)
    assert parts[0][:200] not in parts[1]
    assert parts[1][:200] not in parts[0]


# statistics and reports


def test_bootstrap_covers_the_true_mean() -> None:
    """In most of 200 experiments, as 95% intervals of 30 pairs do."""
    rng, hits = Random(0), 0
    for seed in range(200):
        sample = [rng.gauss(0.3, 1.0) for _ in range(30)]
        mean, low, high = report.bootstrap(sample, seed)
        assert low <= mean <= high
        assert mean == statistics.fmean(sample)
        hits += low <= 0.3 <= high
    assert 175 <= hits <= 199


def results() -> dict:
    def cell(family: str, budget: int, shift: float) -> dict:
        text = {"nll": [2.0 + shift, 3.0 + shift], "steps": 8}
        found = {"perplexity": text, "passkey": {"scores": [1.0, 1.0 if shift < 0.2 else 0.0]}}
        if budget:
            text |= {"kl": [shift, shift], "layers": [2], "rows": 3}
            text |= {"mass": [[0.8]], "oracle": [[0.9]], "error": [[0.1]]}
            found["agreement"] = {"agreed": [3, 5], "of": 8}
        return {"family": family, "budget": budget, "options": {}, "tasks": found}

    return {
        "model": {"name": "some-model"},
        "settings": {"context": 64, "free_tokens": 8, "seed": 0, "texts": {"a.txt": "00"}},
        "environment": {
            "gpu": "x",
            "versions": {"vllm-adamas": "1", "vllm": "2", "torch": "3"},
            "date": "d",
        },
        "cells": {
            DENSE: cell(DENSE, 0, 0.0),
            "dot-64": cell("dot", 64, 0.1),
            "quest-64": cell("quest", 64, 0.5),
        },
    }


def test_the_report_states_differences_and_sample_sizes() -> None:
    table = report.markdown(results())
    assert "some-model" in table
    assert "\nx, vllm-adamas 1, vllm 2, torch 3, d. Texts: a.txt.\n" in table
    assert "2 windows of 64 tokens" in table
    assert "16 scored tokens" in table
    assert "2 passkey" in table
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    dot = ["+0.1000 [+0.1000, +0.1000]", "0.1000 [0.1000, 0.1000]", "0.800", "0.900", "0.100"]
    assert ["dot-64", *dot, "4.0 [3.0, 5.0]"] in rows
    assert ["quest-64", "50.0 [-100.0, +0.0]"] in rows


def test_the_report_that_other_measurements_share_has_the_tables(tmp_path: Path) -> None:
    put(Record(title="bench: m", model="some-model", setting="s"), tmp_path)
    assert write_report(results(), tmp_path) == 0
    bench, quality = held(tmp_path, "some-model").values()
    assert bench.title == "bench: m"
    assert [table.title for table in quality.tables] == ["Text", "Retrieval"]
    assert quality.tables[0].rows[0][:2] == ["dot-64", "+0.1000 [+0.1000, +0.1000]"]
    (chart,) = quality.charts
    assert {name: [(p.x, p.y) for p in line] for name, line in chart.lines.items()} == {
        "dot": [(64, pytest.approx(0.1))],
        "quest": [(64, pytest.approx(0.5))],
    }
    text = (tmp_path / "report.html").read_text()
    assert text.count("<section>") == 2
    assert "+0.1000 [+0.1000, +0.1000]" in text
    assert "+0.1000 [+0.1000, +0.1000]" in (tmp_path / "report.md").read_text()


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    assert report.plot(results(), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


# studies


def study(path: Path, **settings) -> Study:
    return Study(Settings("some/model", **settings), [texts.Text("a.txt", "x")], path / "r.json")


def test_a_context_as_long_as_the_model_can_is_possible() -> None:
    assert Settings("m", context=8192).max_model_len == 8192
    assert Settings("m", context=100, steps=10, free_tokens=64).max_model_len == 153


def test_what_is_done_is_not_missing(tmp_path: Path) -> None:
    first, arm = study(tmp_path, tasks=("perplexity", "passkey")), Arm.of("dot", 64)
    assert first.missing(arm) == ["perplexity", "passkey"]
    first.result["cells"]["dot-64"] = {"tasks": {"perplexity": {}}}
    first._save()
    again = study(tmp_path, tasks=("perplexity", "passkey", "single"))
    assert again.missing(arm) == ["passkey", "single"]
    assert again.missing(Arm.of("dot", 128)) == ["perplexity", "passkey", "single"]
    again.retrieval_budgets = (128,)
    assert again.missing(arm) == []
    assert again.missing(Arm.dense()) == ["perplexity", "passkey", "single"]


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    study(tmp_path)._save()
    refused(lambda: study(tmp_path, context=64), "r.json", "context")
    held = json.loads((tmp_path / "r.json").read_text())
    for spoilt in ({}, held | {"version": 1}, held | {"environment": {"device": "x"}}):
        (tmp_path / "r.json").write_text(json.dumps(spoilt))
        refused(lambda: study(tmp_path), "r.json", "not a results file")


def test_parts_of_a_study_are_put_together(tmp_path: Path) -> None:
    def part(tasks: tuple[str, ...], **cells) -> dict:
        made = study(tmp_path, tasks=tasks).result
        made["cells"] = {
            name: {"family": name, "budget": 0, "options": {}, "tasks": done}
            for name, done in cells.items()
        }
        return made

    def nll(*values) -> dict:
        return {"perplexity": {"nll": list(values)}}

    text = part(("perplexity",), dense=nll(1), dot=nll(2))
    found = part(("passkey",), dense={"passkey": 3}, dot={"passkey": 4}, quest={"passkey": 5})
    again = part(("perplexity",), dense=nll(9), dot=nll(7), oracle=nll(8))
    merged = merge([text, found, again])
    assert merged["settings"]["tasks"] == ["perplexity", "passkey"]
    assert {name: cell["tasks"] for name, cell in merged["cells"].items()} == {
        "dense": {**nll(1), "passkey": 3},
        "dot": {**nll(2), "passkey": 4},
        "quest": {"passkey": 5},
        "oracle": {"perplexity": {"nll": [8], "dense": [9]}},
    }
    assert report.summary(merge([text, again]))[-1]["dnll"] == (-1, -1, -1)
    assert text["cells"]["dot"]["tasks"] == nll(2)
    (tmp_path / "merged.json").write_text(json.dumps(merged))
    assert load(tmp_path / "merged.json") == merged
    found["settings"]["prompts"] += 1
    refused(lambda: merge([text, found]), "settings", "prompts")
    again["environment"]["gpu"] = "another"
    refused(lambda: merge([text, again]), "environment", "device")


def test_a_results_file_names_no_folders(tmp_path: Path) -> None:
    made = Study(Settings(str(MODEL)), [texts.Text("a.txt", "x")], tmp_path / "r.json")
    assert str(MODEL.parent) not in json.dumps(made.result)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_a_valid_configuration(family: str) -> None:
    from vllm_adamas.config import AdamasConfig

    for budget in (32, 64, 1024):
        arm = Arm.of(family, budget)
        assert arm.fits() == (family != "manhattan-window" or budget > 36)
        assert arm.batched == (family != DEFAULT)
        if arm.fits():
            assert AdamasConfig.parse(arm.options).budget.of(10_000) == budget


# the engine


@pytest.mark.parametrize(
    ("tensors", "kind", "forgets"), [(2, "auto", False), (1, "auto", True), (2, "fp8", True)]
)
def test_pages_whose_keys_are_unknown_are_forgotten(tensors: int, kind: str, forgets: bool) -> None:
    """Layers of several kinds share memory: coding all of it again would spoil another layer's keys."""
    from cases import Case

    from vllm_adamas.backends.cpu.backend import CpuBackend
    from vllm_adamas.backends.registry import get_backend
    from vllm_adamas.evaluate.engine import Engine

    batch = Case((70, 20), 8, heads=(2, 2), head_size=64).build(CpuBackend())
    params = dataclasses.replace(batch.params, coding=Coding(0.3, relative=False))
    shape = (2, *batch.kv_cache.shape)
    pages = torch.zeros(shape, dtype=batch.kv_cache.dtype) + batch.kv_cache.nan_to_num()
    impl = SimpleNamespace(
        kv_cache_dtype=kind,
        config=SimpleNamespace(kernels="cpu"),
        shared=SimpleNamespace(backend=get_backend),
        key_factor=lambda: torch.full((2, 64), 4.0, dtype=pages.dtype),
        bind=lambda layer, kv_cache: CpuBackend().bind(params, kv_cache),
    )
    forgotten = []
    engine = object.__new__(Engine)
    engine.llm = SimpleNamespace(reset_prefix_cache=lambda: forgotten.append(True))
    engine._layers = {
        str(i): SimpleNamespace(impl=impl, kv_cache=pages[i % tensors]) for i in range(2)
    }
    before = pages.clone()
    engine._recode([1.0, 2.0])
    assert bool(forgotten) == forgets
    if forgets:
        assert torch.equal(pages, before)
        return
    layout = params.layout
    for page, old, factor in zip(pages, before, (4, 2), strict=True):
        assert torch.equal(layout.k(page), layout.k(old) * factor)
        assert torch.equal(layout.v(page), layout.v(old))
        key = layout.k(page).transpose(1, 2).flatten(0, 1)
        fresh = page.clone()
        backend = CpuBackend()
        backend.append(backend.bind(params, fresh), key, key, torch.arange(len(key)))
        assert torch.equal(layout.hi(page), layout.hi(fresh))
        assert torch.equal(layout.scale(page), layout.scale(fresh))


def test_options_that_do_not_fit_the_model_are_refused() -> None:
    from vllm_adamas.evaluate.engine import Engine

    model = SimpleNamespace(
        get_total_num_hidden_layers=lambda: 4,
        model="",
        revision=None,
        hf_text_config=SimpleNamespace(model_type="qwen3"),
    )
    engine = object.__new__(Engine)
    engine.options = {"token_budget": 99}
    engine.llm = SimpleNamespace(
        llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(model_config=model))
    )
    found = engine.check({"layer_budgets": {"3": 64}})
    assert (found.token_budget, found.layer_budgets, found.combine) == (99, {0: 792, 3: 64}, "sum")
    refused(lambda: engine.check({"layer_budgets": {"4": 64}}), "layer 4", "0 to 3")


# mistakes at the command line


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ("eval {model} --tasks riddles", ("riddles", *TASKS)),
        ("eval {model} --arms best", ("best", *FAMILIES)),
        ("eval {model} --budgets many", ("many", "--budgets 64,256")),
        ("eval {model} --budgets 0", ("0", "above 0")),
        ("eval {model} --steps 0", ("--steps 0", "above 0")),
        ("eval {model} --steps 64 --context 65", ("--steps 64", "--context 65")),
        ("eval {model} --config [", ("not JSON",)),
        ("eval {model} --config {{\"budget\":1}}", ("budget", "not an option")),
        ("eval {model} --text /no/such.txt", ("/no/such.txt", "cannot be read")),
        ("eval {model} --profile /no/such.json", ("/no/such.json", "cannot be read")),
        ("eval /no/such/model", ("/no/such/model", "config.json")),
        ("calibrate {model} --output p.json --text /no/such.txt", ("/no/such.txt", "cannot be read")),
        ("calibrate {model} --output /no/such/p.json", ("/no/such", "does not exist")),
        ("calibrate {model} --output p.json --recall 2", ("--recall 2", "at most 1")),
        ("calibrate ./nothing --output p.json", ("nothing", "config.json")),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_sentence(capsys, tmp_path, monkeypatch, args: str, named) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(args.format(model=MODEL).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("vllm-adamas: ")
    message = error.removeprefix("vllm-adamas: ").rstrip("\n")
    assert is_one_sentence(message), message
    assert all(part in message for part in named), message
    assert not list(tmp_path.iterdir())


def test_models_with_heads_of_several_sizes_have_no_profile(tmp_path: Path) -> None:
    from transformers import Gemma4TextConfig

    from vllm_adamas.evaluate.engine import check_profile

    check_profile(str(MODEL))
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma4TextConfig(num_hidden_layers=2, layer_types=kinds)
    config.architectures = ["Gemma4ForCausalLM"]
    config.save_pretrained(tmp_path)
    check = partial(check_profile, str(tmp_path), skip_tokenizer_init=True)
    refused(check, tmp_path.name, "256 and 512", "without a profile")


@pytest.mark.parametrize("ask", ["calibrate", "suite"])
def test_models_with_recurrent_layers_end_before_an_engine(tmp_path: Path, ask: str) -> None:
    """Their states lie in the pages that another configuration would recode."""
    from transformers import Lfm2Config

    from vllm_adamas.evaluate import engine

    config = Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"])
    config.architectures = ["Lfm2ForCausalLM"]
    config.save_pretrained(tmp_path)
    asked = {
        "calibrate": lambda: engine.Engine(str(tmp_path), 512, skip_tokenizer_init=True),
        "suite": lambda: engine.check(str(tmp_path), 512, [{}]),
    }
    refused(
        asked[ask], tmp_path.name, "state-space or linear-attention layers", "without a profile"
    )


def test_an_engine_that_does_not_start_says_why_in_a_sentence(monkeypatch) -> None:
    def fails(**how):
        raise ValueError("Available memory (1 GiB) is less than desired. To resolve: do this.")

    monkeypatch.setattr("vllm.LLM", fails)
    with pytest.raises(AdamasError) as error:
        StockEngine("model", 128)
    said = "Available memory (1 GiB) is less than desired"
    assert str(error.value).startswith(f"the engine does not start ({said}): free memory, or")
