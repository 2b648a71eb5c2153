"""RULER's tasks: what a prompt holds, how long it is, and what an answer is worth."""

import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from common import MODEL, refused

from vllm_adamas.evaluate import ruler, texts
from vllm_adamas.evaluate.ruler import TASKS, Material, samples
from vllm_adamas.evaluate.samples import Sample

NIAH = [task for task in TASKS if task.startswith("niah")]
#: Needles in the text and expected strings, of each task that has needles and other hay.
COUNTS = {
    "niah_single_1": (1, 1),
    "niah_single_2": (1, 1),
    "niah_single_3": (1, 1),
    "niah_multikey_1": (4, 1),
    "niah_multivalue": (4, 4),
    "niah_multiquery": (4, 4),
}
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")
LENGTH = 1500


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Files in the forms of SQuAD and HotpotQA: 120 questions each, on documents of a sentence or two."""
    folder = tmp_path_factory.mktemp("data")

    def asked(n: int) -> dict:
        answers = [{"text": f"Town {n}"}, {"text": f"the town {n}"}]
        return {"question": f"Where does person {n} live?", "answers": answers}

    def told(n: int) -> str:
        return (
            f"Person {n} has lived in Town {n} for as long as anyone in that street can remember. "
            * 3
        )

    articles = [
        {
            "paragraphs": [
                {"context": told(n), "qas": [asked(n), {"question": "Why?", "answers": []}]}
                for n in range(first, first + 4)
            ]
        }
        for first in range(0, 120, 4)
    ]
    (folder / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    hops = [
        {
            "question": f"Which town is the home of the neighbour of person {n}?",
            "answer": f"Town {n}",
            "context": [[f"Person {m}", [told(m)]] for m in (n, (n + 1) % 120)],
        }
        for n in range(120)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(hops))
    return folder


@pytest.fixture(scope="module")
def material(data: Path) -> Material:
    prose = texts.packaged(calibration=False).content
    questions = {
        "qa_1": ruler.squad(str(data / "squad.json")),
        "qa_2": ruler.hotpotqa(str(data / "hotpotqa.json")),
    }
    return Material.of(prose, questions)


def expected(sample: Sample) -> tuple[str, ...]:
    return sample.score.args[0]


def test_there_are_thirteen_tasks() -> None:
    assert len(TASKS) == 13
    assert {task.tokens for task in TASKS.values()} == {128, 30, 120, 50, 32}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [LENGTH, 5000])
def test_prompts_fill_their_length_and_hold_the_answers(
    tokenizer, material: Material, task: str, length: int
) -> None:
    made = samples(tokenizer, task, length, 4, 7, material)
    assert len({sample.digest for sample in made}) == 4
    for sample in made:
        assert 0.85 * length < len(sample.ids) + sample.tokens <= length
        text = tokenizer.decode(sample.ids)
        held = [answer in text for answer in expected(sample)]
        assert held[0] and (all(held) or task.startswith("qa")), (
            "qa has its answer in other words too"
        )
        question = text[text.rindex("\n", 0, text.index("<|im_end|>\n<|im_start|>assistant")) :]
        assert sample.score(question) == 0, "the question gives the answer away"
        assert sample.score(" ".join(expected(sample)).upper()) == 1
        assert sample.score("") == 0


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_a_function_of_the_seed(tokenizer, material: Material, task: str) -> None:
    few, many, other = (
        samples(tokenizer, task, LENGTH, count, seed, material)
        for count, seed in ((2, 1), (3, 1), (2, 2))
    )
    assert [s.ids for s in few] == [s.ids for s in many[:2]]
    assert [s.ids for s in few] != [s.ids for s in other]


@pytest.mark.parametrize("task", NIAH)
def test_needles_are_of_the_published_kinds(
    tokenizer, material: Material, task: str, monkeypatch
) -> None:
    monkeypatch.setattr(ruler, "WORDS", ruler.WORDS[:30])  # so few that keys would meet again
    for sample in samples(tokenizer, task, LENGTH, 3, 0, material):
        text = tokenizer.decode(sample.ids)
        found = NEEDLE.findall(text)
        kinds = {kind for kind, _, _ in found}
        assert kinds == {"uuids" if task in ("niah_single_3", "niah_multikey_3") else "numbers"}
        assert set(expected(sample)) <= {value for _, _, value in found}
        asked = text[
            text.rindex(f"magic {min(kinds)}" if len(expected(sample)) > 1 else "magic ") :
        ]
        told = [value for _, key, value in found if re.search(rf"{key}(?=[, ])", asked)]
        assert sorted(told) == sorted(expected(sample)), (
            "a needle that is not asked for has the same key"
        )
        if task in COUNTS:
            keys = {key for _, key, _ in found}
            assert (len(found), len(expected(sample))) == COUNTS[task]
            assert len(keys) == (1 if task == "niah_multivalue" else len(found))
        else:  # the hay is needles too
            assert len(found) > 10
            assert len(expected(sample)) == 1


def test_needles_lie_anywhere(tokenizer, material: Material) -> None:
    places = []
    for sample in samples(tokenizer, "niah_single_2", LENGTH, 40, 0, material):
        text = tokenizer.decode(sample.ids)
        places.append(text.index(expected(sample)[0]) / len(text))
    assert min(places) < 0.2
    assert max(places) > 0.8


def test_a_chain_leads_from_the_value_to_every_variable(tokenizer, material: Material) -> None:
    for sample in samples(tokenizer, "vt", LENGTH, 3, 0, material):
        text = tokenizer.decode(sample.ids)
        names = expected(sample)
        assert re.search(rf"VAR {names[0]} = \d{{5}}\n", text)
        places = [text.index(f"VAR {b} = VAR {a}") for a, b in pairwise(names)]
        assert places == sorted(places)
        assert len(names) == 5


@pytest.mark.parametrize(("length", "often", "seldom"), [(LENGTH, 6, 1), (5000, 30, 3)])
def test_common_words_are_listed_more_often(
    tokenizer, material: Material, length: int, often: int, seldom: int
) -> None:
    (sample,) = samples(tokenizer, "cwe", length, 1, 0, material)
    text = tokenizer.decode(sample.ids)
    listed = re.findall(r"\d+\. ([a-z]+)", text[text.rindex("numbered list") :])
    counts = {word: listed.count(word) for word in listed}
    assert {word for word, count in counts.items() if count == often} == set(expected(sample))
    assert {count for word, count in counts.items() if word not in expected(sample)} == {seldom}


@pytest.mark.parametrize("length", [400, LENGTH, 5000])
def test_the_expected_coded_words_are_the_most_frequent(
    tokenizer, material: Material, length: int
) -> None:
    for sample in samples(tokenizer, "fwe", length, 4, 0, material):
        words = re.findall(r"\b[a-z]{6}\b|\.\.\.", tokenizer.decode(sample.ids))
        known = [word for word in words if words.count(word) > 1 or word in expected(sample)]
        ranked = sorted(set(known), key=known.count, reverse=True)
        assert ranked[0] == "..."
        assert tuple(ranked[1:4]) == expected(sample)
        assert known.count(ranked[3]) > max([known.count(word) for word in ranked[4:]], default=0)


def test_a_question_keeps_its_documents(tokenizer, material: Material) -> None:
    for task, own in (("qa_1", 1), ("qa_2", 2)):
        for sample in samples(tokenizer, task, LENGTH, 4, 0, material):
            text = tokenizer.decode(sample.ids)
            asked = re.search(r"person (\d+)( live)?\?", text).group(1)
            documents = re.findall(r"Document \d+:\n", text)
            assert len(documents) > own
            assert f"Person {asked} has lived" in text
    assert material.questions["qa_1"][0].answers == ("Town 0", "the town 0")
    assert len(material.questions["qa_1"]) == 120, "questions without an answer are left out"


def test_scores_are_those_of_ruler() -> None:
    every, any_one = (
        Sample([], 1, lambda answer, task=task: TASKS[task].score(("12", "Ab"), answer))
        for task in ("vt", "qa_1")
    )
    assert [every.score(text) for text in ("x", "a 12", "AB12")] == [0, 0.5, 1]
    assert [any_one.score(text) for text in ("x", "a 12", "AB12")] == [0, 1, 1]


def test_an_answer_ends_at_its_strings() -> None:
    sample = Sample([], 1, None, until=("\n", "", "stop"))
    assert sample.cut("one stop two\nthree") == "one "
    assert Sample([], 1, None).cut("one\ntwo") == "one\ntwo"


def test_lengths_that_do_not_fit_are_refused(tokenizer, material: Material) -> None:
    refused(lambda: samples(tokenizer, "cwe", 400, 1, 0, material), "cwe", "400", "--lengths")
    refused(
        lambda: samples(tokenizer, "qa_1", 40_000, 1, 0, material), "qa_1", "40000", "data file"
    )
    refused(lambda: samples(tokenizer, "cwe", 80_000, 1, 0, material), "cwe", "80000", "--text")


def test_data_that_are_something_else_are_refused(tmp_path: Path, data: Path) -> None:
    squad, hotpot = str(data / "squad.json"), str(data / "hotpotqa.json")
    (tmp_path / "text").write_text("no JSON")
    (tmp_path / "empty").write_text('{"data": []}')
    for path in (hotpot, str(tmp_path / "text"), str(tmp_path / "empty")):
        refused(lambda path=path: ruler.squad(path), "--squad", path, "dev-v2.0.json")
    for path in (squad, str(tmp_path / "text")):
        refused(lambda path=path: ruler.hotpotqa(path), "--hotpotqa", path, "hotpot_dev")
    refused(lambda: ruler.squad(str(tmp_path / "none")), "--squad", "cannot be read")


def test_a_tokenizer_without_a_template_gets_plain_text(material: Material) -> None:
    def tokens(text: str, verbose: bool = True):
        return SimpleNamespace(input_ids=[*text.encode()])

    tokens.chat_template = None
    (sample,) = samples(tokens, "niah_single_1", 3000, 1, 0, material)
    text = bytes(sample.ids).decode()
    assert text.startswith("Special magic numbers")
    assert text.endswith("in the text above is")
