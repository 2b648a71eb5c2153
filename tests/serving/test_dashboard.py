"""The dashboard and the alerts of serving/deploy in a Prometheus that scrapes a server under traffic.

No package that this project installs has Grafana: what its panels ask for is asked here.
"""

import json
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode, urlsplit
from urllib.request import urlopen

import pytest
import yaml
from common import ROOT, random_llama

from vllm_adamas.serving.launch import Server, _free_port

PROMETHEUS = shutil.which("prometheus")
DEPLOY = ROOT / "serving" / "deploy"
RULES = DEPLOY / "alerts.yaml"
FASTER = 60  #: than in production alerts fire where one is planted
SECONDS = {"m": 60, "h": 3600}
PANELS = json.loads((DEPLOY / "dashboard.json").read_text())["panels"]
LIMIT = 300  #: seconds within which every panel shows something


@dataclass(frozen=True)
class Spec:
    """A server whose audit looks at every step, with further options as JSON."""

    model: Path
    options: str = "{}"

    def arguments(self) -> tuple:
        options = {"token_budget": 64, "audit_interval": 1, **json.loads(self.options)}
        arguments = "--dtype float32 --enforce-eager --block-size 32 --max-model-len 1024"
        return self.model, "adamas", options, arguments.split()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return random_llama(tmp_path_factory.mktemp("llama"))


@contextmanager
def prometheus(server: Server, rules: Path, folder: Path) -> Iterator[str]:
    """The URL of a Prometheus that scrapes a server every second."""
    target = urlsplit(server.url).netloc
    (folder / "prometheus.yaml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(rules)],
                "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": [target]}]}],
            }
        )
    )
    with _free_port() as port:
        address = f"127.0.0.1:{port}"
        command = [PROMETHEUS, f"--config.file={folder / 'prometheus.yaml'}"]
        command += [f"--storage.tsdb.path={folder}", f"--web.listen-address={address}"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(f"http://{address}/-/ready")
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(60)


def wait_for(url: str) -> None:
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            urlopen(url, timeout=10).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def ask(url: str, **parameters: str) -> dict:
    with urlopen(f"{url}?{urlencode(parameters)}", timeout=10) as answer:
        return json.load(answer)["data"]


@contextmanager
def traffic(server: Server) -> Iterator[None]:
    """One request after another, of contexts beyond the token budget."""
    body = {"prompt": [11] * 200, "max_tokens": 32, "ignore_eos": True, "temperature": 0}
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set():
            server.post("/v1/completions", {"model": server.model, **body})

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def rules_of(url: str) -> list[dict]:
    return [rule for group in ask(f"{url}/api/v1/rules")["groups"] for rule in group["rules"]]


def values(url: str, expression: str) -> list[float]:
    """What a panel shows now, for all instances."""
    sent = expression.replace("$instance", ".*").replace("$__rate_interval", "1m")
    found = ask(f"{url}/api/v1/query", query=sent)["result"]
    return [float(one["value"][1]) for one in found]


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed")
def test_every_panel_shows_something_and_no_alert_is_broken(serve, llama, tmp_path) -> None:
    server = serve(Spec(llama))
    empty = [target["expr"] for panel in PANELS for target in panel["targets"]]
    with traffic(server), prometheus(server, RULES, tmp_path) as url:
        deadline = time.monotonic() + LIMIT
        while empty and time.monotonic() < deadline:
            time.sleep(1)
            empty = [one for one in empty if not any(map(math.isfinite, values(url, one)))]
        assert empty == [], (tmp_path / "log").read_text()
        rules = rules_of(url)
        assert {rule["health"] for rule in rules} == {"ok"}
        assert {rule["state"] for rule in rules if rule["name"] != "AdamasErrs"} == {"inactive"}
        assert ask(f"{url}/api/v1/series", **{"match[]": "vllm:adamas_sparse_rows_total"})


def hurried(folder: Path) -> Path:
    """The rules, whose alerts look back and wait a fraction of their time."""

    def shorter(found: re.Match) -> str:
        return f"{int(found[1]) * SECONDS[found[2]] // FASTER}s"

    file = folder / RULES.name
    text, times = re.subn(r"(?:(?<=\[)|(?<=for: ))(\d+)([mh])\b", shorter, RULES.read_text())
    assert times == len(re.findall(r"for: |\[", RULES.read_text()))
    file.write_text(text)
    return file


#: Options under which an alert must fire. No server on a CPU selects twice.
PLANTED = {
    "AdamasCountersMissing": {"metrics": False},
    "AdamasDecodesDensely": {"min_context": 1024},
    "AdamasErrs": {"audit_threshold": 1e-6},
}


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed")
@pytest.mark.parametrize("alert", PLANTED)
def test_a_planted_condition_fires_its_alert_and_no_other(
    serve, llama, tmp_path, alert: str
) -> None:
    server = serve(Spec(llama, json.dumps(PLANTED[alert])))
    with traffic(server), prometheus(server, hurried(tmp_path), tmp_path) as url:
        deadline, active = time.monotonic() + LIMIT, {}
        while active.get(alert) != "firing" and time.monotonic() < deadline:
            time.sleep(1)
            active = {r["name"]: r["state"] for r in rules_of(url) if r["state"] != "inactive"}
        assert active == {alert: "firing"}, (tmp_path / "log").read_text()
        (fired,) = (rule["alerts"] for rule in rules_of(url) if rule["name"] == alert)
        assert urlsplit(server.url).netloc in fired[0]["annotations"]["summary"]
