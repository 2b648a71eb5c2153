"""Calibration profiles: what is stored, what is refused, and how they reach the layers."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import MODEL, refused

from vllm_adamas import identity as models
from vllm_adamas import profile
from vllm_adamas.evaluate.calibrate import suggest, suggest_layers
from vllm_adamas.serving import checks
from vllm_adamas.serving.impl import AdamasImpl

LAYERS, HEADS, SIZE = 3, 2, 64


def identity(**changes) -> models.ModelIdentity:
    return models.ModelIdentity(
        **{
            "name": "some-model",
            "fingerprint": "abc",
            "num_layers": LAYERS,
            "num_query_heads": 4,
            "num_kv_heads": HEADS,
            "head_size": SIZE,
            "rope": "{}",
            **changes,
        }
    )


def layer(seed: int, **changes) -> profile.LayerProfile:
    mean = torch.randn(HEADS, SIZE, generator=torch.Generator().manual_seed(seed))
    exponents = torch.full((HEADS, SIZE), seed % 4 - 2)
    values = {"key_rms": [1.0, 2.0], "mean_share": [0.1, 0.2]}
    values["balance"] = profile.encode_balance(exponents)
    return profile.LayerProfile(**{"key_mean": profile.encode_mean(mean), **values, **changes})


def made(**changes) -> profile.Profile:
    return profile.Profile(
        **{
            "created_by": "vllm-adamas 1",
            "model": identity(),
            "tokens": 100,
            "texts": {"a.txt": "00"},
            "context": 64,
            "suggestion": profile.Suggestion(
                wanted_recall=0.9,
                token_budget=64,
                num_dense_layers=1,
                reached=True,
                layer_budgets={1: 512},
            ),
            "layers": [layer(seed) for seed in range(LAYERS)],
            **changes,
        }
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    made().save(path)
    loaded = profile.load(str(path))
    assert loaded == made()
    whole = loaded.key_mean(1, range(HEADS))
    expected = torch.randn(HEADS, SIZE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(whole, expected.half().float())
    assert torch.equal(loaded.key_mean(1, range(1, 2)), whole[1:])  # the heads of one rank


def test_a_pinned_profile_cannot_change(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    made().save(path)
    pinned = profile.pin(str(path))
    assert profile.pin(pinned) == pinned
    assert profile.load(pinned) == made()
    made(tokens=101).save(path)
    profile._load.cache_clear()  # another process
    refused(lambda: profile.load(pinned), str(path), "has changed", "restart")


def test_the_hash_is_that_of_the_bytes_that_were_checked(tmp_path: Path, monkeypatch) -> None:
    """A file that is replaced after it was read is not the one that is pinned."""
    path = tmp_path / "p.json"
    made().save(path)
    read, reads = profile._read, []

    def replaced_after_reading(name: str) -> bytes:
        reads.append(name)
        content = read(name)
        path.write_bytes(b"another file")
        return content

    checked = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(profile, "_read", replaced_after_reading)
    assert profile.load(str(path)) == made()
    assert profile.pin(str(path)) == f"{path}#sha256={checked}"
    assert reads == [str(path)]
    refused(lambda: profile.load(f"{path}#sha256={checked}"), "has changed")


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    refused(lambda: profile.load(str(path)), str(path), "no regular file")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"not json", "not a calibration profile"),
        (b"[1, 2]", "not a calibration profile"),
        (b'{"layers": []}', "not a calibration profile"),
        (b"\xff\xfe", "not a calibration profile"),
        (made().model_copy(update={"version": 2}), "version 2"),
        (made(layers=[layer(0)]), "1 layers instead of 3"),
        (made(layers=[layer(s, key_mean="QUJD") for s in range(3)]), "key_mean of layer 0"),
        (
            made(layers=[layer(s, key_mean=profile.encode_mean(torch.full((2, 64), torch.nan))) for s in range(3)]),
            "not finite",
        ),
        (json.dumps(made().model_dump()).replace("1.0", "NaN").encode(), "finite number"),
        (json.dumps(made().model_dump()).replace("1.0", "1e999").encode(), "finite number"),
        (json.dumps(made().model_dump()).encode()[:-9], "not a calibration profile"),
        (b'{"layers": ' + b"[" * 1_000_000, "nested too deeply"),
        (b" " * (profile.MAX_BYTES + 1), "more than the 67108864 bytes"),
        (b'{"layers": [' + b"0," * profile.MAX_COMMAS + b"0, 0]}", "more values than the largest"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, content, named: str) -> None:
    path = tmp_path / "p.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(content.model_dump()))
    refused(lambda: profile.load(str(path)), str(path), named, "vllm-adamas calibrate")


def test_an_unknown_entry_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**made().model_dump(), "budget": 3}))
    refused(lambda: profile.load(str(path)), "budget", "vllm-adamas calibrate")


@pytest.mark.parametrize("named", ["version", "budget"])
def test_what_a_profile_says_is_quoted_briefly(tmp_path: Path, named: str) -> None:
    """Neither control characters nor megabytes of it reach a terminal or a log."""
    path, long = tmp_path / "p.json", "\033[2J\n" + "x" * 10_000
    changes = {"version": long} if named == "version" else {f"budget{long}": 3}
    path.write_text(json.dumps({**made().model_dump(), **changes}))
    sentence = refused(lambda: profile.load(str(path)), named)
    assert sentence.isprintable()
    assert len(sentence) < 400 + len(str(path))


def test_a_profile_of_a_model_with_a_strange_name_is_quoted_briefly() -> None:
    strange = identity(name="\033[2J\n" + "x" * 10_000, rope="y" * 10_000)
    profiled = made().model_copy(update={"model": strange})
    sentence = refused(lambda: profile.check_fits(profiled, "p.json", identity()), "p.json")
    assert sentence.isprintable()
    assert len(sentence) < 500


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/no/such/p.json", "No such file"),
        ("/dev", "Is a directory"),
        ("/dev/zero", "no regular file"),
        ("p" * 300, "name too long"),
        ("p\0", "null character"),
    ],
)
def test_what_is_no_file_is_refused(path: str, problem: str) -> None:
    refused(lambda: profile.load(path), path, problem, "cannot be read")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 4},
        {"num_query_heads": 8},
        {"num_kv_heads": 4},
        {"head_size": 128},
        {"rope": '{"rope_theta": 1}'},
        {"fingerprint": "def"},
        {"fingerprint": "", "name": "another-model"},
    ],
    ids=str,
)
def test_another_model_is_refused_by_name(changes: dict) -> None:
    other = identity(**{"name": "the-other", **changes})
    refused(lambda: profile.check_fits(made(), "p.json", other), "some-model", other.name, "p.json")


def test_the_same_model_fits() -> None:
    profile.check_fits(made(), "p.json", identity())
    profile.check_fits(made(), "p.json", identity(fingerprint=""))  # files not here yet
    profile.check_fits(made(), "p.json", identity(name="renamed folder"))


def test_a_fingerprint_sees_one_changed_weight_and_no_changed_layout(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = {"a": torch.zeros(100), "b": torch.ones(3, 3)}
    prints = []
    for number, files in enumerate(
        [[weights], [{"a": weights["a"]}, {"b": weights["b"]}], [{**weights, "b": torch.eye(3)}]]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for part, tensors in enumerate(files):
            save_file(tensors, folder / f"model-{part}.safetensors", {"version": str(number)})
        prints.append(models.fingerprint(folder))
    assert prints[0] == prints[1] != prints[2]


def safetensors(header, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of that header, or one that claims another length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
OTHER_FILES = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9000000000\n",
    "empty": b"",
    "four bytes": b"abcd",
    "truncated header": safetensors({"a": TENSOR}, bytes(8))[:20],
    "truncated data": safetensors({"a": TENSOR}, bytes(7)),
    "header of no bytes": bytes(8),
    "header of 2^63 bytes": safetensors({"a": TENSOR}, bytes(8), length=2**63),
    "no JSON": safetensors(b"{{{{"),
    "no text": safetensors(b"\xff\xfe\xfd"),
    "nested deeply": safetensors(b"[" * 1_000_000),
    "a list": safetensors([TENSOR]),
    "no offsets": safetensors({"a": {"dtype": "F32", "shape": [2]}}),
    "offsets that are no numbers": safetensors({"a": {**TENSOR, "data_offsets": ["x", None]}}),
    "too many dimensions": safetensors({"a": {**TENSOR, "shape": [1] * 65}}, bytes(8)),
    "offsets in reverse": safetensors({"a": {**TENSOR, "data_offsets": [8, 0]}}, bytes(8)),
    "negative offsets": safetensors({"a": {**TENSOR, "data_offsets": [-8, 0]}}, bytes(8)),
    "a directory": None,
}


@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES)
def test_files_that_only_bear_the_name_are_left_out_with_a_warning(
    tmp_path: Path, caplog, monkeypatch, content
) -> None:
    monkeypatch.setattr(models, "logger", logging.getLogger("test"))  # vLLM's does not propagate
    (tmp_path / "model.safetensors").write_bytes(safetensors({"k_norm.a": TENSOR}, bytes(8)))
    (tmp_path / "config.json").write_text("{}")
    alone = models.fingerprint(tmp_path)
    assert alone
    assert not caplog.records
    beside = tmp_path / "consolidated.safetensors"
    beside.mkdir() if content is None else beside.write_bytes(content)
    model = SimpleNamespace(model=str(tmp_path), revision=None)
    assert models.fingerprint(tmp_path) == alone
    assert models.has_qk_norm(model)
    assert all(str(beside) in record.getMessage() for record in caplog.records)
    assert caplog.records


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 10**5]
)
def test_an_index_says_which_files_are_the_models(tmp_path: Path, index: str) -> None:
    """A complete second copy beside the listed files is not; without a usable index every file counts."""
    (tmp_path / "model-1.safetensors").write_bytes(safetensors({"a": TENSOR}, bytes(8)))
    alone = models.fingerprint(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(safetensors({"b": TENSOR}, bytes(8)))
    both = models.fingerprint(tmp_path)
    assert both != alone
    listing = tmp_path / "model.safetensors.index.json"
    listing.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert models.fingerprint(tmp_path) == alone
    listing.write_text(index)
    assert models.fingerprint(tmp_path) == both


def test_a_header_is_read_within_the_limit_of_the_format(tmp_path: Path, monkeypatch) -> None:
    header = {"a": TENSOR}
    (tmp_path / "model.safetensors").write_bytes(safetensors(header, bytes(8)))
    assert models.fingerprint(tmp_path)
    monkeypatch.setattr(models, "MAX_HEADER_BYTES", len(json.dumps(header)) - 1)
    assert not models.fingerprint(tmp_path)


def test_a_layer_that_needs_more_gets_more_and_the_layers_take_no_more_together() -> None:
    budgets = (32, 64, 128, 256, 512, 1024)

    def falling(scale: float) -> dict[int, float]:
        return {b: scale * (b / 256) ** -0.5 for b in budgets}

    scales = {0: 0.1, 1: 0.1, 2: 0.05, 3: 0.2, 4: 0.1}
    errors = {layer: falling(scale) for layer, scale in scales.items()}
    hint = made().suggestion.model_copy(update={"token_budget": 256, "num_dense_layers": 0})
    found = suggest_layers(errors, hint)
    assert found == suggest_layers(errors, hint)
    spread = {layer: found.get(layer, 256) for layer in errors}
    assert sum(spread.values()) == 5 * 256
    # Squares fall as 1 / b, so the best share of a layer grows as its error does.
    for layer, scale in scales.items():
        assert abs(spread[layer] - 5 * 256 * scale / sum(scales.values())) <= 64

    def loss(by_layer: dict[int, int]) -> float:
        return sum((scales[n] * (b / 256) ** -0.5) ** 2 for n, b in by_layer.items())

    assert loss(spread) < 0.9 * loss(dict.fromkeys(scales, 256))


def test_layers_keep_to_the_budgets_that_were_measured() -> None:
    steep = {64: 0.9, 128: 0.6, 256: 0.3}
    flat = dict.fromkeys(steep, 0.1)
    hint = made().suggestion.model_copy(update={"token_budget": 128, "num_dense_layers": 0})
    assert suggest_layers({0: steep, 1: flat, 2: flat}, hint) == {0: 256, 1: 64, 2: 64}


def test_a_dense_layer_has_no_part_in_it() -> None:
    usual = {64: 0.4, 128: 0.3, 256: 0.2, 512: 0.1}
    hint = made().suggestion.model_copy(update={"token_budget": 256, "num_dense_layers": 1})
    loud = {**dict.fromkeys((1, 3), usual), 2: {b: error / 4 for b, error in usual.items()}}
    found = suggest_layers({0: dict.fromkeys(usual, 0.9), **loud}, hint)
    assert 0 not in found
    assert found == suggest_layers(loud, hint)


def test_the_suggestion_is_the_smallest_budget_that_keeps_enough() -> None:
    def with_mass(*recall: float) -> profile.LayerProfile:
        budgets = ("64", "128", "256")
        kept = dict(zip(budgets, (0.5 * r for r in recall), strict=True))
        return layer(0, mass={"dot": kept, "oracle": dict.fromkeys(budgets, 0.5)})

    first, good = with_mass(0.3, 0.4, 0.5), with_mass(0.8, 0.92, 0.99)
    assert suggest([first, *[good] * 7], 0.9) == profile.Suggestion(
        wanted_recall=0.9, token_budget=128, num_dense_layers=1, reached=True
    )
    assert suggest([good, first, *[good] * 9], 0.85).num_dense_layers == 0
    window = layer(1)  # a sliding window: dense, and no number of first layers
    assert suggest([window, first, window, *[good] * 7], 0.9).num_dense_layers == 2
    assert suggest([first, good, good], 0.9).num_dense_layers == 0  # too few to leave one dense
    assert suggest([good, window, good], 0.99).token_budget == 256
    assert not suggest([good, good], 0.995).reached
    given = suggest([good, good], 0.9, token_budget=64)
    assert (given.token_budget, given.reached) == (64, False)
    assert suggest([good, good], 0.9, token_budget=256).reached


@pytest.fixture(scope="module")
def model_profile(tmp_path_factory) -> Path:
    """A profile that fits the real model, with means of zero."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_adamas.serving.plugin import register

    register()
    config = EngineArgs(model=str(MODEL)).create_engine_config().model_config
    found = models.identify(config)
    mean = torch.zeros(found.num_kv_heads, found.head_size)
    path = tmp_path_factory.mktemp("profile") / "p.json"
    means = {"key_mean": profile.encode_mean(mean), "balance": profile.encode_balance(mean)}
    layers = [layer(0, **means)] * found.num_layers
    made(model=found, layers=layers).save(path)
    return path


def engine_config(**options):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(MODEL),
        attention_backend="adamas",
        additional_config={"adamas": options},
        enforce_eager=True,
    ).create_engine_config()


def test_the_hash_travels_with_the_configuration(model_profile: Path) -> None:
    config = engine_config(profile=str(model_profile), token_budget=99)
    options = checks.adamas_options(config)
    assert options["profile"] == profile.pin(str(model_profile))
    assert options["token_budget"] == 99
    assert checks.check_config(config).profile == options["profile"]  # a worker checks again


def test_a_profile_of_another_model_ends_the_command(tmp_path: Path) -> None:
    made().save(tmp_path / "p.json")
    refused(
        lambda: engine_config(profile=str(tmp_path / "p.json")),
        "some-model",
        MODEL.name,
        "num_layers",
    )


def test_keys_that_are_normalised_without_a_profile_are_warned_of(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from safetensors.torch import save_file

    from vllm_adamas.config import AdamasConfig

    def warned(names: list[str], hybrid: bool = False, sizes=(64,), **options) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({name: torch.zeros(2) for name in names}, folder / "model.safetensors")
        layers = SimpleNamespace(per_layer_overrides=[{"head_size": size} for size in sizes])
        model = SimpleNamespace(
            model=str(folder),
            revision=None,
            hf_text_config=None,
            is_hybrid=hybrid,
            model_arch_config=layers,
            get_head_size=lambda: 64,
        )
        return checks.warnings(SimpleNamespace(model_config=model), AdamasConfig(**options))

    normed = ["model.layers.0.self_attn.k_norm.weight", "model.norm.weight"]
    (sentence,) = warned(normed, score="manhattan")
    assert "score dot" in sentence
    assert "calibrate" in sentence
    assert len(warned(normed)) == 1
    for other in ({"hybrid": True}, {"sizes": (64, 128)}):  # which cannot be calibrated
        (sentence,) = warned(normed, **other)
        assert "calibrat" not in sentence
        assert "raise token_budget" in sentence
    assert warned(normed, profile="p.json") == []
    assert warned(["model.layers.0.self_attn.k_proj.weight"]) == []
    shutil.rmtree(tmp_path)


def test_a_balance_is_least_squares_over_channels() -> None:
    """Of all exponents near it, no other gives a smaller product of the two norms."""
    from vllm_adamas.evaluate.calibrate import balance

    g = torch.Generator().manual_seed(0)
    queries, keys = torch.rand(2, 2, 64, generator=g, dtype=torch.float64) ** 8 + 1e-3
    found = balance(queries, keys)
    assert found.abs().max() <= profile.MAX_EXPONENT
    assert found.unique().numel() > 2

    def error(exponents):  # of q.k, up to a constant
        factor = torch.exp2(exponents)
        return (queries / factor**2).sum(1) * (keys * factor**2).sum(1)

    assert (error(found) < 0.8 * error(torch.zeros_like(found))).all()
    for channel in range(0, 64, 7):
        for step in (-2, 2):
            moved = found.clone()
            moved[:, channel] += step
            assert (error(found) <= error(moved)).all()
    assert not balance(keys, keys).any()


@pytest.mark.parametrize("zeros", ["queries", "keys", "both"])
def test_heads_of_zeros_are_balanced_by_finite_factors(zeros: str) -> None:
    from vllm_adamas.evaluate.calibrate import balance

    squares = torch.rand(2, 64, dtype=torch.float64) + 0.1
    none = squares.clone()
    none[0] = 0
    queries = none if zeros in ("queries", "both") else squares
    keys = none if zeros in ("keys", "both") else squares
    found = balance(queries, keys)
    assert found.isfinite().all()
    assert torch.equal(found[1], balance(squares, squares)[1])


def test_a_layer_whose_decode_was_not_seen_is_not_balanced() -> None:
    """On GPUs vLLM's kernel decodes layers with a sliding window, which use no profile."""
    from vllm_adamas.evaluate.calibrate import _layer
    from vllm_adamas.evaluate.recorders import ChannelRecord

    record, keys = ChannelRecord(), torch.rand(10, 2, 64, dtype=torch.float64)
    record.tokens[3], record.key[3] = len(keys), keys.sum(0)
    record.key_squares[3] = keys.square().sum(0)
    assert _layer(record, 3).balance == profile.encode_balance(torch.zeros(2, 64))
    record.rows[3], record.query_squares[3] = 5, keys.sum(0) ** 8
    assert _layer(record, 3).balance != profile.encode_balance(torch.zeros(2, 64))


def test_balanced_attention_is_the_same_attention() -> None:
    """Powers of two are exact: not one bit of a dense output changes."""
    import dataclasses

    from cases import CASES

    from vllm_adamas.backends.cpu.backend import CpuBackend

    backend, case = CpuBackend(), CASES["group3"]
    case = dataclasses.replace(case, budgets=tuple(n + 1 for n in case.lengths), padding=0)
    batch = case.build(backend)
    plain, _ = batch.decode(backend)
    exponents = torch.randint(
        -4, 5, (case.heads[1], 128), generator=torch.Generator().manual_seed(1)
    )
    factor = torch.exp2(exponents.float()).to(case.dtype)
    kv = torch.cat((batch.key * factor, batch.value), 1)
    query = batch.query / factor.repeat_interleave(batch.params.group, 0)
    other = dataclasses.replace(batch, kv=kv, query=query)
    backend.append(other.bound(backend), other.key, other.value, other.slots)
    assert torch.equal(other.decode(backend)[0], plain)


def test_nothing_is_loaded_while_a_graph_is_captured(monkeypatch) -> None:
    """Replays would fill the tables, and nothing else."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    config = SimpleNamespace(profile=MODEL.name)
    impl = SimpleNamespace(config=config, sliding_window=None)
    with pytest.raises(RuntimeError, match=r"layers\.3 has to run once before"):
        AdamasImpl._load_profile(impl, SimpleNamespace(layer_name="layers.3"), torch.device("cuda"))


def test_the_shipped_profile_is_of_the_embedded_model() -> None:
    config = engine_config(profile=MODEL.name)
    assert config.additional_config["adamas"]["profile"].startswith(f"{MODEL.name}#sha256=")
    shipped = profile.load(MODEL.name)
    assert set(shipped.texts) == {"alice.txt"}, "made by the default command"
    assert shipped.suggestion.reached
    for number, layer_ in enumerate(shipped.layers):
        mass = layer_.mass
        assert mass["dot"]["256"] > mass["dot, no profile"]["256"] - 0.01, number
        assert mass["oracle"]["256"] >= mass["dot, per query head"]["256"]
