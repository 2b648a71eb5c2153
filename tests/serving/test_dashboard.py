"""The dashboard and the alerts of serving/deploy in a Prometheus that scrapes a server under traffic."""

import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode, urlsplit
from urllib.request import Request, urlopen

import pytest
import yaml
from common import ROOT, random_llama

from vllm_adamas.serving.launch import _free_port

PROMETHEUS = shutil.which("prometheus")
DEPLOY = ROOT / "serving" / "deploy"
PANELS = json.loads((DEPLOY / "dashboard.json").read_text())["panels"]
LIMIT = 300  #: seconds within which every panel shows something


@dataclass(frozen=True)
class Spec:
    """A server whose audit looks at every step."""

    model: Path

    def arguments(self) -> tuple:
        options = {"token_budget": 64, "audit_interval": 1}
        arguments = "--dtype float32 --enforce-eager --block-size 32 --max-model-len 1024"
        return self.model, "adamas", options, arguments.split()


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[str]:
    """The URL of a Prometheus that scrapes a server every second."""
    (folder / "prometheus.yaml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(DEPLOY / "alerts.yaml")],
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


def values(url: str, expression: str) -> list[float]:
    """What a panel shows now, for all instances."""
    sent = expression.replace("$instance", ".*").replace("$__rate_interval", "1m")
    found = ask(f"{url}/api/v1/query", query=sent)["result"]
    return [float(one["value"][1]) for one in found]


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed")
def test_every_panel_shows_something_and_no_alert_is_broken(serve, tmp_path_factory) -> None:
    server = serve(Spec(random_llama(tmp_path_factory.mktemp("llama"))))
    body = {"prompt": [11] * 200, "max_tokens": 32, "ignore_eos": True, "temperature": 0}
    request = Request(
        f"{server.url}/v1/completions",
        json.dumps({"model": server.model, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    empty = [target["expr"] for panel in PANELS for target in panel["targets"]]
    folder = tmp_path_factory.mktemp("prometheus")
    with prometheus(urlsplit(server.url).netloc, folder) as url:
        deadline = time.monotonic() + LIMIT
        while empty and time.monotonic() < deadline:
            urlopen(request, timeout=60).close()
            time.sleep(1)
            empty = [one for one in empty if not any(map(math.isfinite, values(url, one)))]
        assert empty == [], (folder / "log").read_text()
        rules = [rule for group in ask(f"{url}/api/v1/rules")["groups"] for rule in group["rules"]]
        assert {rule["health"] for rule in rules} == {"ok"}
        assert {rule["state"] for rule in rules if rule["name"] != "AdamasErrs"} == {"inactive"}
        assert ask(f"{url}/api/v1/series", **{"match[]": "vllm:adamas_sparse_rows_total"})
