"""What the documents claim comes from files that a benchmark wrote, and what they name is there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from common import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import docs_site

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
    """The headings of a document as GitHub and the site link to them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return set(map(docs_site.anchor, headings))


@pytest.mark.parametrize(
    "script",
    [
        *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/update_*.py")),
        "scripts/draw_how.py",
    ],
)
def test_what_scripts_write_is_current(script):
    command = [sys.executable, script, "--check"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0, f"run {script}"


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "SECURITY.md"], ids=lambda path: path.name)
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


def pages(entries: list | str | dict) -> list[str]:
    """The pages of a part of the nav, in order."""
    if isinstance(entries, str):
        return [entries]
    inner = entries.values() if isinstance(entries, dict) else entries
    return [page for entry in inner for page in pages(entry)]


def test_the_nav_names_every_page_once():
    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    there |= set(docs_site.PAGES)
    assert sorted(named) == sorted(there), "a page takes a line under nav in mkdocs.yml"


@over_documents
def test_lists_within_lists_are_read_by_both(document):
    """GitHub takes fewer spaces than four, mkdocs does not."""
    assert not re.findall(r"^ {1,3}[-*] .*", document.read_text(), re.MULTILINE)


@over_documents
def test_links_of_the_site_lead_to_what_is_on_it(document):
    """Those that leave docs/ are rewritten or become text."""
    source = document.relative_to(ROOT).as_posix()
    here = Path(docs_site.address(source))
    text = docs_site.for_site(document.read_text(), source)
    on_it = {docs_site.address(path.relative_to(ROOT).as_posix()) for path in DOCUMENTS}
    on_it |= {
        "how.svg",
        *(f"results/{path.name}" for path in ROOT.glob("benchmarks/results/*.png")),
    }
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    assert {(here.parent / link).as_posix() for link in links} <= on_it
    assert "README.md#" not in document.read_text(), "the site has docs/index.md in its place"


@pytest.mark.parametrize(
    ("link", "page", "becomes"),
    [
        ("[a](design.md#the-page)", "docs/use.md", "[a](design.md#the-page)"),
        ("[a](docs/use.md)", "CHANGELOG.md", "[a](use.md)"),
        ("[a](../CHANGELOG.md#x)", "docs/use.md", "[a](CHANGELOG.md#x)"),
        (
            "![a](../benchmarks/results/serve_cpu.png)",
            "docs/benchmarks.md",
            "![a](results/serve_cpu.png)",
        ),
        ("[`csrc/cpu`](../csrc/cpu)", "docs/design.md", "`csrc/cpu`"),
        (
            "[`keys.py`](../benchmarks/keys.py)",
            "docs/design.md",
            "`keys.py` (`benchmarks/keys.py`)",
        ),
        ("[a](../nothing.py)", "docs/design.md", "[a](../nothing.py)"),
        ("[a](https://arxiv.org/x)", "docs/design.md", "[a](https://arxiv.org/x)"),
    ],
)
def test_links_on_the_site(link, page, becomes):
    assert docs_site.for_site(link, page) == becomes


def test_figures_of_the_decision_come_from_records():
    """docs/use.md has none but those that a script wrote."""
    text = GENERATED.sub("", (ROOT / "docs" / "use.md").read_text())
    assert not re.findall(r"\d\s?(?:x\b|%|ms\b|µs\b|nats\b|tokens\b|[KM]\b)", text)


def test_metrics_and_alerts_are_described():
    from vllm_adamas.serving.export import INFO, OVERHEAD
    from vllm_adamas.serving.histograms import EXCEEDED, MEASURES
    from vllm_adamas.serving.metrics import NAMES, REFUSED

    text = (ROOT / "docs" / "operations.md").read_text()
    metrics = [f"vllm:adamas_{name}_total" for name, _ in NAMES]
    metrics += [f"vllm:adamas_audit_{name}" for name, *_ in MEASURES]
    metrics += [f"vllm:adamas_{name}_total" for name, _ in (EXCEEDED, REFUSED)]
    metrics += [f"vllm:adamas_{name}" for name, _ in (OVERHEAD, INFO)]
    assert re.findall(r"^\| `(vllm:\w+)` \|", text, re.MULTILINE) == metrics
    rules = yaml.safe_load((ROOT / "serving" / "deploy" / "alerts.yaml").read_text())
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    assert re.findall(r"^### (\w+)$", text, re.MULTILINE) == alerts


def test_every_release_has_a_way_to_the_next():
    releases = re.findall(r"^## \[(\d[\w.]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    ways = re.findall(
        r"^## From (\S+) to", (ROOT / "docs" / "upgrades.md").read_text(), re.MULTILINE
    )
    assert ways == releases


def test_ratios_in_the_readme_are_measured():
    """Those of its sentences stand in a table of some document, which a script wrote."""
    tables = "".join("".join(GENERATED.findall(path.read_text())) for path in DOCUMENTS)
    claimed = re.findall(r"\b\d+\.\d+x", GENERATED.sub("", README.read_text()))
    assert claimed
    assert [ratio for ratio in claimed if ratio not in tables] == []


def test_the_loss_in_the_readme_is_measured():
    from vllm_adamas.evaluate.report import summary

    results = ROOT / "benchmarks" / "results"
    served = json.loads((results / "quality_SmolLM2-135M-Instruct-default.json").read_text())
    text = " ".join(README.read_text().split())
    losses = {x["name"]: x["dnll"] for x in summary(served) if "dnll" in x}
    mean, low, high = losses["default-256"]
    cell = served["cells"]["default-256"]["tasks"]["perplexity"]
    scored = len(cell["nll"]) * cell["steps"]
    assert f"it adds {mean:.3f} nats per token" in text
    assert f"95 % interval {low:.3f} to {high:.3f} nats, of {scored:,} scored tokens" in text
    assert f"with 512 tokens {losses['default-512'][0]:.3f}." in text


def test_tests_that_the_threat_model_names_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text()))
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert named
    assert named - set(re.findall(r"def (test_\w+)\(", sources)) == set()


def test_kernel_sources_that_are_named_exist():
    """docs/kernels.md names them without their folders."""
    named = re.findall(
        r"`(?:[\w]+/)?([\w]+\.(?:cuh?|h))`", (ROOT / "docs" / "kernels.md").read_text()
    )
    assert len(named) > 20
    assert [name for name in named if not list((ROOT / "csrc" / "sm90").rglob(name))] == []
