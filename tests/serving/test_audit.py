"""The audit: its histograms, its sampling, and what it finds in live servers."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import Case
from common import MODEL, ROOT
from extension import with_path
from prometheus_client.parser import text_string_to_metric_families
from targets import REFERENCE

from vllm_adamas import profile as profiles
from vllm_adamas.backends.compare import Comparison
from vllm_adamas.config import AUDIT_INTERVALS, AdamasConfig
from vllm_adamas.evaluate import texts
from vllm_adamas.identity import fingerprint
from vllm_adamas.serving import audit as audits
from vllm_adamas.serving import histograms, metrics
from vllm_adamas.serving.audit import Audit, one_of_each_group
from vllm_adamas.serving.histograms import ERRORS, MEASURES, Histograms
from vllm_adamas.serving.launch import Server

NAMES = [name for name, *_ in MEASURES]
FAULTS = ROOT / "tests" / "faults"


def rows_of(value: float) -> Comparison:
    """A row whose measures all have one value."""
    return Comparison(*(torch.tensor([value]) for _ in NAMES))


def test_measures_are_those_of_a_comparison() -> None:
    assert tuple(NAMES) == Comparison._fields


def test_groups_of_layers() -> None:
    assert histograms.groups(4) == ["0-3"]
    assert histograms.groups(30) == ["0-9", "10-19", "20-29"]
    assert histograms.groups(32)[-1] == "30-31"
    names = [f"model.layers.{n}.attn" for n in (1, 2, 3, 12, 19, 31)]
    assert list(one_of_each_group(dict.fromkeys(names))) == [names[1], names[4], names[5]]


def test_rows_are_counted_by_their_bucket(tmp_path, monkeypatch) -> None:
    """A value at a bound is within it; rows that are not valid, and other groups, stay out; workers add up."""
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    config = AdamasConfig(audit_threshold=0.3)
    for _ in range(2):
        worker = Histograms(config, "cpu", 3, 12)
        error = [0.3, 0.31, torch.nan, 0.0, 9.0]
        values = torch.tensor([error, [0.5] * 5, [0.9] * 5, [0.25] * 5])
        worker.add(11, values, torch.tensor([True, True, True, True, False]))
    found = histograms.read_audits(tmp_path)
    assert list(found) == [(3, "0-9"), (3, "10-11")]
    assert found[3, "0-9"].rows == 0
    group = found[3, "10-11"]
    assert (group.rows, group.exceeded) == (8, 4)
    counts = group.measures["output_error"].counts
    by_bound = dict(zip([*ERRORS, "more"], counts, strict=True))
    assert {bound: n for bound, n in by_bound.items() if n} == {0.01: 2, 0.3: 2, 0.4: 2, "more": 2}
    assert sum(group.measures["recall"].counts) == 8
    assert group.mean("recall") == pytest.approx(0.25)
    assert group.mean("kept_mass") == pytest.approx(0.5)


def test_torn_files_are_left_out(tmp_path) -> None:
    (tmp_path / "audit-0-12-7-x.i64").write_bytes(b"torn")
    np.zeros(histograms.WIDTH, np.int64).tofile(tmp_path / "audit-0-12-7-y.i64")  # of one group
    assert histograms.read_audits(tmp_path) == {}


# The sampling, over pages of the CPU backend.

LENGTHS = (700, 40, 300, 500, 600, 90)


@dataclass
class Engine:
    """An audit of a few layers that share one batch of rows, of which the second is within the budget."""

    audit: Audit
    batch: object
    histograms: Histograms
    layer_names: list[str]

    def step(self, keep: bool = True) -> bool:
        """A decode step; whether it was audited."""
        batch = self.batch
        rows = zip(batch.budgets.tolist(), batch.seq_lens.tolist(), strict=True)
        sparse = [(row, length) for row, (budget, length) in enumerate(rows) if budget < length]
        shown = self.audit.step({batch.params.budget: batch.step()}, lambda _: sparse)
        if shown is not None and keep:
            for name in self.layer_names:
                shown.keep(name, batch.query, self.output)
        return shown is not None

    @property
    def output(self) -> torch.Tensor:
        return self.batch.decode(REFERENCE)[0]

    def audited(self) -> dict[str, int]:
        return {
            group: histograms.GroupAudit(counts).rows
            for group, counts in zip(self.histograms.groups, self.histograms.read(), strict=True)
        }


@pytest.fixture
def engine() -> Engine:
    batch = Case(LENGTHS, 40, (4, 2), 64, selection="kv_head").build(REFERENCE)
    names = [f"layers.{n}.attn" for n in (3, 14)]
    impl = SimpleNamespace(
        num_decode_heads=4,
        head_size=64,
        dtype=batch.query.dtype,
        backend=REFERENCE,
        config=SimpleNamespace(budget_of=lambda _: batch.params.budget),
        bind=lambda *_: batch.bound(REFERENCE),
    )
    layers = {name: SimpleNamespace(impl=impl, kv_cache=batch.kv_cache) for name in names}
    counted = Histograms(AdamasConfig(), "cpu", 0, 20)
    return Engine(Audit(3, layers, counted, torch.device("cpu")), batch, counted, names)


def test_every_nth_step_is_audited_and_layers_take_turns(engine) -> None:
    assert [engine.step() for _ in range(12)] == [False, False, True] * 4
    assert engine.audited() == {"0-9": 4, "10-19": 8}  # the last one is still to be compared
    engine.step()
    assert engine.audited() == {"0-9": 8, "10-19": 8}


def test_rows_take_turns(engine, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        audits, "compare_rows", lambda *args: seen.append(int(args[-1].seq_lens)) or rows_of(1.0)
    )
    for _ in range(10):
        engine.step()
    assert set(seen) == set(LENGTHS) - {40}
    assert len(seen) == 12


def test_rows_that_were_not_kept_are_not_counted(engine) -> None:
    """A step whose layers did not run."""
    for _ in range(4):
        engine.step(keep=False)
    assert engine.audited() == {"0-9": 0, "10-19": 0}


def test_a_lack_of_memory_ends_no_server(engine, monkeypatch, caplog) -> None:
    def lacking(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(audits, "compare_rows", lacking)
        patch.setattr(audits.logger, "propagate", True)
        assert [engine.step() for _ in range(6)] == [False, False, True] * 2
    assert ["memory" in text for text in caplog.messages] == [True]
    engine.step()
    assert engine.audited() == {"0-9": 4, "10-19": 0}  # the second one


def test_steps_of_warming_up_are_forgotten(engine) -> None:
    for _ in range(3):
        engine.step()
    engine.audit.reset()
    assert [engine.step() for _ in range(3)] == [False, False, True]
    assert engine.audited() == {"0-9": 0, "10-19": 0}


def test_a_graph_keeps_the_rows_of_every_layer(engine, monkeypatch) -> None:
    """As if it were captured, and then replayed: the copies run without being asked for."""
    monkeypatch.setattr(audits, "capturing", lambda device: True)
    for _ in range(3):
        assert engine.audit._sample is None
        for name in engine.layer_names:
            engine.audit.keep(name, engine.batch.query[:1], engine.output[:1])  # the smallest graph
        engine.step()
    engine.step()
    assert engine.audited() == {"0-9": 0, "10-19": 4}


@pytest.mark.parametrize(("error", "warned"), [(0.29, 0), (0.31, 1)])
def test_the_log_warns_once_a_minute(
    engine, monkeypatch, caplog, error: float, warned: int
) -> None:
    monkeypatch.setattr(audits, "compare_rows", lambda *_: rows_of(error))
    monkeypatch.setattr(audits.logger, "propagate", True)
    for _ in range(100):
        engine.step()
    assert len(caplog.messages) == warned
    assert all("8 of 8 decode rows of layers" in text for text in caplog.messages)
    monkeypatch.setattr(audits.time, "monotonic", lambda: 1e12)
    for _ in range(100):
        engine.step()
    assert len(caplog.messages) == 2 * warned


@pytest.mark.parametrize("device_type", AUDIT_INTERVALS)
def test_the_default_interval(device_type: str) -> None:
    assert AdamasConfig().audited_every(device_type) == AUDIT_INTERVALS[device_type] > 0
    assert AdamasConfig(audit_interval=7).audited_every(device_type) == 7


# Live servers, whose every decode step is audited.

SERVER = "--enforce-eager --dtype float32 --max-num-seqs 4 --max-model-len 2048 --block-size 64"
SERVER += " --num-gpu-blocks-override 128 --no-enable-prefix-caching"
TOKENS = 24


@dataclass(frozen=True)
class Spec:
    """
    Args:
        profile: the option of this name.
        fault: one of ``tests/faults``, or none.
    """

    model: Path
    profile: str
    budget: int = 256
    fault: str = ""
    args: str = SERVER

    def arguments(self) -> tuple:
        options = {
            "audit_interval": 1,
            "token_budget": self.budget,
            "profile": self.profile,
        }
        env = {"ADAMAS_FAULT": self.fault, "PYTHONPATH": with_path(FAULTS)} if self.fault else {}
        return self.model, "adamas", options, self.args.split(), env


def talk(server: Server, rounds: int, context: int = 1500) -> None:
    """Rounds of requests of different texts; later ones are written into the blocks of those before.

    Args:
        context: tokens of a prompt.
    """
    ids = server.post("/tokenize", {"prompt": texts.packaged(calibration=False).content})["tokens"]
    for at in range(rounds):
        first = at * context
        body = {"prompt": ids[first : first + context], "max_tokens": TOKENS, "temperature": 0}
        server.post("/v1/completions", {**body, "ignore_eos": True})


def audited(server: Server) -> dict[str, dict[str, float]]:
    """By group of layers: rows, those above the threshold, and the mean of each measure."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(server.get("/metrics")):
        for sample in family.samples:
            if sample.name.startswith("vllm:adamas_audit_") and "le" not in sample.labels:
                name = sample.name.removeprefix("vllm:adamas_audit_")
                found.setdefault(sample.labels["layers"], {})[name] = sample.value
    return {
        group: {
            "rows": sums["recall_count"],
            "exceeded": sums["exceeded_rows_total"],
            **{name: sums[f"{name}_sum"] / max(1, sums[f"{name}_count"]) for name in NAMES},
        }
        for group, sums in found.items()
    }


def warnings(server: Server) -> list[str]:
    return [line for line in server.log().splitlines() if "Audit:" in line]


@pytest.mark.supports("audit")
@pytest.mark.serve
def test_a_small_budget_is_found(serve) -> None:
    """Of the demonstration model. The best tokens do not keep much more than the chosen."""
    server = serve(Spec(MODEL, MODEL.name, budget=8))
    talk(server, 2, context=500)
    found = audited(server)
    assert found.keys() == {"0-9", "10-19", "20-29"}
    assert all(group["exceeded"] > 0.6 * group["rows"] for group in found.values())
    assert all(group["oracle_mass"] < 0.8 for group in found.values())
    assert warnings(server)


# A model of keys with a large mean, as models with biases have: without its profile it is poorly served, and with that
# of other layers badly.

BIAS = 24.0  #: of the slowest channels of RoPE, which hardly turn within the contexts
CHANNELS = (30, 31, 62, 63)


@pytest.fixture(scope="session")
def biased(tmp_path_factory) -> Path:
    """The demonstration model with a bias in its key projections; beside it the profiles.

    A constant added to all keys adds one constant to all logits of a query, so the model says nearly the same.
    """
    import transformers

    folder = tmp_path_factory.mktemp("biased")
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, attention_bias=True)
    signs, shipped = torch.Generator().manual_seed(0), profiles.load(MODEL.name)
    heads, layers = range(shipped.model.num_kv_heads), []
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(attention, projection).bias.data.zero_()
        bias = torch.zeros(len(heads), shipped.model.head_size)
        bias[:, CHANNELS] = BIAS * (
            2.0 * torch.randint(0, 2, (len(heads), len(CHANNELS)), generator=signs) - 1
        )
        attention.k_proj.bias.data.copy_(bias.flatten())
        mean = profiles.encode_mean(shipped.key_mean(number, heads) + bias)
        layers.append(shipped.layers[number].model_copy(update={"key_mean": mean}))
    model.save_pretrained(folder)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    identity = shipped.model.model_copy(update={"fingerprint": fingerprint(folder)})
    right = shipped.model_copy(update={"model": identity, "layers": layers})
    right.save(folder / "right.profile")
    wrong = right.model_copy(update={"layers": [*layers[1:], layers[0]]})
    wrong.save(folder / "wrong.profile")
    return folder


@pytest.mark.supports("audit")
@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestServers:
    """Shares of rows above the threshold: far below half in a healthy server, far above it in others."""

    def test_a_healthy_server_raises_nothing(self, serve, biased) -> None:
        server = serve(Spec(biased, str(biased / "right.profile")))
        talk(server, 3)
        found = audited(server)
        assert found.keys() == {"0-9", "10-19", "20-29"}
        for group in found.values():
            assert group["rows"] >= 16
            assert group["exceeded"] < 0.2 * group["rows"]
            assert group["kept_mass"] <= group["oracle_mass"]
            assert group["kept_mass"] > 0.85
        assert not warnings(server)

    def test_a_wrong_profile_is_found(self, serve, biased) -> None:
        """It fits the model by all that can be checked at the start. The best tokens would have kept much."""
        server = serve(Spec(biased, str(biased / "wrong.profile")))
        talk(server, 3)
        found = audited(server).values()
        assert sum(group["exceeded"] for group in found) > 0.6 * sum(
            group["rows"] for group in found
        )
        assert all(group["kept_mass"] < group["oracle_mass"] - 0.2 for group in found)
        assert warnings(server)

    def test_stale_signatures_are_found(self, serve, biased) -> None:
        server = serve(Spec(biased, str(biased / "right.profile"), fault="stale_signature"))
        talk(server, 8)
        found = audited(server).values()
        assert all(group["exceeded"] > 0.6 * group["rows"] for group in found)
        assert all(group["kept_mass"] < group["oracle_mass"] - 0.2 for group in found)
        assert warnings(server)
