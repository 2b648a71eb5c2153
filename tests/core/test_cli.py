"""The `vllm-adamas` command."""

import json
from pathlib import Path

import pytest
import torch
from common import MODEL, is_one_sentence

from vllm_adamas import __version__
from vllm_adamas.cli import main


def info(capsys, *args: str) -> dict:
    assert main(["info", "--json", *args]) == 0
    return json.loads(capsys.readouterr().out)


def test_info_tells_what_would_run(capsys) -> None:
    report = info(capsys, "--config", '{"token_budget": 99, "score": "manhattan"}')
    assert report["versions"]["vllm-adamas"] == __version__
    assert report["configuration"]["token_budget"] == 99
    assert report["configuration"]["thresholds"] == "±0.8839"  # 10 / sqrt(128)
    expected = ("cuda", "triton") if torch.cuda.is_available() else ("cpu", "reference")
    assert list(report["kernels"]) == [*expected, "used here"]
    assert report["kernels"]["used here"].startswith(expected)


def test_info_refuses_kernels_of_another_device(capsys) -> None:
    other = "cpu" if torch.cuda.is_available() else "cuda"
    assert main(["info", "--config", json.dumps({"kernels": other})]) == 2
    assert f"kernels='{other}'" in capsys.readouterr().err


def test_info_reads_a_models_shape(capsys) -> None:
    page = info(capsys, "--model", str(MODEL))["page"]
    assert (page["head_size"], page["num_kv_heads"], page["num_layers"]) == (64, 3, 30)
    assert page["total"] == "274 bytes per token and KV head (+7.0%)"
    assert page["per token, all layers"] == f"{274 * 3 * 30 / 1024:.1f} KiB"


def test_info_resolves_the_defaults_for_a_model(capsys, tmp_path) -> None:
    """As a server would: Gemma 3 normalises its keys, and its first layer has a sliding window."""
    gemma = {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}
    gemma |= {"num_attention_heads": 4, "head_dim": 256, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(gemma))
    for args, expected in (
        ((), ("max", 1, {"0": 2048})),
        (("--model", str(MODEL)), ("max", 1, {"0": 2048})),
        (("--model", str(tmp_path)), ("sum", 1, {})),
        (("--config", '{"score": "manhattan"}'), ("sum", 2, {})),
    ):
        found = info(capsys, *args)["configuration"]
        assert (found["combine"], found["num_dense_layers"], found["layer_budgets"]) == expected


def test_info_takes_the_models_dtype(capsys, tmp_path) -> None:
    model = json.loads((MODEL / "config.json").read_text())
    for dtype, total in (("float32", "532 bytes"), ("float16", "274 bytes"), ("int4", "274 bytes")):
        (tmp_path / "config.json").write_text(json.dumps({**model, "dtype": dtype}))
        assert info(capsys, "--model", str(tmp_path))["page"]["total"].startswith(total)
    page = info(capsys, "--model", str(tmp_path), "--kv-cache-dtype", "fp8")["page"]
    assert page["total"].startswith("146 bytes")


def test_info_for_people_has_the_same_sections(capsys) -> None:
    sections = list(info(capsys))
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == sections


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--config", '{"token_budget": 0}'], "token_budget=0"),
        (["--config", "token_budget=3"], "not JSON"),
        (["--config", '{"profile": "nope"}'], "profile"),
        (["--model", "/no/such/folder"], "config.json does not exist"),
        (["--head-size", "72"], "head_size 72"),
        (["--kv-cache-dtype", "int3"], "int3"),
    ],
)
def test_mistakes_give_one_sentence(capsys, args: list[str], named: str) -> None:
    assert main(["info", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vllm-adamas: ")
    assert named in err
    assert is_one_sentence(err.removeprefix("vllm-adamas: ").rstrip("\n")), err


NO_MODEL, NO_HEADS = "is not a model's configuration", "has no 'num_attention_heads'"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"{", NO_MODEL),
        (b"\xff", NO_MODEL),
        (b"[1, 2]", NO_MODEL),
        (b"7", NO_MODEL),
        (b'{"text_config": 3}', NO_MODEL),
        (b"[" * 100_000, NO_MODEL),
        (b'{"num_attention_heads": "8", "hidden_size": 512}', NO_HEADS),
        (b'{"num_attention_heads": 0, "hidden_size": 512}', NO_HEADS),
        (b'{"num_attention_heads": true, "hidden_size": 512}', NO_HEADS),
        (b'{"num_attention_heads": [8, 8], "hidden_size": 512}', NO_HEADS),
        (b'{"num_attention_heads": 8, "head_dim": 64, "num_hidden_layers": "2"}', "layers"),
    ],
)
def test_what_is_no_configuration_of_a_model(
    capsys, tmp_path: Path, content: bytes, named: str
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert main(["info", "--model", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err
    assert is_one_sentence(err.removeprefix("vllm-adamas: ").rstrip("\n")), err
