"""`make release-check`: a release that is ready passes, and each thing that is missing is a sentence."""

import io
import json
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from common import ROOT, is_one_sentence

sys.path.insert(0, str(ROOT / "scripts"))

import check_release
import dist

VERSION = "9.1.0"
WHEEL, SDIST = (
    f"vllm_adamas-{VERSION}-py3-none-manylinux_2_34_x86_64.whl",
    f"vllm_adamas-{VERSION}.tar.gz",
)
CHANGELOG = f"# Changelog\n\n## [Unreleased]\n\n## [{VERSION}] - 2026-01-02\n\n- All.\n\n## [9.0.0] - 2025-01-02\n"
METADATA = "Name: vllm-adamas\nRequires-Dist: numpy>=1\nRequires-Dist: vllm; extra == 'cuda'\n"
SOUND = {"dependencies": [{"name": "numpy", "version": "1.0", "vulns": []}]}
REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests"><testsuite name="pytest" errors="{errors}" failures="{failures}"
 skipped="{skipped}" tests="{tests}"><properties><property name="commit" value="{commit}" />
<property name="arguments" value="{arguments}" /></properties></testsuite></testsuites>
"""


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", *who, *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


def commit(root: Path) -> str:
    git(root, "add", "-A")
    git(root, "commit", "-qm", "a")
    return git(root, "rev-parse", "HEAD").strip()


def write_report(root: Path, suite: str, **changes) -> None:
    passed = {"errors": 0, "failures": 0, "skipped": 1, "tests": 2}
    told = {
        "commit": git(root, "rev-parse", "HEAD").strip(),
        "arguments": shlex.join(check_release.arguments(suite)),
    }
    file = root / check_release.REPORTS / f"{suite}.xml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(REPORT.format(**{**passed, **told, **changes}))


def write_dist(root: Path, libraries=dist.LIBRARIES) -> None:
    folder = root / "dist"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr(f"vllm_adamas-{VERSION}.dist-info/METADATA", METADATA)
        for library in libraries:
            archive.writestr(library, b"")
    with tarfile.open(folder / SDIST, "w:gz") as archive:
        archive.add(root / "csrc", f"vllm_adamas-{VERSION}/csrc")
        archive.addfile(tarfile.TarInfo(f"vllm_adamas-{VERSION}/PKG-INFO"), io.BytesIO())
    write_sums(folder)


def write_sums(folder: Path) -> None:
    files = (folder / WHEEL, folder / SDIST)
    lines = [f"{dist.sha256(file)}  {file.name}\n" for file in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def write_records(root: Path, measured_at: str | None) -> None:
    for name in check_release.RECORDS:
        environment = {"commit": measured_at} if measured_at else {}
        file = root / "benchmarks" / "results" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"environment": environment}))


def release(root: Path) -> None:
    """Builds and tests the commit, as it were."""
    write_dist(root)
    for suite in check_release.SUITES:
        write_report(root, suite)


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """The checkout of a release that lacks nothing."""
    files = {
        "vllm_adamas/__init__.py": f'"""Package."""\n\n__version__ = "{VERSION}"\n',
        "CHANGELOG.md": CHANGELOG,
        "docs/upgrades.md": f"# Upgrades\n\n## From 9.0.0 to {VERSION}\n",
        "csrc/common/page.h": "page",
        "csrc/cpu/scan.cc": "scan",
        "csrc/sm90/scan.cu": "scan",
        ".gitignore": "dist/\nbuild/\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    git(tmp_path, "init", "-q")
    write_records(tmp_path, commit(tmp_path))
    commit(tmp_path)
    release(tmp_path)
    return tmp_path


class Tools:
    """Stands in for twine and pip-audit; notes the requirements that are audited."""

    def __init__(self, twine: int = 0, audit: object = SOUND, error: str = ""):
        self.twine, self.audit, self.error = twine, audit, error
        self.required = ""

    def __call__(self, command) -> CompletedProcess:
        if "twine" in command:
            return CompletedProcess(command, self.twine, "", "")
        self.required = Path(command[-1]).read_text()
        answer = json.dumps(self.audit) if self.audit else ""
        return CompletedProcess(command, 0, answer, self.error)


def refusal(root: Path, *named: str, tools: Tools | None = None) -> None:
    """There is one reason alone, a sentence that holds each of ``named``."""
    (problem,) = check_release.problems(root, tools or Tools())
    assert is_one_sentence(problem), problem
    assert [part for part in named if part not in problem] == [], problem


def test_what_is_ready_passes(ready: Path) -> None:
    tools = Tools()
    assert check_release.problems(ready, tools) == []
    assert tools.required == "numpy>=1\n", "extras are not required"


def test_changes_that_are_not_committed(ready: Path) -> None:
    (ready / "new.py").touch()
    refusal(ready, "tree has changes")


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("CHANGELOG.md", f"[{VERSION}]", "[9.0.1]", f"no section of {VERSION}"),
        ("CHANGELOG.md", " - 2026-01-02", "", f"no section of {VERSION}"),
        ("CHANGELOG.md", "[Unreleased]\n", "[Unreleased]\n\n- More.\n", "unreleased entries"),
        ("docs/upgrades.md", VERSION, "the next release", f"how to move to {VERSION}"),
    ],
)
def test_documents_that_do_not_name_the_release(
    ready: Path, file: str, old: str, new: str, named: str
) -> None:
    text = (ready / file).read_text()
    assert old in text
    (ready / file).write_text(text.replace(old, new))
    commit(ready)
    release(ready)
    refusal(ready, file, named)


def test_the_first_release_has_no_way_to_it(ready: Path) -> None:
    (ready / "CHANGELOG.md").write_text(CHANGELOG.partition("## [9.0.0]")[0])
    (ready / "docs" / "upgrades.md").write_text("# Upgrades\n")
    commit(ready)
    release(ready)
    assert check_release.problems(ready, Tools()) == []


@pytest.mark.parametrize("name", ["SHA256SUMS", WHEEL, SDIST])
def test_a_file_that_is_missing(ready: Path, name: str) -> None:
    (ready / "dist" / name).unlink()
    found = check_release.problems(ready, Tools())
    assert all(map(is_one_sentence, found))
    assert f"dist/{name} is missing: run `make dist` at this commit." in found


@pytest.mark.parametrize(("name", "kind"), [(WHEEL, "wheel"), (SDIST, "sdist")])
def test_files_of_another_version(ready: Path, name: str, kind: str) -> None:
    other = name.replace(VERSION, "9.0.0")
    (ready / "dist" / name).rename(ready / "dist" / other)
    sums = ready / "dist" / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(name, other))
    refusal(ready, f"no {kind} of {VERSION}", "make dist")


def test_a_file_without_a_sum(ready: Path) -> None:
    (ready / "dist" / "extra.whl").touch()
    refusal(ready, "dist/extra.whl", "not in SHA256SUMS")


def test_a_file_with_another_sum(ready: Path) -> None:
    with zipfile.ZipFile(ready / "dist" / WHEEL, "a") as archive:
        archive.writestr("vllm_adamas/more.py", b"")
    refusal(ready, WHEEL, "not the file that SHA256SUMS lists")


@pytest.mark.parametrize("name", ["sm90", "sm80"])
def test_a_wheel_without_cuda_kernels(ready: Path, name: str) -> None:
    write_dist(ready, [path for path in dist.LIBRARIES if name not in path])
    refusal(ready, f"libadamas_{name}.so is missing", "make dist")


def test_files_of_another_commit(ready: Path) -> None:
    (ready / "csrc" / "cpu" / "scan.cc").write_text("another scan")
    write_records(ready, commit(ready))
    commit(ready)
    for suite in check_release.SUITES:
        write_report(ready, suite)
    refusal(ready, SDIST, "another csrc/cpu/scan.cc")


def test_metadata_that_no_index_takes(ready: Path) -> None:
    refusal(ready, "twine check", tools=Tools(twine=1))


def test_a_vulnerability(ready: Path) -> None:
    bad = {"id": "PYSEC-1", "fix_versions": ["1.1", "2.0"]}
    audit = {"dependencies": [{"name": "numpy", "version": "1.0", "vulns": [bad]}]}
    refusal(ready, "numpy 1.0", "PYSEC-1", "1.1 or 2.0", tools=Tools(audit=audit))


def test_an_audit_without_a_network(ready: Path) -> None:
    tools = Tools(audit=None, error="Traceback:\nERROR:pip_audit._cli:Connection refused.\n")
    refusal(ready, "could not look for vulnerabilities (Connection refused)", tools=tools)


@pytest.mark.parametrize(
    ("changed", "records"),
    [
        ("common/page.h", {"serve_gpu", "decode_gpu", "serve_cpu", "serve_cpu_epyc"}),
        ("cpu/scan.cc", {"serve_cpu", "serve_cpu_epyc"}),
        ("sm90/scan.cu", {"serve_gpu", "decode_gpu"}),
    ],
)
def test_records_of_other_kernels(ready: Path, changed: str, records: set[str]) -> None:
    (ready / "csrc" / changed).write_text("other")
    commit(ready)
    release(ready)
    found = check_release.problems(ready, Tools())
    assert all(map(is_one_sentence, found))
    assert all("has changed since" in problem for problem in found)
    assert {name for name in check_release.RECORDS if f"{name}.json" in "".join(found)} == records
    assert len(found) == len(records)


@pytest.mark.parametrize(
    ("measured_at", "named"), [("abc1234-dirty", "uncommitted"), ("abc1234", "does not have")]
)
def test_records_of_unknown_kernels(ready: Path, measured_at: str, named: str) -> None:
    write_records(ready, measured_at)
    commit(ready)
    release(ready)
    found = check_release.problems(ready, Tools())
    assert len(found) == len(check_release.RECORDS)
    assert all(is_one_sentence(problem) and named in problem for problem in found)


def test_records_without_a_commit_tell_nothing(ready: Path) -> None:
    write_records(ready, None)
    commit(ready)
    release(ready)
    assert check_release.problems(ready, Tools()) == []


@pytest.mark.parametrize("suite", check_release.SUITES)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"failures": 2, "errors": 1}, "3 failures"),
        ({"tests": 0, "skipped": 0}, "no test that passed"),
        ({"tests": 5, "skipped": 5}, "no test that passed"),
        ({"commit": "abc"}, "commit abc instead of"),
        ({"arguments": "-m gpu tests/ops"}, "other arguments (-m gpu tests/ops)"),
    ],
    ids=str,
)
def test_reports_that_show_too_little(ready: Path, suite: str, changes: dict, named: str) -> None:
    write_report(ready, suite, **changes)
    refusal(ready, f"{suite}.xml", f"`make {suite}`", named)


@pytest.mark.parametrize("content", [None, "", "<testsuites/>"])
def test_reports_that_are_none(ready: Path, content: str | None) -> None:
    file = ready / check_release.REPORTS / "test-gpu.xml"
    file.unlink() if content is None else file.write_text(content)
    refusal(ready, "test-gpu.xml", "missing" if content is None else "not a report")


def test_the_targets_write_the_reports() -> None:
    """With the arguments that the check asks for, and no others."""
    for suite in check_release.SUITES:
        command = ["make", "-n", suite, "PYTHON=python", "MODEL=some"]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        (line,) = (line for line in shown.stdout.splitlines() if "-m pytest" in line)
        assert shlex.split(line) == ["python", "-m", "pytest", *check_release.arguments(suite)]


def test_a_report_tells_the_commit_and_the_arguments(tmp_path: Path) -> None:
    """Of a real run, of one quick test."""
    file = tmp_path / "report.xml"
    given = ["tests/core/test_layout.py", "-q", "-x", "--junitxml", str(file)]
    command = [sys.executable, "-m", "pytest", *given, "-p", "no:cacheprovider"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    told = check_release.read_report(file)
    assert told.properties["arguments"] == shlex.join([*given, "-p", "no:cacheprovider"])
    head = git(ROOT, "rev-parse", "HEAD").strip()
    assert told.properties["commit"].removesuffix("-dirty") == head
    assert told.passed > 0
    assert told.failed == 0


def test_the_records_are_those_of_the_readme() -> None:
    script = (ROOT / "benchmarks" / "update_readme.py").read_text()
    assert [name for name in check_release.RECORDS if f'"{name}"' not in script] == []
