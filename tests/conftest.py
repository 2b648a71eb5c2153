"""Set-up that all tests share."""

import os
import shlex
import subprocess
from collections import Counter
from pathlib import Path

# Idle OpenMP threads of one test would spin through the next one's time. Read once, by torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# `eval` and `bench` silence vLLM where nothing is set. Tests of them must not silence those that follow in this process.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Left to itself, vLLM binds the threads of every engine to the same cores.
    cores = sorted(os.sched_getaffinity(0))
    share = cores[int(worker.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, share or cores)))

import pytest
import torch
from _pytest.junitxml import xml_key

if not torch.cuda.is_available():
    # Triton kernels run in Python then. Triton reads the variable when it and the kernels are
    # imported; processes that tests start must not inherit it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import vllm_adamas.backends.triton.combine  # noqa: F401

from record import pytest_addoption, pytest_configure  # noqa: F401

from vllm_adamas.serving.launch import Server


def pytest_sessionstart(session: pytest.Session) -> None:
    """Adds to a report what `scripts/check_release.py` has to know of it: the commit, and whether the suite was whole.

    pytest's fixture for this adds nothing where the tests run in workers.
    """
    report = session.config.stash.get(xml_key, None)
    if report is None:
        return

    def git(*arguments: str) -> str:
        command, folder = ["git", *arguments], Path(__file__).parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()

    changed = "-dirty" if git("status", "--porcelain") else ""
    report.add_global_property("commit", git("rev-parse", "HEAD") + changed)
    given = map(str, session.config.invocation_params.args)
    report.add_global_property("arguments", shlex.join(given))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers take files one after another: first that with most tests of servers, which takes longest.

    Then come the files without, so that one worker starts servers while the other one does not.
    """
    if not hasattr(config, "workerinput"):
        return
    served = Counter(item.path for item in items if item.get_closest_marker("serve"))
    longest = max(served, key=served.get, default=None)
    items.sort(key=lambda item: (item.path != longest, item.path in served, -served[item.path]))


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory):
    """``serve(spec)``: the server of a specification, started unless it is the one that runs.

    One at a time: idle servers hold memory that the next one needs. Tests that share a server
    therefore stand together.
    """
    running: dict[object, Server] = {}

    def get(spec) -> Server:
        if spec not in running:
            stop()
            log = tmp_path_factory.mktemp("server") / "log"
            running[spec] = Server(*spec.arguments(), log_path=log)
        return running[spec]

    def stop() -> None:
        while running:
            running.popitem()[1].stop()

    yield get
    stop()
