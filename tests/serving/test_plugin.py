"""The plugin's entry point and its two patches: idempotent, cheap, and no one else's business."""

import pickle
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from common import MODEL, is_one_sentence

from vllm_adamas.errors import AdamasError
from vllm_adamas.serving import compat, plugin

REGISTRY = "vllm.v1.attention.backends.registry"
PATCHED = ("check_and_update_config", "get_attn_backend_cls")


def python(code: str, **kwargs) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, check=True, **kwargs).stdout.decode()


def engine_config(backend: str, options: dict):
    from vllm.engine.arg_utils import EngineArgs

    args = {"attention_backend": backend, "enforce_eager": True}
    return EngineArgs(
        model=str(MODEL), additional_config={"adamas": options}, **args
    ).create_engine_config()


@pytest.fixture
def platform():
    from vllm.platforms import current_platform

    plugin.register()
    return current_platform


def test_the_entry_point_is_register() -> None:
    (point,) = metadata.entry_points(group="vllm.general_plugins", name="adamas")
    assert point.load() is plugin.register


def test_importing_the_plugin_is_cheap() -> None:
    code = "import sys, vllm_adamas.serving.plugin; print({'torch', 'vllm', 'numpy'} & set(sys.modules))"
    assert python(code).strip() == "set()"


def test_registering_again_changes_nothing(platform) -> None:
    patched = [getattr(type(platform), name).__func__ for name in PATCHED]
    hook = sys.excepthook
    plugin.register()
    assert [getattr(type(platform), name).__func__ for name in PATCHED] == patched
    assert not any(hasattr(original.__wrapped__, "_vllm_adamas") for original in patched)
    assert sys.excepthook is hook
    members = compat._member().__class__.__members__
    assert list(members).count(compat.NAME) == 1


def test_other_backends_keep_their_paths() -> None:
    code = f"""
from {REGISTRY} import AttentionBackendEnum as Enum, _ATTN_OVERRIDES
paths = lambda: {{b.name: (b.value, _ATTN_OVERRIDES.get(b)) for b in Enum}}
before = paths()
from vllm_adamas.serving.plugin import register
register()
after = paths()
assert "vllm_adamas.serving.backend.AdamasBackend" in after.pop("ADAMAS")
assert after == before
print("same")
"""
    assert python(code).split()[-1] == "same"


def test_the_member_reaches_a_process_without_plugins(platform) -> None:
    """As in a spawned engine core, which unpickles its configuration before it loads plugins."""
    code = f"""
import pickle, sys
member = pickle.load(sys.stdin.buffer)
from {REGISTRY} import AttentionBackendEnum
assert member is AttentionBackendEnum["ADAMAS"]
print(member.get_class().get_name())
"""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        sent = pickle.dumps(compat._member(), protocol)
        assert pickle.loads(sent) is compat._member()
    assert python(code, input=sent).split()[-1] == "ADAMAS"


@pytest.mark.supports("choice by --attention-backend")
def test_the_cpu_platform_honours_the_choice(platform) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    layer = AttentionSelectorConfig(64, torch.bfloat16, "auto", 32)
    choose = platform.get_attn_backend_cls
    original = choose.__func__.__wrapped__
    assert choose(compat._member(), layer) == compat.BACKEND_PATH
    for other in (None, AttentionBackendEnum.CPU_ATTN):
        assert choose(other, layer) == original(type(platform), other, layer)
    with pytest.raises(AdamasError, match="cpu_attn") as error:
        choose(compat._member(), layer._replace(head_size=72))
    assert is_one_sentence(str(error.value))


def test_options_are_part_of_the_key_of_compiled_models(platform) -> None:
    options = (
        {},
        {"token_budget": 99},
        {"layer_budgets": {"0": 99}},
        {"layer_budgets": {"0": 98}},
        {"combine": "sum"},
    )
    hashes = {engine_config("ADAMAS", each).compute_hash() for each in options}
    assert len(hashes) == len(options)
    # Defaults are part of it as what they come to.
    assert engine_config("ADAMAS", {"combine": "max"}).compute_hash() in hashes


@pytest.mark.supports("choice by --attention-backend")
def test_only_the_adamas_backend_is_checked(platform) -> None:
    wrong = {"no such option": 1}
    assert not compat.is_selected(engine_config("CPU_ATTN", wrong))
    with pytest.raises(AdamasError, match="no such option"):
        engine_config("ADAMAS", wrong)
    assert compat.is_selected(engine_config("adamas", {}))


@pytest.mark.parametrize("wanted", [True, False])
def test_counters_are_exported_if_wanted(platform, monkeypatch, wanted: bool) -> None:
    exported = []
    monkeypatch.setattr("vllm_adamas.serving.export.export", lambda *args: exported.append(args))
    model = engine_config("ADAMAS", {"metrics": wanted, "token_budget": 99}).model_config
    assert len(exported) == wanted
    for name, options, overhead in exported:
        assert overhead == pytest.approx(18 / 256)  # of head size 64 in bfloat16
        assert name == model.served_model_name
        assert (options["token_budget"], options["layer_budgets"]) == ("99", '{"0": 792}')


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "0.8.5+cpu"])
def test_unsupported_versions(platform, monkeypatch, version: str) -> None:
    """Choosing the backend is refused; a command that uses another one never notices."""
    monkeypatch.setattr("vllm.__version__", version)
    plugin.register()
    engine_config("CPU_ATTN", {})
    with pytest.raises(AdamasError, match=r">= 0\.32, < 0\.34") as error:
        engine_config("ADAMAS", {})
    assert version in str(error.value)
    assert is_one_sentence(str(error.value))


def test_a_vllm_with_other_hooks_is_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(compat, "register_backend", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plugin.register()
    monkeypatch.setattr("vllm.__version__", "0.34.0")
    with pytest.warns(UserWarning, match=r"vllm-adamas: vLLM 0\.34\.0 is not supported"):
        plugin.register()


@pytest.mark.parametrize("version", ["0.32.0", "0.33.9", "0.32.0+cpu", "0.33.0rc1", "dev"])
def test_supported_versions(monkeypatch, version: str) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    assert compat.unsupported_vllm() is None


def test_without_vllm(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(AdamasError, match="vllm-adamas\\[cpu\\]") as error:
        plugin.register()
    assert is_one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("error", "printed"),
    [(AdamasError("no."), "vllm-adamas: no.\n"), (ValueError("other"), "ValueError: other\n")],
)
def test_an_uncaught_error_prints_its_sentence(platform, capsys, error, printed: str) -> None:
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == printed
