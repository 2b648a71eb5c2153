"""Load tests: scenarios, traffic, statistics, reconciliation, reports, and whole runs against servers."""

import asyncio
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from common import MODEL, ROOT, is_one_sentence, random_llama, refused

from vllm_adamas.budget import TokenBudget
from vllm_adamas.cli import main
from vllm_adamas.config import AdamasConfig
from vllm_adamas.serving.launch import Server
from vllm_adamas.serving.loadtest import aiperf
from vllm_adamas.serving.loadtest.command import known_max_model_len
from vllm_adamas.serving.loadtest.drive import Outcome, Run, samples
from vllm_adamas.serving.loadtest.measure import Sample, ratios, spread, values
from vllm_adamas.serving.loadtest.plot import chart, shares, ticks
from vllm_adamas.serving.loadtest.reconcile import (
    ATTENDED,
    CONTEXT,
    DENSE,
    DRAFTS,
    OUTPUTS,
    PREEMPTIONS,
    PROMPTS,
    REQUESTS,
    SPARSE,
    Layers,
    expected,
    options_in_force,
    reconcile,
)
from vllm_adamas.serving.loadtest.record import Results
from vllm_adamas.serving.loadtest.report import as_html, as_markdown
from vllm_adamas.serving.loadtest.scenario import CHUNK, Objectives, Scenario, load, shipped
from vllm_adamas.serving.loadtest.traffic import chunk_tokens, lines

DOCUMENTS = {
    "description": "Two documents.",
    "traffic": {
        "kind": "documents",
        "documents": 2,
        "document_tokens": [64, 320],
        "questions": 2,
        "question_tokens": [5, 9],
        "output_tokens": 8,
        "concurrency": 2,
    },
    "slo": {"ttft_ms": 60000},
}
AGENTS = {
    "description": "Two agents.",
    "traffic": {
        "kind": "agents",
        "agents": 2,
        "turns": 3,
        "first_tokens": [100, 140],
        "result_tokens": [20, 40],
        "output_tokens": [4, 8],
    },
}


def scenario(base=DOCUMENTS, **traffic) -> Scenario:
    return Scenario.model_validate({**base, "traffic": {**base["traffic"], **traffic}})


def written(folder: Path, content: object) -> str:
    file = folder / "mine.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(file)


# Scenarios


@pytest.mark.parametrize("name", shipped())
def test_shipped_scenarios_are_valid(name: str) -> None:
    found = load(name)
    assert found.description.endswith(".")
    assert found.traffic.longest() > 0


def test_scenarios_are_shipped_for_every_kind_of_traffic() -> None:
    kinds = {load(name).traffic.kind for name in shipped()}
    assert kinds == {"shared_prefix", "documents", "agents", "bursts", "soak"}


def changed(**changes) -> dict:
    """The scenario of DOCUMENTS with other keys; those that are None are left out."""
    found = {**DOCUMENTS, "traffic": dict(DOCUMENTS["traffic"])}
    for place, value in changes.items():
        at, key = (found["traffic"], place[2:]) if place.startswith("t_") else (found, place)
        at[key] = value
        if value is None:
            del at[key]
    return found


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (changed(repeat=2), "repeat is not a key: valid are description, traffic, slo"),
        (changed(t_document=2), "traffic.document is not a key: valid are concurrency"),
        (changed(slo={"ttft": 2}), "slo.ttft is not a key: valid are ttft_ms"),
        (changed(description=None), "description is missing"),
        (changed(t_questions=None), "traffic.questions is missing"),
        (changed(t_questions=0), "traffic.questions is not valid"),
        (changed(t_output_tokens=[9, 8]), "9 is above 8"),
        (changed(t_concurrency=None), "neither rate nor concurrency"),
        (changed(t_kind="squall"), "shared_prefix, documents, bursts, agents, trace, soak"),
        (changed(t_kind=None), "traffic.kind must be one of"),
        ("- a list", "no keys"),
        ("a: [1", "not YAML"),
        ("a: 2026-02-30", "not YAML"),
    ],
)
def test_a_mistake_in_a_scenario_is_one_sentence(tmp_path, content, named: str) -> None:
    refused(lambda: load(written(tmp_path, content)), "mine.yaml", named)


def test_a_scenario_that_is_not_there_names_those_that_are() -> None:
    refused(lambda: load("squall"), "squall is neither a scenario nor a file", *shipped())


def test_a_scenario_that_cannot_be_read_is_refused(tmp_path) -> None:
    refused(lambda: load(str(tmp_path)), "nor a file that can be read")
    (tmp_path / "mine.yaml").write_bytes(b"description: \xff")
    refused(lambda: load(str(tmp_path / "mine.yaml")), "not YAML")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--scale", "0"], "--scale 0 is impossible"),
        (["--load", "inf"], "--load inf is impossible"),
        (["--limit", "nan"], "--limit nan is impossible"),
        (["--repeats", "-1"], "--repeats -1"),
        (["--config", '{"token_budget": "x"}'], "adamas.token_budget"),
        (["--client", "aiperf"], "--client aiperf needs the program aiperf on PATH"),
        (["--stock", "ADAMAS"], "--stock ADAMAS would compare adamas with itself"),
        (["--", "--port", "80"], "--port cannot be passed to the servers"),
        (["--", "--api_key=x"], "--api-key"),
        (
            ["--", "--max-model-len", "300"],
            "longest context has 337 tokens, and the server admits 300",
        ),
        (["--scale", "100"], "give a smaller --scale"),
    ],
)
def test_mistakes_end_before_a_server_starts(
    tmp_path, capsys, monkeypatch, args, named: str
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    output = tmp_path / "output"
    command = ["loadtest", written(tmp_path, DOCUMENTS), str(MODEL), "--output", str(output), *args]
    assert main(command) == 2
    error = capsys.readouterr().err.removeprefix("vllm-adamas: ").rstrip("\n")
    assert named in error
    assert is_one_sentence(error), error
    assert not output.exists()


def test_agents_have_their_own_client(tmp_path, capsys) -> None:
    assert main(["loadtest", written(tmp_path, AGENTS), str(MODEL), "--client", "aiperf"]) == 2
    assert "cannot send traffic of kind agents" in capsys.readouterr().err


def test_a_report_that_has_no_place_ends_before_a_server_starts(tmp_path, capsys) -> None:
    file = written(tmp_path, DOCUMENTS)
    assert main(["loadtest", file, str(MODEL), "--output", file]) == 2
    error = capsys.readouterr().err.removeprefix("vllm-adamas: ").rstrip("\n")
    assert "cannot be made a folder (File exists)" in error
    assert is_one_sentence(error), error


@pytest.mark.parametrize(
    ("args", "rope", "length"),
    [
        ([], {}, 4096),
        ([], {"rope_type": "yarn", "factor": 4.0}, None),
        (["--max-model-len", "300"], {}, 300),
        (["--max_model_len=300", "--seed", "1"], {}, 300),
        (["--max-model-len", "8k"], {}, None),
    ],
)
def test_the_longest_context_is_known_or_left_to_the_server(tmp_path, args, rope, length) -> None:
    config = {"max_position_embeddings": 4096, "rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert known_max_model_len(str(tmp_path), args) == length


def test_arguments_after_two_dashes_are_for_servers_alone(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["info", "--", "--port", "80"])
    assert "those of the servers of loadtest" in capsys.readouterr().err


def test_scale_and_load_change_what_they_say() -> None:
    half = scenario().scaled(0.5, 3).traffic
    assert half.document_tokens == (32, 160)
    assert half.question_tokens == (2, 4)
    assert (half.documents, half.concurrency) == (6, 6)
    assert (half.questions, half.output_tokens) == (2, (8, 8))
    assert scenario(rate=8.0, concurrency=None).scaled(1, 0.25).traffic.rate == 2.0


# Traffic


@pytest.mark.parametrize("name", ["chat", "documents", "bursts", "demo"])
def test_a_seed_gives_the_same_lines_again(name: str) -> None:
    traffic = load(name).traffic
    first, again, other = (lines(traffic, seed) for seed in (7, 7, 8))
    assert first == again
    assert first != other
    for line in first:
        assert len(line.hash_ids) == -(-line.input_length // CHUNK)
        assert line.input_length + line.output_length <= traffic.longest()


def test_questions_share_their_document_and_nothing_else() -> None:
    found = lines(scenario().traffic, seed=0)
    assert [line.input_length // 64 for line in found] == [1, 5, 1, 5]
    short, long, short_again, _ = found
    assert short.hash_ids[:4] == short_again.hash_ids[:4]
    assert not set(short.hash_ids[4:]) & set(short_again.hash_ids[4:])
    assert not set(short.hash_ids) & set(long.hash_ids)


def test_chats_share_as_many_prefixes_as_they_should() -> None:
    traffic = load("chat").traffic
    found = lines(traffic, seed=0)
    assert len({line.hash_ids[0] for line in found}) == traffic.prefixes
    last = found[-1].timestamp
    assert len(found) / last == pytest.approx(traffic.rate, rel=0.3)


def test_a_burst_comes_at_once() -> None:
    traffic = load("bursts").traffic
    times = [line.timestamp for line in lines(traffic, seed=0)]
    assert times == sorted([traffic.every_s * n for n in range(traffic.bursts)] * traffic.requests)


def test_a_recorded_trace_is_sent_as_it_was_or_scaled(tmp_path) -> None:
    file = tmp_path / "trace.jsonl"
    entries = [
        {
            "timestamp": 5000,
            "input_length": 1000,
            "output_length": 9,
            "hash_ids": [1, 2],
            "user": 1,
        },
        {"timestamp": 7000, "input_length": 600, "output_length": 3, "hash_ids": [1, 3]},
    ]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    trace = {"kind": "trace", "file": str(file), "requests": 2}
    plain = Scenario.model_validate({"description": "x", "traffic": trace})
    assert [line.timestamp for line in lines(plain.traffic, 0)] == [0, 2]
    assert (plain.traffic.longest(), chunk_tokens(plain.traffic)) == (1009, 512)
    small = plain.scaled(0.25, 0.5).traffic
    (only,) = lines(small, 0)
    assert (only.input_length, only.output_length, only.hash_ids) == (250, 9, [1, 2])
    assert chunk_tokens(small) == 128
    assert lines(plain.scaled(1, 2).traffic, 0)[1].timestamp == 1
    file.write_text("{}")
    refused(lambda: lines(plain.traffic, 0), "not a trace")


# Statistics


def sample(ttft: float, *gaps: float, prompt: int = 10, error: str | None = None) -> Sample:
    return Sample(0.0, prompt, len(gaps) + 1, ttft, list(gaps), error)


def test_latencies_of_a_request() -> None:
    one = sample(1.0, 0.2, 0.4)
    assert (one.e2e, one.tpot) == pytest.approx((1.6, 0.3))
    assert sample(1.0).tpot is None
    bundled = Sample(0.0, 10, 5, 1.0, [0.4, 0.4])  # two events, four tokens
    assert bundled.tpot == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        ({}, True),
        ({"ttft_ms": 1000, "tpot_ms": 300.1}, True),
        ({"ttft_ms": 999}, False),
        ({"ttft_ms": 1000, "tpot_ms": 299}, False),
        ({"e2e_ms": 1599}, False),
    ],
)
def test_a_request_is_good_if_it_meets_all_objectives(slo: dict, good: bool) -> None:
    assert sample(1.0, 0.2, 0.4).meets(Objectives(**slo)) is good
    assert not sample(1.0, 0.2, 0.4, error="HTTP 500").meets(Objectives(**slo))


def test_ratios_are_of_the_same_request() -> None:
    stock = [sample(2.0, 0.4), sample(3.0), sample(9.0, 9.0)]
    adamas = [sample(1.0, 0.1), sample(6.0), sample(1.0, 1.0, error="timeout")]
    assert ratios(stock, adamas, "ttft") == [2.0, 0.5]
    assert ratios(stock, adamas, "tpot") == pytest.approx([4.0])
    assert values(adamas, "ttft") == [1.0, 6.0]


def test_spread() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3, "q1": 2, "q3": 4, "n": 5}
    assert spread([4.0]) == {"median": 4, "q1": 4, "q3": 4, "n": 1}


RESULT = {
    "duration": 2.0,
    "start_times": [10.5, 10.0, 11.0],
    "input_lens": [100, 200, 300],
    "output_lens": [3, 0, 2],
    "ttfts": [0.5, 0.0, 0.25],
    "itls": [[0.1, 0.2], [], [0.3]],
    "errors": ["", "Traceback:\n  File\nTimeoutError: late\n", ""],
}


def test_results_of_bench_serve_become_samples() -> None:
    first, failed, short = samples(RESULT, [3, 4, 4])
    assert first == Sample(0.5, 100, 3, 0.5, [0.1, 0.2])
    assert (failed.start, failed.error) == (0.0, "TimeoutError: late")
    assert short.error == "2 of 4 tokens"


def test_bodies_for_aiperf_have_the_tokens_of_the_lines() -> None:
    sent = lines(scenario().traffic, 0)
    made = [json.loads(line) for line in aiperf.bodies(sent, CHUNK, range(50, 60), "m", 0)]
    prompts = [line["payload"]["prompt"] for line in made]
    assert [len(prompt) for prompt in prompts] == [line.input_length for line in sent]
    assert {token for prompt in prompts for token in prompt} == set(range(50, 60))
    assert prompts[0][:64] == prompts[2][:64] != prompts[1][:64]
    assert prompts[0][64:] != prompts[2][64:]
    assert [line["payload"]["max_tokens"] for line in made] == [8] * 4
    assert aiperf.bodies(sent, CHUNK, range(50, 60), "m", 1) != aiperf.bodies(
        sent, CHUNK, range(50, 60), "m", 0
    )


def record_of_aiperf(number: int, start: int, error: dict | None = None, **metrics) -> str:
    metadata = {"conversation_id": str(number), "request_start_ns": start}
    metadata["request_end_ns"] = start + 1_000_000_000
    values = {name: {"value": value, "unit": ""} for name, value in metrics.items()}
    record = {"metadata": metadata, "metrics": values}
    return json.dumps(record | {"error": error} if error else record)


def test_records_of_aiperf_become_samples() -> None:
    sent = lines(scenario().traffic, 0)
    whole = {"input_sequence_length": 70, "time_to_first_token": 500.0}
    whole |= {"output_sequence_length": 8, "inter_chunk_latency": [100.0, 200.0]}
    records = [
        record_of_aiperf(2, 2_000_000_000, **{**whole, "output_sequence_length": 4}),
        record_of_aiperf(0, 1_500_000_000, **whole),
        record_of_aiperf(1, 1_000_000_000, {"message": "late\nTimeoutError: late\n"}),
    ]
    (first, failed, short, lost), seconds = aiperf.samples(records, sent)
    assert first == Sample(0.5, 70, 8, 0.5, [0.1, 0.2])
    assert (failed.start, failed.error) == (0.0, "TimeoutError: late")
    assert short.error == "4 of 8 tokens"
    assert lost.error == "aiperf has no record of it"
    assert seconds == 2.0


# Reconciliation

LAYERS = Layers({TokenBudget(16): 3, TokenBudget(40): 1}, query_heads=2)


def test_expected_counters_of_one_request_by_hand() -> None:
    """Prompt of 14, 5 tokens: rows with 15, 16, 17 and 18 tokens of context, in four layers."""
    assert expected(LAYERS, [(14, 5)]) == {
        SPARSE: 3 * 2,
        DENSE: 3 * 2 + 4,
        CONTEXT: 2 * 4 * (15 + 16 + 17 + 18),
        ATTENDED: 2 * (3 * (15 + 16 + 16 + 16) + (15 + 16 + 17 + 18)),
    }


def moved(**changes: int) -> dict[str, float]:
    """Counters after two requests, and what else moved them."""
    found = {REQUESTS: 2, PROMPTS: 34, OUTPUTS: 8, PREEMPTIONS: 0}
    found |= expected(LAYERS, [(14, 5), (20, 3)])
    names = {"sparse": SPARSE, "dense": DENSE, "context": CONTEXT, "attended": ATTENDED}
    names |= {"requests": REQUESTS, "prompts": PROMPTS, "outputs": OUTPUTS}
    names |= {"preempted": PREEMPTIONS, "drafts": DRAFTS}
    for name, value in changes.items():
        found[names[name]] = found.get(names[name], 0) + value
    return found


def disagreeing(counters: dict[str, float], layers=LAYERS) -> list[str]:
    rows, _ = reconcile([(14, 5), (20, 3)], counters, layers)
    return [row.counter for row in rows if not row.agrees]


def test_counters_that_agree() -> None:
    rows, remarks = reconcile([(14, 5), (20, 3)], moved(), LAYERS)
    assert all(row.agrees and row.low == row.high for row in rows)
    assert (len(rows), remarks) == (7, [])
    assert len(reconcile([(14, 5), (20, 3)], moved(), None)[0]) == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"requests": 1}, [REQUESTS]),
        ({"prompts": -1}, [PROMPTS]),
        ({"outputs": 1}, [OUTPUTS]),
        ({"context": 1}, [CONTEXT]),
        ({"attended": -1}, [ATTENDED]),
        ({"sparse": 1, "dense": -1}, [SPARSE, DENSE]),
        ({"sparse": -4}, [SPARSE]),
        ({"dense": 400}, [DENSE]),
        ({"preempted": 1, "outputs": 1}, [OUTPUTS]),
        ({"preempted": 1, "sparse": -5}, [SPARSE]),
    ],
)
def test_counters_that_disagree_are_named(changes: dict, named: list[str]) -> None:
    assert disagreeing(moved(**changes)) == named


def test_a_counter_that_is_not_exported_disagrees() -> None:
    assert disagreeing({}, layers=None) == [REQUESTS, PROMPTS, OUTPUTS]


def test_what_requests_do_not_show_widens_what_agrees() -> None:
    lost = expected(LAYERS, [(17, 2)])  # the row with 18 tokens of context
    preempted = {"sparse": -lost[SPARSE], "dense": -lost[DENSE], "context": -lost[CONTEXT]}
    assert disagreeing(moved(preempted=1, attended=-lost[ATTENDED], **preempted)) == []
    alone = {"dense": 4, "context": 2 * 4 * 14, "attended": 2 * 4 * 14}
    assert disagreeing(moved(**alone)) == []
    _, remarks = reconcile([(14, 5), (20, 3)], moved(preempted=1, drafts=3), LAYERS)
    assert [remark.partition(":")[0] for remark in remarks] == [
        "1 requests were preempted",
        "speculative decoding",
    ]


def test_sparse_layers_of_a_model() -> None:
    model = {"num_hidden_layers": 4, "num_attention_heads": 2}
    config = AdamasConfig.parse(
        {"token_budget": 16, "num_dense_layers": 1, "layer_budgets": {"2": 40}}
    )
    assert Layers.of(model, config) == Layers({TokenBudget(16, 64): 2, TokenBudget(40, 64): 1}, 2)
    kinds = ["full_attention", "sliding_attention"] * 2
    assert Layers.of({**model, "layer_types": kinds}, config).budgets == {TokenBudget(40, 64): 1}
    with pytest.raises(ValueError, match="sliding window"):
        Layers.of({**model, "sliding_window": 512}, config)


def test_options_in_force_are_read_from_the_metrics() -> None:
    from vllm_adamas.serving.export import options

    config = AdamasConfig.parse({"token_budget": 0.5, "layer_budgets": {"0": 96}}).resolved()
    labels = ",".join(f"{name}={json.dumps(value)}" for name, value in options(config).items())
    text = f'vllm:adamas_config_info{{model_name="m",{labels}}} 1.0\n'
    assert options_in_force(text).model_dump() == config.model_dump()
    with pytest.raises(ValueError, match="options of 0 engines"):
        options_in_force("")


# Records and reports


def outcome(slower: float = 1.0, **changes) -> Outcome:
    made = Outcome(
        seconds=2.0 * slower,
        samples=[sample(1.0 * slower, 0.2 * slower, prompt=14), sample(2.0 * slower, prompt=20)],
        others=[(8, 1)],
        moved={REQUESTS: 3, PROMPTS: 42, OUTPUTS: 4},
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def results(**changes) -> Results:
    from vllm_adamas.environment import Environment

    facts = {"name": "mine", "model": "small", "options": {}, "scale": 0.5, "load": 1.0}
    facts["client"] = "vllm"
    facts["environment"] = Environment.capture().record()
    made = Results(facts, scenario(), "cpu_attn")
    layers = Layers({TokenBudget(16): 3}, 2)
    for _ in range(2):
        counters = {**outcome().moved, **expected(layers, [(14, 2), (20, 1)])}
        made.add("adamas", outcome(**{"moved": counters, **changes}), layers)
        made.add("cpu_attn", outcome(slower=2.0), None)
    return made


def test_a_record_has_ratios_with_their_spread() -> None:
    record = results().record()
    assert (record["ok"], record["problems"]) == (True, [])
    assert record["ratios"]["ttft"] == {"median": 2, "q1": 2, "q3": 2, "n": 4}
    assert record["ratios"]["tpot"] == {"median": 2, "q1": 2, "q3": 2, "n": 2}
    assert record["ratios"]["output_tokens_per_s"] == {"median": 2, "q1": 2, "q3": 2, "n": 2}
    ours = record["backends"]["adamas"]
    assert (ours["requests"], ours["errors"], ours["good"], ours["good_per_s"]) == (4, 0, 4, 1.0)
    assert ours["ttft_ms"] == {"n": 4, "p50": 1000.0, "p90": 2000.0, "p99": 2000.0}
    assert ours["itl_ms"]["n"] == 2
    assert [run["backend"] for run in record["runs"]] == ["adamas", "cpu_attn"] * 2


def test_failed_requests_are_problems_and_count_for_nothing_else() -> None:
    failed = [sample(1.0, 0.2, prompt=14), sample(0.0, prompt=20, error="HTTP 500: dead")]
    record = results(samples=failed).record()
    assert record["ok"] is False
    assert record["problems"] == [f"adamas, repeat {n}: 1 x HTTP 500: dead" for n in (1, 2)]
    ours = record["backends"]["adamas"]
    assert (ours["requests"], ours["errors"], ours["good"], ours["ttft_ms"]["n"]) == (4, 2, 2, 2)
    assert record["ratios"]["ttft"]["n"] == 2
    assert record["runs"][0]["reconciled"] == []
    assert "failed requests" in record["runs"][0]["remarks"][0]


def test_counters_that_disagree_are_problems() -> None:
    record = results(others=[(9, 1)]).record()
    assert len(record["problems"]) == 2
    assert f"{PROMPTS} is 42, and the requests add 43" in record["problems"][0]


class Tags(HTMLParser):
    """The tags of a document, those left open, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "circle"):
            assert self.open.pop() == tag


def test_a_report_is_made_from_a_record_alone() -> None:
    record = json.loads(json.dumps(results().record(), allow_nan=False))
    text, page = as_markdown(record), as_html(record)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["TTFT p50 ms", "1,000.0", "2,000.0"] in cells
    assert ["TTFT", "2.00", "2.00", "2.00", "4"] in cells
    assert ["requests within objectives", "100 %", "100 %"] in cells
    assert ["cpu_attn", "1", PROMPTS, "42", "42", "agrees"] in cells
    assert "## Problems" not in text
    tags = Tags(page)
    assert (tags.open, tags.loaded) == ([], [])
    assert tags.seen.count("svg") == 3
    assert "http" not in page.replace("http_", "")


def test_a_report_shows_problems_and_escapes_them() -> None:
    record = results(problems=["first <b>503</b> |\n\x1b[31m![x](//y)"]).record()
    text = as_markdown(record)
    assert "## Problems" in text
    assert "| adamas, repeat 1: first &lt;b&gt;503&lt;/b&gt; \\|  [31m![x]\\(//y) |" in text
    assert "&lt;b&gt;503&lt;/b&gt;" in as_html(record)


def test_the_recorded_report_is_that_of_its_record() -> None:
    name = ROOT / "benchmarks" / "results" / "loadtest_cpu"
    record = json.loads(name.with_suffix(".json").read_text())
    assert as_markdown(record) == name.with_suffix(".md").read_text()
    assert as_html(record) == name.with_suffix(".html").read_text()


def test_what_ended_a_run_early_is_a_problem() -> None:
    made = results()
    made.ended = "The server ended with status -9"
    assert made.record()["problems"] == [made.ended]
    nothing = Results(made.facts, scenario(), "cpu_attn", ended=made.ended).record()
    assert made.ended in as_markdown(nothing)
    assert Tags(as_html(nothing)).open == []


STORM = {
    "requests": {"edge": 30, "burst": 12},
    "errors": {"edge": {"HTTP 500": 2}},
    "restarts": 0,
    "checks": {"replayed": {"wrong": 0, "compared": 70}},
    "memory_mib": {"warm": {"rss": 100.0}, "end": {"rss": 130.0}},
    "ttft_ms": {"p50": 20.0, "p99": 90.0, "max": 99.0},
    "itl_ms": {},
}


def test_a_soak_has_its_own_table() -> None:
    soak = load("soak")
    made = Results(results().facts, soak, "cpu_attn")
    counters = {SPARSE: 10, CONTEXT: 400, ATTENDED: 100}
    made.add(
        "adamas", Outcome(9.0, moved=counters, storm=STORM, problems=["edge: 2 x HTTP 500"]), None
    )
    record = made.record()
    assert record["problems"] == ["adamas, repeat 1: edge: 2 x HTTP 500"]
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in as_markdown(record).splitlines()
    ]
    row = ["adamas", "1", "42", "2", "0", "0", "70", "20.0 / 90.0", "/", "30"]
    assert row in cells
    assert ["adamas", "1", "attended / context", "", "0.250", ""] in cells


@pytest.mark.parametrize(
    ("largest", "found"),
    [(0, [0, 1]), (1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (37, [0, 10, 20, 30, 40]), (7000, None)],
)
def test_ticks_are_round_and_reach_the_largest(largest: float, found: list | None) -> None:
    made = ticks(largest)
    assert found is None or made == pytest.approx(found)
    assert made[0] == 0 and made[-1] >= largest
    assert 2 <= len(made) <= 8


def test_a_chart_places_its_points() -> None:
    svg = chart("T", "x", "y", {"a": [(0, 0), (10, 5)]})
    places = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert places == [("58.0", "236.0"), ("408.0", "34.0")]
    assert shares([3.0, 1.0]) == [(1.0, 50.0), (3.0, 100.0)]


# Whole runs against servers

SMALL = "--dtype float32 --enforce-eager --block-size 32 --max-model-len 1024 --max-num-seqs 4"
OPTIONS = {"token_budget": 64}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = random_llama(tmp_path_factory.mktemp("llama"))
    shutil.copy(MODEL / "chat_template.jinja", folder)  # a storm chats
    return folder


@pytest.fixture(scope="module")
def unserved(tmp_path_factory) -> Path:
    """The same in another folder, whose processes are those of a load test alone."""
    return random_llama(tmp_path_factory.mktemp("unserved"))


@dataclass(frozen=True)
class Spec:
    """A server of the random Llama."""

    model: Path
    args: str = ""

    def arguments(self) -> tuple:
        return self.model, "adamas", OPTIONS, [*SMALL.split(), *self.args.split()]


def drive(server: Server, scenario: Scenario, folder: Path) -> Outcome:
    return asyncio.run(Run(scenario, server, "adamas-1", folder, 0, 300.0).drive())


def agrees(server: Server, outcome: Outcome) -> None:
    """All requests were answered, and the server's counters are those of the requests."""
    assert [one.error for one in outcome.samples if one.error] == []
    model = json.loads((Path(server.model) / "config.json").read_text())
    layers = Layers.of(model, options_in_force(server.get("/metrics")))
    sent = [(one.prompt_tokens, one.output_tokens) for one in outcome.samples]
    rows, remarks = reconcile([*sent, *outcome.others], outcome.moved, layers)
    assert remarks == []
    assert [asdict(row) for row in rows if not row.agrees] == []
    assert outcome.moved[SPARSE] > 0 and outcome.moved[DENSE] > 0


@pytest.mark.serve
@pytest.mark.slow
def test_a_soak_is_a_storm(serve, llama, tmp_path) -> None:
    sizes = {"prompt_tokens": 200, "output_tokens": 16, "burst": 4, "concurrency": 4}
    soak = {"kind": "soak", "requests": 40, "check": 5, "growth_mib": 4096, **sizes}
    test = Scenario.model_validate({"description": "A soak.", "traffic": soak})
    found = drive(serve(Spec(llama)), test, tmp_path)
    assert found.problems == []
    assert sum(found.storm["requests"].values()) >= 40
    assert found.storm["checks"]["replayed"]["compared"] > 0
    assert str(llama) not in json.dumps(found.storm)
    made = Results(results().facts, test, "cpu_attn")
    made.add("adamas", found, None)
    assert "## Soak" in as_markdown(json.loads(json.dumps(made.record(), allow_nan=False)))


@pytest.mark.serve
@pytest.mark.parametrize("args", ["", pytest.param("--api-server-count 2", marks=pytest.mark.slow)])
def test_counters_reconcile_with_what_was_sent(serve, llama, tmp_path, args: str) -> None:
    """Under `vllm bench serve`, under agents, and with several API servers."""
    server = serve(Spec(llama, args))
    asked = drive(server, scenario(), tmp_path)
    assert [one.prompt_tokens // 64 for one in asked.samples] == [1, 5, 1, 5]
    agrees(server, asked)
    grown = drive(server, scenario(AGENTS), tmp_path)
    for turns in (grown.samples[:3], grown.samples[3:]):
        lengths = [one.prompt_tokens for one in turns]
        assert 100 <= lengths[0] <= 140
        assert all(24 <= b - a <= 48 for a, b in itertools.pairwise(lengths))
    agrees(server, grown)
    assert [file.name for file in tmp_path.iterdir()] == ["adamas-1.client.log"]


@pytest.mark.serve
@pytest.mark.slow
def test_a_load_test_of_both_backends(llama, tmp_path, capsys) -> None:
    output = tmp_path / "output"
    command = ["loadtest", written(tmp_path, DOCUMENTS), str(llama), "--output", str(output)]
    command += ["--config", json.dumps(OPTIONS), "--repeats", "2", "--", *SMALL.split()]
    status = main(command)
    record = json.loads((output / "record.json").read_text())
    assert (status, record["problems"]) == (0, []), capsys.readouterr()
    assert [run["backend"] for run in record["runs"]] == ["adamas", "cpu_attn"] * 2
    assert [len(run["requests"]) for run in record["runs"]] == [4] * 4
    assert all(row["agrees"] for run in record["runs"] for row in run["reconciled"])
    assert record["ratios"]["ttft"]["n"] == 8
    assert Tags((output / "report.html").read_text()).open == []
    assert "Problems" not in (output / "report.md").read_text()


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("aiperf") is None, reason="aiperf is not installed")
@pytest.mark.parametrize("pace", [{}, {"rate": 20.0}, {"rate": 20.0, "concurrency": None}])
def test_counters_reconcile_with_what_aiperf_sent(serve, llama, tmp_path, pace: dict) -> None:
    """Prompts have their lengths, answers too, and no more than `concurrency` requests are in flight."""
    server = serve(Spec(llama))
    test = scenario(output_tokens=24, **pace)
    run = Run(test, server, "adamas-1", tmp_path, 0, 300.0, shutil.which("aiperf"))
    found = asyncio.run(run.drive())
    agrees(server, found)
    sent = lines(test.traffic, 0)
    assert [one.prompt_tokens for one in found.samples] == [line.input_length for line in sent]
    assert [file.name for file in tmp_path.iterdir()] == ["adamas-1.client.log"]
    flying = [
        sum(one.start <= at.start < one.start + one.e2e for one in found.samples)
        for at in found.samples
    ]
    assert max(flying) <= (test.traffic.concurrency or 4)


def processes_of(model: Path) -> dict[int, list[bytes]]:
    """Command lines of servers of a model and of their clients: they name its folder."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if entry.name.isdigit() and b"serve" in words and str(model).encode() in words:
            found[int(entry.name)] = words
    return found


def servers_of(model: Path) -> list[int]:
    found = processes_of(model).items()
    return [pid for pid, words in found if words[words.index(b"serve") + 1] == str(model).encode()]


@contextmanager
def started(model: Path, tmp_path: Path, wait_for: str) -> Iterator[subprocess.Popen]:
    """A load test as a command, once a line of its progress is there; it ends with the context."""
    long = {**DOCUMENTS["traffic"], "questions": 200, "output_tokens": 300}
    file = written(tmp_path, {**DOCUMENTS, "traffic": long})
    command = [sys.executable, "-m", "vllm_adamas.cli", "loadtest", file, str(model)]
    command += ["--output", str(tmp_path / "output"), "--", *SMALL.split()]
    with (tmp_path / "stderr").open("wb") as errors:
        process = subprocess.Popen(command, stderr=errors, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while wait_for not in (tmp_path / "stderr").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sign", "when"), [(signal.SIGINT, "under way"), (signal.SIGTERM, "starting")]
)
def test_an_interrupt_leaves_no_server(unserved, tmp_path, sign: int, when: str) -> None:
    with started(unserved, tmp_path, when) as process:
        deadline = time.monotonic() + 60
        while not processes_of(unserved) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_of(unserved)
        process.send_signal(sign)
        assert process.wait(60) == 130
    assert processes_of(unserved) == {}
    record = json.loads((tmp_path / "output" / "record.json").read_text())
    assert record["problems"] == ["interrupted; no server is left"]


@pytest.mark.serve
@pytest.mark.slow
def test_a_server_that_dies_ends_the_run_with_its_log(unserved, tmp_path) -> None:
    with started(unserved, tmp_path, "under way") as process:
        (server,) = servers_of(unserved)
        os.killpg(server, signal.SIGKILL)
        assert process.wait(60) == 1
    text = (tmp_path / "stderr").read_text()
    assert "The server ended with status -9. The end of" in text
    record = json.loads((tmp_path / "output" / "record.json").read_text())
    assert record["problems"] == ["The server ended with status -9"]
    assert "Using ADAMAS" in text or "POST /v1/completions" in text
