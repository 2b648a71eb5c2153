"""Refuse a release that is not ready, with one sentence for each reason; changes nothing.

Reads the committed tree, what `make dist` has built from it, and the reports that the test targets write.
Asks the package index for known vulnerabilities, so it needs a network.
"""

from __future__ import annotations

import argparse
import email
import io
import json
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import dist
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
REPORTS = Path("build", "reports")
#: Test targets of the Makefile and the marks that each runs.
SUITES = {
    "test": "not gpu and not slow",
    "test-slow": "slow and not gpu and not models",
    "test-gpu": "gpu",
}
#: Further arguments of pytest, by target.
WORKERS = {"test": ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")}
#: Records of speed that the README cites, and the kernels that each measured.
RECORDS = {
    "serve_gpu": ("csrc/common", "csrc/sm90"),
    "decode_gpu": ("csrc/common", "csrc/sm90"),
    "serve_cpu": ("csrc/common", "csrc/cpu"),
    "serve_cpu_epyc": ("csrc/common", "csrc/cpu"),
}

#: A command that is run, in a folder or in this one.
Run = Callable[..., subprocess.CompletedProcess]


def run(command: Sequence[str | Path], cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def tree_problems(root: Path) -> Iterator[str]:
    """What is not committed."""
    if dist.git("status", "--porcelain", root=root):
        yield "The tree has changes, and a release is what is committed: commit or stash."


def version_of(root: Path) -> str:
    text = (root / "vllm_adamas" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def document_problems(root: Path) -> Iterator[str]:
    """What CHANGELOG.md and docs/upgrades.md do not say of the version."""
    version, changes = version_of(root), (root / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", changes, re.MULTILINE)
    unreleased = re.search(
        r"^## \[Unreleased\]\n(.*?)(?=^## |\Z)", changes, re.MULTILINE | re.DOTALL
    )
    if version not in releases:
        yield f"CHANGELOG.md has no section of {version}: add `## [{version}] - DATE`."
    if unreleased and unreleased[1].strip():
        yield f"CHANGELOG.md has unreleased entries: move them below {version}, or raise the version."
    ways = re.findall(
        r"^## From \S+ to (\S+)$", (root / "docs" / "upgrades.md").read_text(), re.MULTILINE
    )
    if releases[-1:] != [version] and version not in ways:
        yield f"docs/upgrades.md does not say how to move to {version}: add `## From RELEASE to {version}`."


def file_problems(root: Path, run: Run = run) -> Iterator[str]:
    """What is wrong with the files of `make dist`."""
    folder = root / "dist"
    sums = folder / "SHA256SUMS"
    again = "run `make dist` at this commit"
    if not sums.is_file():
        yield f"dist/SHA256SUMS is missing: {again}."
        return
    listed = dict(reversed(line.split(maxsplit=1)) for line in sums.read_text().splitlines())
    there = {file.name: file for file in folder.iterdir() if file != sums}
    for name in sorted(listed.keys() ^ there.keys()):
        yield f"dist/{name} is {'missing' if name in listed else 'not in SHA256SUMS'}: {again}."
    for name in sorted(listed.keys() & there.keys()):
        if dist.sha256(there[name]) != listed[name]:
            yield f"dist/{name} is not the file that SHA256SUMS lists: {again}."
    start = f"vllm_adamas-{version_of(root)}"
    wheels = sorted(folder.glob(f"{start}-*.whl"))
    sdists = sorted(folder.glob(f"{start}.tar.gz"))
    for kind, files in (("wheel", wheels), ("sdist", sdists)):
        if not files:
            yield f"dist has no {kind} of {version_of(root)}: {again}."
    if not (wheels and sdists):
        return
    for problem in dist.wheel_problems(wheels[0]):
        yield f"The wheel cannot be published ({problem}): {again}."
    if different := _differs(root, sdists[0]):
        yield f"dist/{sdists[0].name} holds another {different} than this commit: {again}."
    if run([sys.executable, "-m", "twine", "check", "--strict", wheels[0], sdists[0]]).returncode:
        yield "`twine check --strict` refuses a file of dist: run it there and correct the metadata."


def _differs(root: Path, sdist: Path) -> str | None:
    """A file of an sdist that is another one in the commit."""
    archive = subprocess.run(
        ["git", "archive", "HEAD"], cwd=root, capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        committed = {
            member.name: tar.extractfile(member).read() for member in tar if member.isfile()
        }
    with tarfile.open(sdist) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if name in committed and tar.extractfile(member).read() != committed[name]:
                return name
    return None


def vulnerability_problems(root: Path, run: Run = run) -> Iterator[str]:
    """Known vulnerabilities of what pip installs today for the wheel."""
    wheels = sorted((root / "dist").glob(f"vllm_adamas-{version_of(root)}-*.whl"))
    if not wheels:
        return  # a reason of its own
    with zipfile.ZipFile(wheels[0]) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
    required = map(Requirement, metadata.get_all("Requires-Dist") or ())
    with tempfile.TemporaryDirectory(prefix="adamas-release-") as scratch:
        file = Path(scratch, "requirements.txt")
        file.write_text("".join(f"{one}\n" for one in required if "extra" not in str(one.marker)))
        done = run(
            [sys.executable, "-m", "pip_audit", "--strict", "--format", "json", "--progress-spinner", "off", "-r", file]
        )  # fmt: skip
    try:
        audited = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1].rstrip(".")
        reason = re.sub(r"^[A-Z]+:[\w.]+:", "", reason)  # of its logger
        yield f"pip-audit could not look for vulnerabilities ({reason}): run it where the package index can be reached."
        return
    for package in audited:
        for found in package.get("vulns", ()):
            fixed = " or ".join(found["fix_versions"]) or "no release"
            yield (
                f"{package['name']} {package['version']} has the vulnerability {found['id']}, mended in {fixed}: "
                "require a release without it."
            )


def record_problems(root: Path) -> Iterator[str]:
    """Cited records of kernels that are not those of the tree; those without a commit tell nothing."""
    for name, kernels in RECORDS.items():
        record = json.loads((root / "benchmarks" / "results" / f"{name}.json").read_text())
        commit, again = record["environment"].get("commit"), "measure again"
        if commit is None:
            continue
        file = f"benchmarks/results/{name}.json"
        if commit.endswith("-dirty"):
            yield f"{file} was measured on uncommitted changes to {commit.removesuffix('-dirty')}: {again}."
        elif run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=root).returncode:
            yield f"{file} was measured at {commit}, which this repository does not have: {again}."
        elif run(["git", "diff", "--quiet", commit, "HEAD", "--", *kernels], cwd=root).returncode:
            yield f"{file} was measured at {commit}, and {' or '.join(kernels)} has changed since: {again}."


def arguments(suite: str) -> list[str]:
    """Those of pytest with which `make test`, `make test-slow` and `make test-gpu` run a whole suite."""
    report = str(REPORTS / f"{suite}.xml")
    return ["-m", SUITES[suite], "--junitxml", report, *WORKERS.get(suite, ())]


class Report(NamedTuple):
    """A report of pytest: what `tests/conftest.py` adds to it, and numbers of tests."""

    properties: dict[str, str]
    passed: int
    failed: int


def read_report(file: Path) -> Report:
    """
    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a report of pytest.
    """
    try:
        suite = ElementTree.parse(file).find("testsuite")
    except ElementTree.ParseError as error:
        raise ValueError(str(error)) from None
    if suite is None:
        raise ValueError("it has no suite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    entries = suite.iterfind("properties/property")
    properties = {entry.get("name"): entry.get("value") for entry in entries}
    return Report(properties, counts["tests"] - counts["skipped"] - failed, failed)


def suite_problems(root: Path, suite: str) -> Iterator[str]:
    """Why the report of a suite does not show that all of it passes at this commit."""
    file, again = REPORTS / f"{suite}.xml", f"run `make {suite}` at this commit"
    try:
        report = read_report(root / file)
    except FileNotFoundError:
        yield f"{file} is missing: {again}."
        return
    except ValueError:
        yield f"{file} is not a report of pytest: {again}."
        return
    head = dist.git("rev-parse", "HEAD", root=root).strip()
    commit, given = map(report.properties.get, ("commit", "arguments"))
    if report.failed:
        yield f"{file} has {report.failed} failures: correct them, then {again}."
    elif not report.passed:
        yield f"{file} shows no test that passed: {again}, on a host that has what it needs."
    elif commit != head:
        yield f"{file} is of the commit {commit} instead of {head}: {again}."
    elif given != shlex.join(arguments(suite)):
        yield f"{file} is of a run with other arguments ({given}): {again}, without ARGS."


def problems(root: Path = ROOT, run: Run = run) -> list[str]:
    """Every reason not to release, a sentence each; none if the release is ready.

    Args:
        run: runs twine and pip-audit.
    """
    return [
        *tree_problems(root),
        *document_problems(root),
        *file_problems(root, run),
        *vulnerability_problems(root, run),
        *record_problems(root),
        *(problem for suite in SUITES for problem in suite_problems(root, suite)),
    ]


def main() -> int:
    argparse.ArgumentParser(description=__doc__.partition("\n\n")[0]).parse_args()
    found = problems()
    print(*(f"release-check: {problem}" for problem in found), sep="\n", end="\n" if found else "")
    if not found:
        print(f"release-check: {version_of(ROOT)} is ready.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
