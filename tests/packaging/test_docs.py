"""What the documents claim comes from files that a benchmark wrote, and what they name is there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common import ROOT

README = ROOT / "README.md"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
over_documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)

FOLDERS = "backends benchmarks csrc docs scripts serving tests vllm_adamas"
SOURCE = re.compile(rf"`((?:{'|'.join(FOLDERS.split())})/[\w./*-]+)`")
GENERATED = re.compile(r"<!-- results: begin.*?<!-- results: end -->", re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The headings of a document as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize(
    "script",
    ["update_readme", "update_kernels", "update_quality", "update_support", "update_audit"],
)
def test_figures_are_those_of_the_result_files(script):
    command = [sys.executable, f"benchmarks/{script}.py", "--check"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0, f"run benchmarks/{script}.py"


@over_documents
def test_relative_links_lead_to_files(document):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


@over_documents
def test_links_lead_to_headings(document):
    links = re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", document.read_text())
    missing = [
        (path, heading)
        for path, heading in links
        if heading not in anchors(document.parent / path if path else document)
    ]
    assert not missing


@over_documents
def test_source_files_that_are_named_exist(document):
    named = SOURCE.findall(document.read_text())
    assert [path for path in named if not list(ROOT.glob(path.rstrip("/")))] == []


def test_every_option_is_documented():
    from vllm_adamas.config import AdamasConfig

    table = README.read_text()
    assert [name for name in AdamasConfig.model_fields if f"| `{name}` |" not in table] == []


def test_ratios_in_the_readme_are_measured():
    """Those of its sentences stand in a table of some document, which a script wrote."""
    tables = "".join("".join(GENERATED.findall(path.read_text())) for path in DOCUMENTS)
    claimed = re.findall(r"\b\d+\.\d+x", GENERATED.sub("", README.read_text()))
    assert claimed
    assert [ratio for ratio in claimed if ratio not in tables] == []


def test_the_loss_in_the_readme_is_measured():
    from vllm_adamas.evaluate.report import summary

    results = ROOT / "benchmarks" / "results"
    served, summed = (
        json.loads((results / f"quality_SmolLM2-135M-Instruct{study}.json").read_text())
        for study in ("-default", "")
    )
    text = " ".join(README.read_text().split())
    mean, low, high = next(x for x in summary(served) if x["name"] == "default-256")["dnll"]
    cell = served["cells"]["default-256"]["tasks"]["perplexity"]
    scored = len(cell["nll"]) * cell["steps"]
    assert f"it adds {mean:.3f} nats per token" in text
    assert f"95 % interval {low:.3f} to {high:.3f} nats, of {scored:,} scored tokens" in text
    few, many = (
        next(x for x in summary(summed) if x["name"] == name)["dnll"][0]
        for name in ("dot-256", "dot-512")
    )
    assert f"512 tokens add {many:.3f}, where 256 add {few:.3f}." in text


def test_kernel_sources_that_are_named_exist():
    """docs/kernels.md names them without their folders."""
    named = re.findall(
        r"`(?:[\w]+/)?([\w]+\.(?:cuh?|h))`", (ROOT / "docs" / "kernels.md").read_text()
    )
    assert len(named) > 20
    assert [name for name in named if not list((ROOT / "csrc" / "sm90").rglob(name))] == []
