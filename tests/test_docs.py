"""What the documents claim comes from files that a benchmark wrote, and their links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("script", ["update_readme", "update_kernels", "update_quality"])
def test_figures_are_those_of_the_result_files(script):
    command = [sys.executable, f"benchmarks/{script}.py", "--check"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0, f"run benchmarks/{script}.py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_to_files(document):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_every_option_is_documented():
    from vllm_adamas.config import AdamasConfig

    table = (ROOT / "README.md").read_text()
    assert [name for name in AdamasConfig.model_fields if f"| `{name}` |" not in table] == []
