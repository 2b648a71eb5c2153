"""The command `vllm-adamas doctor`: its record, its text and its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from common import MODEL, is_one_sentence

from vllm_adamas.backends.reference import ReferenceBackend
from vllm_adamas.cli import main
from vllm_adamas.config import AdamasConfig
from vllm_adamas.doctor import command, crossover, host, selftest

on_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="vLLM's CPU kernels are not installed"
)


@pytest.fixture
def sound(monkeypatch) -> None:
    """A host without problems, whatever that of the tests has."""
    monkeypatch.setattr(host, "device", lambda: "cpu")
    monkeypatch.setattr(host, "vllm_problems", lambda device: [])
    monkeypatch.setattr(host, "huge_pages", lambda: ("madvise", []))
    monkeypatch.setattr(host, "memory_problems", lambda environment: [])
    few = {"some": selftest.CASES["manhattan, query_head, equal keys"]}
    monkeypatch.setattr(selftest, "CASES", few)


@pytest.fixture
def timed(monkeypatch) -> None:
    """Two short contexts, in which every call takes as long as it is told to."""
    monkeypatch.setattr(crossover, "CONTEXTS", (300, 600))
    turns = iter([3.0, 2.0, 2.5] * crossover.ROUNDS + [6.0, 4.0, 2.0] * crossover.ROUNDS)

    def stopwatch(device: str):
        def watch(call) -> float:
            call()
            return next(turns)

        return watch

    monkeypatch.setattr(crossover, "Stopwatch", stopwatch)
    monkeypatch.setattr(crossover, "SECONDS", float("inf"))


def test_a_sound_host_passes(sound, capsys) -> None:
    assert main(["doctor", "--no-timing", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record) == ["versions", "host", "kernels", "self-test", "problems"]
    assert record["problems"] == []
    assert record["host"]["huge pages"] == "madvise"
    assert record["kernels"]["used here"] == record["kernels"]["cpu"]
    assert record["self-test"].keys() == {"cpu"}
    assert (record["self-test"]["cpu"]["cases"], record["self-test"]["cpu"]["failures"]) == (1, [])


def test_wrong_kernels_fail(sound, monkeypatch, capsys) -> None:
    class Wrong(ReferenceBackend):
        name, description = "cpu", "cpu (broken)"

        def decode(self, layer, query, batch, output, stats):
            super().decode(layer, query, batch, output, stats)
            output[0, 0] *= 1.1

    monkeypatch.setattr(command, "available", lambda device: {"cpu": Wrong()})
    assert main(["doctor", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    (failure,) = record["self-test"]["cpu"]["failures"]
    assert failure.startswith(
        "some: decode: 1 of 15 heads of the output are wrong, the first at [0, 0]"
    )
    assert "left out" in record["timing"]
    (problem,) = record["problems"]
    assert problem.startswith("kernels='cpu' failed the self-test (1 failures)")
    assert is_one_sentence(problem)
    assert main(["doctor"]) == 1
    assert failure in capsys.readouterr().out


def test_every_problem_is_told(sound, monkeypatch, capsys) -> None:
    monkeypatch.setattr(host, "vllm_problems", lambda device: ["vLLM is gone."])
    monkeypatch.setattr(host, "huge_pages", lambda: ("never", ["Pages are small."]))
    assert main(["doctor", "--config", '{"kernels": "cuda"}']) == 1
    lines = capsys.readouterr().out.splitlines()
    told = [line.strip() for line in lines[lines.index("problems") + 1 :]]
    assert told[:2] == ["vLLM is gone.", "Pages are small."]
    assert told[2].startswith("kernels='cuda' do not run on cpu devices")
    assert len(told) == 3
    assert "  left out: something that would be timed has a problem" in lines


@on_cpu
def test_the_timing_suggests_a_configuration(sound, timed, capsys) -> None:
    assert main(["doctor", "--json", "--model", str(MODEL)]) == 0
    timing = json.loads(capsys.readouterr().out)["timing"]
    assert timing["heads"] == {"query": 9, "kv": 3, "size": 64}
    assert (timing["stock"], timing["gains from"]) == ("CPU_ATTN", 300)
    assert timing["options"] == {"token_budget": 256, "min_context": 600}
    assert [row["context"] for row in timing["contexts"]] == [300, 600]
    assert timing["contexts"][1]["gain"] == {"median": 3.0, "q1": 3.0, "q3": 3.0}
    assert (timing["not timed"], timing["noisy"]) == ([], False)


@on_cpu
def test_the_text_says_what_is_timed_and_what_to_paste(sound, timed, capsys) -> None:
    assert main(["doctor", "--config", '{"token_budget": 100, "num_sink_tokens": 4}']) == 0
    out = capsys.readouterr().out
    assert "Decode attention of one layer, one request; not end to end" in out
    assert "32 query heads, 8 KV heads, head size 128" in out
    assert "Sparse decode gains over CPU_ATTN from 300 tokens on." in out
    _, _, pasted = out.partition("--additional-config '")
    options = json.loads(pasted.partition("'")[0])["adamas"]
    assert options == {"token_budget": 100, "num_sink_tokens": 4, "min_context": 600}
    AdamasConfig.parse(options)
    assert out.endswith("problems\n  none\n")


@on_cpu
def test_a_machine_without_gain_is_told_so(sound, timed, monkeypatch, capsys) -> None:
    monkeypatch.setattr(crossover, "Stopwatch", lambda device: lambda call: 1.0)
    told = "gains over CPU_ATTN at no context that was timed: {}."
    assert main(["doctor"]) == 0
    assert told.format("serve without adamas") in capsys.readouterr().out
    monkeypatch.setattr(crossover, "is_noisy", lambda timings: True)
    assert main(["doctor"]) == 0
    assert told.format("repeat it when the machine is quiet") in capsys.readouterr().out


def test_what_cannot_be_timed_is_a_problem(sound, monkeypatch, capsys) -> None:
    class NoMemory:
        def __init__(self, *args):
            raise MemoryError("of 9 GiB")

    monkeypatch.setattr(crossover, "OneLayer", NoMemory)
    assert main(["doctor", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["timing"] == {"left out": "MemoryError: of 9 GiB"}
    assert all(map(is_one_sentence, record["problems"]))


def test_a_budget_beyond_all_contexts_leaves_nothing_to_time(sound, capsys) -> None:
    assert main(["doctor", "--json", "--config", '{"token_budget": 1.0}']) == 0
    assert "reaches all contexts" in json.loads(capsys.readouterr().out)["timing"]["left out"]


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"num_attention_heads": 8, "head_dim": 72}, "head_size 72"),
        (
            {"num_attention_heads": 8, "head_dim": 64, "num_key_value_heads": 3},
            "8 query heads for 3",
        ),
        ({"hidden_size": 64}, "has no 'num_attention_heads'"),
    ],
)
def test_models_without_a_layer_to_time(tmp_path: Path, capsys, model: dict, named: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model))
    assert main(["doctor", "--model", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err
    assert is_one_sentence(err.removeprefix("vllm-adamas: ").rstrip("\n")), err


@pytest.mark.parametrize("options", ['{"token_budget": 0}', "token_budget", '{"profile": "nope"}'])
def test_options_are_checked_first(capsys, options: str) -> None:
    assert main(["doctor", "--config", options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vllm-adamas: ")
