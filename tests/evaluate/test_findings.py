"""What a suite's answers show, and the page that shows it."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import pytest
from common import ROOT, refused

from vllm_adamas import page
from vllm_adamas.evaluate import findings, suites
from vllm_adamas.evaluate.findings import OF_DIFFERENCES, OF_SCORES, Estimate
from vllm_adamas.page import Chart, Point, Record, Table

# intervals


@pytest.mark.parametrize(("pairs", "better", "worse"), [(40, 3, 10), (8, 0, 0), (100, 0, 1)])
def test_differences_have_the_interval_of_agresti_and_min(
    pairs: int, better: int, worse: int
) -> None:
    """Half a pair is added to each cell: their formula for matched pairs with b and c discordant ones."""
    values = [1.0] * worse + [-1.0] * better + [0.0] * (pairs - worse - better)
    found = Estimate.of(values, OF_DIFFERENCES)
    b, c, n = worse + 0.5, better + 0.5, pairs + 2
    half = 1.96 * math.sqrt((b + c) - (b - c) ** 2 / n) / n
    assert found.mean == (worse - better) / pairs
    assert found.low == pytest.approx((b - c) / n - half)
    assert found.high == pytest.approx((b - c) / n + half)
    assert found.samples == pairs


def test_scores_have_the_interval_of_agresti_and_coull() -> None:
    found = Estimate.of([1.0] * 7 + [0.0] * 3, OF_SCORES)
    p, n = 9 / 14, 14
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert found[:3] == pytest.approx((0.7, p - half, p + half))
    assert Estimate.of([1.0], OF_SCORES).high == 1.0
    assert Estimate.of([1.0], OF_SCORES).low < 0.5, "one answer shows next to nothing"


def test_intervals_cover_the_truth() -> None:
    """In most of 400 experiments each: 12 pairs of shares, where dense is better by 0.1 or by nothing."""
    rng = Random(0)
    for truth in (0.0, 0.1):
        hits = 0
        for _ in range(400):
            pairs = [rng.choice((0, 0.5, 1)) - rng.choice((0, 0.5, 1)) for _ in range(12)]
            shifted = [pair + truth for pair in pairs]
            found = Estimate.of(shifted, OF_DIFFERENCES)
            hits += found.low <= truth <= found.high
        assert hits >= 370


# verdicts

HEAD = {
    "settings": {"suite": "ruler", "model": "m", "seed": 0, "dtype": "auto", "steps": 4}
    | {"texts": {"a.txt": "00"}},
    "environment": {"gpu": "x", "versions": {"vllm-adamas": "1"}, "date": "d"},
}


def ledger(path: Path, answers: list[dict], budgets=(64, 128, 256), **settings) -> Path:
    head = {"format": suites.FORMAT, "version": suites.VERSION, **HEAD}
    head["settings"] = HEAD["settings"] | settings
    arms = [
        {"configuration": f"default-{b}", "family": "default", "budget": b, "options": {}}
        for b in budgets
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in [head, *arms, *answers]))
    return path


def answers(arm: str, scores: list[float], task: str = "vt", length: int = 100) -> list[dict]:
    return [
        {"task": task, "length": length, "arm": arm, "sample": n, "prompt": "0", "score": score}
        for n, score in enumerate(scores)
    ]


def verdict(tmp_path: Path, bound: float = 0.02, **lines) -> Record:
    found = [
        line for name, scores in lines.items() for line in answers(name.replace("_", "-"), scores)
    ]
    return findings.record(ledger(tmp_path / "r.jsonl", found), {}, bound)


GOOD, BAD = [1.0] * 150, [0.0] * 15 + [1.0] * 135


def test_the_smallest_budget_that_loses_nothing_is_named(tmp_path: Path) -> None:
    made = verdict(tmp_path, dense=GOOD, default_64=BAD, default_128=GOOD, default_256=GOOD)
    (said,) = made.findings
    assert said.startswith(
        "default-128 loses nothing measurable: 0.0 points [-1.3, +1.3] over 150 prompts at 100 tokens"
    )
    assert any("below 2 points" in note for note in made.notes)
    (table,) = made.tables
    assert table.headers == ["task", "samples", "dense", "default-64", "default-128", "default-256"]
    assert table.rows[0][:4] == ["vt", "150", "100.0 [96.9, 100.0]", "90.0 [-14.8, -5.0]"]
    assert table.rows[1][0] == "mean of 1 tasks"
    assert made.values["vt at 100"]["default-64"]["loss"]["mean"] == pytest.approx(0.1)
    assert [point.y for point in made.charts[0].lines["default, 100 tokens"]] == [10, 0, 0]


def test_a_budget_does_not_pass_where_a_larger_one_fails(tmp_path: Path) -> None:
    made = verdict(tmp_path, dense=GOOD, default_64=GOOD, default_128=BAD, default_256=BAD)
    assert made.findings[0].startswith("No budget of default is shown to lose nothing")
    assert "default-256 loses 10.0 points" in made.findings[0]


def test_a_mean_of_zero_shows_nothing_where_the_interval_is_wide(tmp_path: Path) -> None:
    """As many answers are better as are worse; the same mean with equal answers passes."""
    swapped = [1.0] * 10 + [0.0] * 10 + [1.0] * 130
    dense = [0.0] * 10 + [1.0] * 140
    made = verdict(tmp_path, dense=dense, default_64=swapped)
    assert made.values["vt at 100"]["default-64"]["loss"]["mean"] == 0
    assert made.findings == [
        "No budget of default is shown to lose nothing: default-64 loses 0.0 points [-5.9, +5.9] over 150 prompts "
        "at 100 tokens, an interval that more --prompts would narrow."
    ]
    assert verdict(tmp_path, dense=dense, default_64=dense).findings[0].startswith("default-64 ")


def test_a_small_loss_that_is_certain_does_not_pass(tmp_path: Path) -> None:
    """Below the bound, but the interval does not reach zero."""
    small = [0.99] * 1000
    made = verdict(tmp_path, dense=[1.0] * 1000, default_64=small)
    lost = made.values["vt at 100"]["default-64"]["loss"]
    assert 0 < lost["low"] < lost["high"] < 0.02
    assert made.findings[0].startswith("No budget of default is shown to lose nothing")


def test_a_loss_at_one_length_or_in_one_task_counts(tmp_path: Path) -> None:
    """Though it disappears in the mean of all."""

    def told(lost: dict[tuple, list[float]], of_dense: dict[tuple, list[float]]) -> list[str]:
        lines = []
        for task, length in [(t, n) for t in ("vt", "cwe", "fwe", "qa_1", "qa_2") for n in (1, 2)]:
            lines += answers("dense", of_dense.get((task, length), GOOD), task, length)
            lines += answers("default-64", lost.get((task, length), GOOD), task, length)
        return findings.record(ledger(tmp_path / "r.jsonl", lines), {}, 0.02).findings

    assert told({}, {}) == [
        "default-64 loses nothing measurable: 0.0 points [-0.3, +0.3] over 750 prompts at 1 tokens, "
        "0.0 points [-0.3, +0.3] over 750 prompts at 2 tokens."
    ]
    (said,) = told({("vt", 2): BAD, ("cwe", 2): BAD}, {})
    assert said.endswith("default-64 loses 4.0 points [+2.6, +5.4] over 750 prompts at 2 tokens.")
    (said,) = told({("vt", 2): BAD}, {("cwe", 2): BAD})
    assert said.endswith("loses 10.0 points [+5.0, +14.8] over 150 prompts of vt at 2 tokens.")


def test_a_budget_without_answers_to_a_task_is_not_judged_by_the_others(tmp_path: Path) -> None:
    lines = [*answers("dense", GOOD), *answers("dense", GOOD, "cwe")]
    lines += [*answers("default-64", GOOD), *answers("default-64", GOOD, "cwe")]
    lines += answers("default-128", GOOD)
    made = findings.record(ledger(tmp_path / "r.jsonl", lines), {}, 0.02)
    assert made.findings[0].endswith("default-128 has no answers to cwe at 100 tokens.")
    (table,) = made.tables
    assert table.headers[3:] == ["default-64", "default-128"], "256 was never asked"


def test_dense_answers_alone_show_nothing_yet(tmp_path: Path) -> None:
    """A run that was killed left the answers of dense to a task that is not asked again."""
    lines = [*answers("dense", GOOD), *answers("default-64", GOOD), *answers("dense", GOOD, "cwe")]
    made = findings.record(ledger(tmp_path / "r.jsonl", lines), {}, 0.02)
    assert made.findings[0].startswith("default-64 loses nothing measurable")


def test_few_samples_show_nothing(tmp_path: Path) -> None:
    """Though no answer differs: the interval of five pairs is wider than the bound."""
    made = verdict(tmp_path, dense=GOOD[:5], default_64=GOOD[:5])
    assert made.findings[0].startswith("No budget of default is shown to lose nothing")
    assert (
        verdict(tmp_path, 0.5, dense=GOOD[:5], default_64=GOOD[:5])
        .findings[0]
        .startswith("default-64 loses nothing")
    )


def test_where_dense_fails_there_is_nothing_to_lose(tmp_path: Path) -> None:
    none = [0.0] * 150
    made = verdict(tmp_path, dense=none, default_64=none)
    assert made.findings[0].startswith("No budget is shown to lose nothing: dense itself")
    lines = [*answers("dense", GOOD), *answers("default-64", GOOD)]
    lines += [*answers("dense", none, "cwe"), *answers("default-64", none, "cwe")]
    made = findings.record(ledger(tmp_path / "r.jsonl", lines), {"qa_1": "why"}, 0.02)
    assert "over 150 prompts" in made.findings[0], "cwe does not count"
    assert made.findings[1].endswith("cwe at 100.")
    assert made.notes[-1] == "Left out: qa_1, because why."
    assert [row[0] for row in made.tables[0].rows] == ["vt", "cwe", "mean of 2 tasks"]


def test_published_averages_stand_beside_those_of_the_model(tmp_path: Path) -> None:
    lines = [*answers("dense", GOOD, length=8192), *answers("default-64", GOOD, length=8192)]
    path = ledger(tmp_path / "r.jsonl", lines, model="Meta-Llama-3.1-8B-Instruct")
    *_, table = findings.record(path, {}, 0.02).tables
    assert table.rows == [["8192", "93.8"]]
    assert "NVIDIA/RULER" in table.title
    assert len(findings.record(ledger(path, lines), {}, 0.02).tables) == 1


def test_agreement_counts_tokens(tmp_path: Path) -> None:
    def told(arm: str, *tokens: list[int]) -> list[dict]:
        lines = answers(arm, [0] * len(tokens), "agreement")
        return [{**line, "tokens": ids} for line, ids in zip(lines, tokens, strict=True)]

    lines = told("dense", [1, 2, 3, 4], [5, 6, 7, 8])
    lines += told("default-64", [1, 2, 0, 4], [5, 6, 7, 8]) + told(
        "whole context", [1, 2, 3, 4], [5, 6, 7, 8]
    )
    path = ledger(tmp_path / "r.jsonl", lines, suite="agreement")
    made = findings.record(path, {}, 0.02)
    names = [row[0] for row in made.tables[0].rows]
    assert names == ["default-64", "whole context"]
    assert made.tables[0].rows[0][1:] == [
        "100",
        "2",
        "3.0 [2.0, 4.0]",
        "3",
        "87.5 [75.0, 100.0]",
        "1",
    ]
    assert made.tables[0].rows[1][-1] == "2"


# the page

RECORD = Record(
    title="speed <fast>",
    model="m",
    setting="x & y",
    findings=["It is <b>fast</b>."],
    tables=[Table(title="T", headers=["a", "b"], rows=[["r<1>", "2"], ["r2", "3"]])],
    charts=[
        Chart(
            title="C",
            x="tokens",
            lines={"l1": [Point(x=64, y=1, low=0, high=2), Point(x=128, y=-1, low=-3, high=0)]},
        )
    ],
    notes=["n"],
    values={"a": 1},
)


class Tags(HTMLParser):
    """Checks that tags close, and gathers attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name) for name, _ in attrs]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name) for name, _ in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_no_other_file_and_escapes_what_it_shows() -> None:
    text = page.html([RECORD])
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert not [x for x in tags.attributes if x[1] in ("src", "href", "srcset", "onload")]
    assert not re.search(r"https?:|@import|url\(|<script|<b>", text)
    for shown in ("speed <fast>", "It is <b>fast</b>.", "r<1>", "x & y", "l1", "tokens"):
        assert shown in tags.text
    assert text.count("<circle") == 3, "two points and the legend"


def test_names_and_answers_of_a_model_cannot_change_the_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    lines = [
        {**line, "answer": evil}
        for arm in ("dense", "default-64")
        for line in answers(arm, GOOD, task=evil)
    ]
    path = ledger(tmp_path / "r.jsonl", lines, model=evil, texts={evil: "00"}, dtype=evil)
    record = findings.record(path, {evil: evil}, 0.02)
    text = page.put(record, tmp_path).read_text()
    assert evil not in text
    assert not re.search("<script|<img", text)
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert tags.text.count(evil) >= 5, "it is shown as it is: in title, setting, table and notes"


def test_points_lie_where_they_belong() -> None:
    drawn = page.html([RECORD])
    (first, second, _) = [
        tuple(map(float, at)) for at in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)
    ]
    assert first[0] < second[0]
    assert first[1] < second[1], "the larger value lies higher"
    assert 0 < first[1] < second[1] < page.HEIGHT
    flat = Chart(title="C", x="t", lines={"l": [Point(x=64, y=0, low=0, high=0)]})
    assert "nan" not in page.html([RECORD.model_copy(update={"charts": [flat]})]).lower()


def test_records_come_together_in_one_report(tmp_path: Path) -> None:
    page.put(RECORD, tmp_path)
    other = RECORD.model_copy(update={"title": "bench", "tables": []})
    page.put(other, tmp_path)
    page.put(RECORD.model_copy(update={"findings": ["again"]}), tmp_path)
    assert [record.title for record in page.load(tmp_path / "report.json")] == [
        "speed <fast>",
        "bench",
    ]
    assert page.load(tmp_path / "report.json")[0].findings == ["again"]
    text = (tmp_path / "report.html").read_text()
    assert text.count("<section>") == 2
    refused(
        lambda: page.put(RECORD.model_copy(update={"model": "n"}), tmp_path), "about m", "--output"
    )
    (tmp_path / "report.json").write_text("{}")
    refused(lambda: page.put(RECORD, tmp_path), "report.json", "--output")


def test_a_record_is_printed_too() -> None:
    lines = "\n".join(page.text(RECORD))
    assert all(part in lines for part in ("speed <fast>", "r<1>", "It is <b>fast</b>."))


def test_the_recorded_report_is_that_of_its_record() -> None:
    file = ROOT / "benchmarks" / "results" / "agreement_cpu.json"
    assert page.html(page.load(file)) == file.with_suffix(".html").read_text()
