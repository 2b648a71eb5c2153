"""What the backend refuses before a server starts, on a real VllmConfig with one thing changed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from common import MODEL, Changed, refused
from ranks import Group, Ranks
from vllm.config import KVTransferConfig

from vllm_adamas.backends import registry
from vllm_adamas.backends.cuda import library
from vllm_adamas.backends.cuda.library import Limits
from vllm_adamas.config import AdamasConfig
from vllm_adamas.errors import AdamasError
from vllm_adamas.serving import checks, compat
from vllm_adamas.serving.dcp import ContextShare
from vllm_adamas.serving.plugin import register


@pytest.fixture(scope="module")
def vllm_config():
    register()
    from vllm.engine.arg_utils import EngineArgs

    options = {"adamas": {"token_budget": 99}}
    args = {"attention_backend": "adamas", "additional_config": options, "enforce_eager": True}
    return EngineArgs(model=str(MODEL), **args).create_engine_config()


def test_a_common_model_passes(vllm_config) -> None:
    assert checks.check_config(vllm_config) == AdamasConfig(token_budget=99).resolved()


def test_options_are_checked(vllm_config) -> None:
    wrong = Changed(vllm_config, additional_config={"adamas": {"budget": 1}})
    with pytest.raises(AdamasError, match=r"adamas\.budget is not an option"):
        checks.check_config(wrong)


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}])
def test_no_options_are_the_defaults(vllm_config, additional) -> None:
    changed = Changed(vllm_config, additional_config=additional)
    assert checks.check_config(changed) == AdamasConfig().resolved()
    assert checks.read_config(changed) == AdamasConfig().resolved()
    assert {**changed.additional_config, "adamas": None} == {**(additional or {}), "adamas": None}


def test_an_object_of_another_plugin_stays_as_it_is(vllm_config) -> None:
    changed = Changed(vllm_config, additional_config=SimpleNamespace(compute_hash=lambda: "1"))
    before = changed.additional_config
    assert checks.check_config(changed) == checks.read_config(changed) == AdamasConfig().resolved()
    assert changed.additional_config is before


@pytest.mark.parametrize(
    ("options", "normed", "first", "combine", "budgets"),
    [
        ({}, False, "full_attention", "max", {0: 2048}),
        ({}, True, "full_attention", "sum", {0: 2048}),
        ({"combine": "max"}, True, "full_attention", "max", {0: 2048}),
        ({"layer_budgets": {"1": 64}}, False, "sliding_attention", "max", {1: 64}),
    ],
    ids=["common", "QK-norm", "QK-norm, maximum named", "layer 0 slides"],
)
def test_every_process_reads_the_defaults_of_the_model(
    vllm_config, monkeypatch, options: dict, normed: bool, first: str, combine: str, budgets: dict
) -> None:
    monkeypatch.setattr(checks.identity, "has_qk_norm", lambda model: normed)
    model = vllm_config.model_config
    kinds = [first] + ["full_attention"] * 29
    model = Changed(model, hf_text_config=Changed(model.hf_text_config, layer_types=kinds))
    changed = Changed(vllm_config, model_config=model, additional_config={"adamas": options})
    found = checks.check_config(changed)
    assert (found.combine, found.layer_budgets) == (combine, budgets)
    monkeypatch.undo()  # a worker knows the options alone
    assert checks.read_config(changed) == checks.check_config(changed) == found
    assert json.loads(json.dumps(changed.additional_config, sort_keys=True))


@pytest.mark.refuses("options beside the entry adamas")
@pytest.mark.parametrize(
    ("additional", "way_out"),
    [
        ({"token_budget": 64}, """'{"adamas": {"token_budget": ...}}'"""),
        ({"adamas": {}, "score": "dot"}, """'{"adamas": {"score": ...}}'"""),
        ({"adams": {"token_budget": 64}}, """'{"adamas": OPTIONS}'"""),
        ({"Adamas": {}}, """'{"adamas": OPTIONS}'"""),
    ],
)
def test_options_in_another_place(
    vllm_config, record_property, additional: dict, way_out: str
) -> None:
    changed = Changed(vllm_config, additional_config=additional)
    record_property("sentence", check_refusal(changed, ("additional_config", way_out)))


@pytest.mark.parametrize("kernels", ["cuda", "triton", "gpu"])
def test_kernels_of_another_device_end_before_the_server(vllm_config, kernels: str) -> None:
    gpu = Changed(vllm_config, additional_config={"adamas": {"kernels": kernels}})
    sentence = rf"kernels='{kernels}' on this device.*auto, cpu, reference"
    with pytest.raises(AdamasError, match=sentence):
        checks.check_config(gpu)


@pytest.mark.parametrize("layer", [0, 29])
def test_layers_of_the_model_may_have_budgets(vllm_config, layer: int) -> None:
    options = {"layer_budgets": {str(layer): 512}}
    found = checks.check_config(Changed(vllm_config, additional_config={"adamas": options}))
    assert found.budget_of(layer).of(8192) == 512


@pytest.mark.parametrize(
    ("kinds", "layer", "named"),
    [
        (None, 30, ("layer 30", "0 to 29")),
        (["sliding_attention", "full_attention"] * 15, 2, ("layer 2", "sliding_attention")),
        (["linear_attention", "full_attention"] * 15, 2, ("layer 2", "linear_attention")),
        (["conv", "full_attention"] * 15, 2, ("layer 2", "conv")),
        (["mlp", "full_attention"] * 15, 2, ("layer 2", "mlp")),
    ],
    ids=[
        "no such layer",
        "sliding window",
        "linear attention",
        "short convolution",
        "no attention",
    ],
)
def test_layers_that_have_no_budget(vllm_config, kinds, layer: int, named: tuple) -> None:
    model = vllm_config.model_config
    changed = Changed(model, hf_text_config=Changed(model.hf_text_config, layer_types=kinds))
    options = {"adamas": {"layer_budgets": {"1": 512, str(layer): 512}}}
    check_refusal(
        Changed(vllm_config, model_config=changed, additional_config=options),
        ("adamas.layer_budgets", *named),
    )


OTHER = "--attention-backend"
MODELS = {  # change of the model configuration -> what the sentence names
    "mla": ({"use_mla": True}, ("MLA", OTHER)),
    "encoder-decoder": ({"is_encoder_decoder": True}, ("encoder-decoder models", OTHER)),
    "pooling": ({"runner_type": "pooling"}, ("pooling runner", "non-causal", OTHER)),
    "prefix": ({"is_mm_prefix_lm": True}, ("prefix language models", OTHER)),
    "attention-free": ({"is_attention_free": True}, ("models without attention", OTHER)),
    "r-swa": ({"rswa_window": 128}, ("R-SWA", OTHER)),
    "bidirectional": (
        {"hf_config": SimpleNamespace(is_causal=False)},
        ("models that attend to later tokens", OTHER),
    ),
    "dtype": ({"dtype": torch.float64}, ("dtype torch.float64", "--dtype", "bfloat16")),
    "head size": ({"get_head_size": lambda: 72}, ("head_size 72", "64, 80, 96, 112, 128", OTHER)),
    "head size of a layer": (
        {"model_arch_config": SimpleNamespace(per_layer_overrides=[{"head_size": 72}, {}])},
        ("head_size 72", OTHER),
    ),
}
TEXTS = {  # change of the model's own config.json
    "alibi": ({"alibi": True}, ("ALiBi position biases", OTHER)),
    "alibi in attn_config": ({"attn_config": {"alibi": True}}, ("ALiBi position biases", OTHER)),
    "alibi in an object": (
        {"attn_config": SimpleNamespace(alibi=True)},
        ("ALiBi position biases", OTHER),
    ),
    "alibi by position type": (
        {"position_embedding_type": "alibi"},
        ("ALiBi position biases", OTHER),
    ),
    "bloom": ({"model_type": "bloom"}, ("ALiBi position biases", OTHER)),
    "sink tokens": ({"param_sink_number": 128}, ("learned sink tokens", OTHER)),
    "bidirectional": (
        {"is_causal": False},
        ("models that attend to later tokens", "non-causal", OTHER),
    ),
    "prompts attended in both directions": (
        {"model_type": "hrm_text"},
        ("models that attend to later tokens", OTHER),
    ),
    "dual chunks": (
        {"dual_chunk_attention_config": {"chunk_size": 8}},
        ("dual chunk attention", OTHER),
    ),
    "value heads": (
        {"v_head_dim": 128},
        ("value heads of another size than key heads", "128 and 64", OTHER),
    ),
}
SINKS = {  # the same, which declares learned sinks
    "gpt-oss": {"model_type": "gpt_oss"},
    "granite": {"model_type": "granite", "layer_types": ["full_attention"] * 30},
    "sinks": {"attention_sinks": True},
    "sinks of sliding windows": {"add_swa_attention_sink_bias": True},
}
DRAFT_MODEL = {"method": "draft_model", "model": str(MODEL), "num_speculative_tokens": 2}
DRAFTERS = "drafters with layers of their own, which would have no token budget"
MICRO_BATCHES = ("micro-batches", "--enable-dbo", "--ubatch-size")
ARGUMENTS = {  # argument of the command -> its value and what else is needed; what the sentence names
    "--attention-config.use_non_causal": ("true", ("non-causal attention", OTHER)),
    "--block-size": ("48", ("block_size 48", "--block-size", "32")),
    "--diffusion-config": ('{"canvas_length":32}', ("block diffusion", "non-causal", OTHER)),
    "--kv-cache-dtype": (
        "int8_per_token_head",
        ("--kv-cache-dtype int8_per_token_head", "fp8_e5m2"),
    ),
    "--kv-offloading-size": ("1", ("KV connectors on CPUs", "--kv-offloading-size")),
    "--kv-sharing-fast-prefill": (
        "",
        ("fast prefill of layers that share keys", "--kv-sharing-fast-prefill"),
    ),
    "--kv-transfer-config": (
        '{"kv_connector":"OffloadingConnector","kv_role":"kv_both"}',
        ("KV connectors on CPUs", "--kv-transfer-config"),
    ),
    "--prefill-context-parallel-size": ("2", ("PCP", "--prefill-context-parallel-size")),
    "--spec-method": (
        "ngram_gpu --spec-tokens 2",
        ("speculative decoding by ngram_gpu on CPUs", "choose the method ngram"),
    ),
    "--speculative-config": (
        json.dumps({**DRAFT_MODEL, "attention_backend": "adamas"}, separators=(",", ":")),
        (DRAFTERS, "attention_backend", "--speculative-config"),
    ),
    "--ubatch-size": ("2", MICRO_BATCHES),
}
PARTS = {  # where vLLM drops or refuses the argument on a CPU: (part, its change), what is named
    "--decode-context-parallel-size": (
        ("parallel_config", {"decode_context_parallel_size": 2}),
        ("DCP on CPUs", "--decode-context-parallel-size"),
    ),
    "--enable-dbo": (("parallel_config", {"use_ubatching": True}), MICRO_BATCHES),
}
DRAFTS = {  # change of a served speculative configuration -> what the sentence names
    "adaptive": (
        {"enable_adaptive_verification": True},
        ("adaptive verification", "enable_adaptive_verification"),
    ),
    "gemma 4": (
        {"method": "mtp", "use_gemma4_mtp": lambda: True},
        ("drafters that read the target's keys under another backend", "Gemma 4"),
    ),
}
ENVIRONMENT = {  # variable -> its value, what else the sentence names
    "VLLM_BATCH_INVARIANT": (True, ("batch invariance", "unset")),
    "VLLM_KV_CACHE_LAYOUT": ("NHD", ("the layout VLLM_KV_CACHE_LAYOUT=NHD", "unset", "LBHNC")),
}


def check_refusal(config, named: tuple[str, ...]) -> str:
    """Returns the sentence."""
    return refused(lambda: checks.check_config(config), *named)


@pytest.mark.refuses("{named[0]}")
@pytest.mark.parametrize(("changes", "named"), MODELS.values(), ids=MODELS)
def test_models(vllm_config, record_property, changes: dict, named: tuple) -> None:
    model = Changed(vllm_config.model_config, **changes)
    changed = Changed(vllm_config, model_config=model)
    record_property("sentence", check_refusal(changed, named))


@pytest.mark.refuses("{named[0]}")
@pytest.mark.parametrize(("changes", "named"), TEXTS.values(), ids=TEXTS)
def test_model_texts(vllm_config, record_property, changes: dict, named: tuple) -> None:
    text = Changed(vllm_config.model_config.hf_text_config, **changes)
    model = Changed(vllm_config.model_config, hf_text_config=text)
    changed = Changed(vllm_config, model_config=model)
    record_property("sentence", check_refusal(changed, named))


@pytest.mark.parametrize(("size", "served"), [(64, True), (40, False)])
def test_values_that_a_model_pads(vllm_config, size: int, served: bool) -> None:
    """Its layers have heads of one size, which its head_dim is not."""
    changes = {"architectures": ["MiniCPM3ForCausalLM"], "v_head_dim": 64}
    changes |= {"qk_nope_head_dim": size, "qk_rope_head_dim": 32}
    config = with_text(vllm_config, changes, get_head_size=lambda: 32)
    if served:
        checks.check_config(config)
    else:
        check_refusal(config, ("head_size 72", OTHER))


@pytest.mark.refuses("{named[0]}")
@pytest.mark.parametrize(("argument", "rest", "named"), [(a, *c) for a, c in ARGUMENTS.items()])
def test_arguments(record_property, argument: str, rest: str, named: tuple) -> None:
    """Through vLLM's own parser: no argument changes its place on the way to the checks."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    register()
    command = [
        "--model",
        str(MODEL),
        "--attention-config.backend",
        "adamas",
        argument,
        *rest.split(),
    ]
    args = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(command)
    create = EngineArgs.from_cli_args(args).create_engine_config
    record_property("sentence", refused(create, *named))


@pytest.mark.refuses("{named[0]}")
@pytest.mark.parametrize(("change", "named"), PARTS.values(), ids=PARTS)
def test_parts(vllm_config, record_property, change: tuple, named: tuple) -> None:
    part, changes = change
    changed = Changed(getattr(vllm_config, part), **changes)
    changed = Changed(vllm_config, **{part: changed})
    record_property("sentence", check_refusal(changed, named))


def speculative(vllm_config, **changes):
    """The configuration of a server with a draft model."""
    served = {"method": "draft_model", "num_speculative_tokens": 3, "parallel_drafting": False}
    served |= {"enable_adaptive_verification": False, "use_gemma4_mtp": lambda: False}
    served["uses_draft_model"] = lambda: config.method == "draft_model"
    served |= {"attention_backend": None, "kv_cache_dtype": None}
    config = SimpleNamespace(**{**served, **changes})
    return Changed(vllm_config, speculative_config=config, use_v2_model_runner=False)


@pytest.mark.refuses("{named[0]}")
@pytest.mark.parametrize(("changes", "named"), DRAFTS.values(), ids=DRAFTS)
def test_kinds_of_speculation(vllm_config, record_property, changes: dict, named: tuple) -> None:
    changed = speculative(vllm_config, **changes)
    record_property("sentence", check_refusal(changed, named))


@pytest.mark.refuses("speculative decoding by {method}")
@pytest.mark.parametrize("method", checks.OTHER_SPECULATION)
def test_methods_of_speculation(vllm_config, record_property, method: str) -> None:
    named = (f"speculative decoding by {method}, {checks.OTHER_SPECULATION[method]}", "eagle3")
    record_property("sentence", check_refusal(speculative(vllm_config, method=method), named))


def test_parallel_drafters_have_rows_for_their_masks(vllm_config) -> None:
    """Model Runner V1 counts requests with as many more query tokens as decode requests."""
    config = speculative(vllm_config, parallel_drafting=True)
    checks.check_config(config)
    assert compat.max_decode_rows(config) == 7 * vllm_config.scheduler_config.max_num_seqs


def test_every_method_of_vllm_is_served_or_refused() -> None:
    from vllm.config.speculative import MTPModelTypes, SpeculativeMethod

    def flat(kind) -> set[str]:
        return {name for part in get_args(kind) for name in (flat(part) or {part})}

    families = flat(MTPModelTypes) - {"mtp"}  # vLLM takes their names as other names of mtp
    served = {*checks.SPECULATION, *checks.OTHER_SPECULATION}
    assert flat(SpeculativeMethod) - families == served
    assert not {*checks.SPECULATION} & {*checks.OTHER_SPECULATION}


@pytest.mark.parametrize("method", checks.SPECULATION)
def test_speculation_has_a_row_for_each_token(vllm_config, monkeypatch, method: str) -> None:
    if method == "ngram_gpu":
        on_gpu(monkeypatch)
    config = speculative(vllm_config, method=method)
    checks.check_config(config)
    assert compat.max_decode_rows(config) == 4 * vllm_config.scheduler_config.max_num_seqs


DRAFTERS_OF = {  # method, what the speculative configuration names, type of the cache -> the drafter's backend
    "eagle": ("eagle", None, "auto", "FLASH_ATTN"),
    "eagle3": ("eagle3", None, "auto", "FLASH_ATTN"),
    "mtp": ("mtp", None, "auto", "FLASH_ATTN"),
    "fp8": ("eagle", None, "fp8_e5m2", "TRITON_ATTN"),
    "named": ("eagle", SimpleNamespace(name="FLASHINFER"), "auto", "FLASHINFER"),
    "no layers": ("medusa", None, "auto", None),
}


@pytest.mark.parametrize(
    ("method", "given", "kind", "backend"), DRAFTERS_OF.values(), ids=DRAFTERS_OF
)
def test_drafters_of_model_runner_v2_have_a_dense_backend(
    vllm_config, monkeypatch, method: str, given, kind: str, backend: str | None
) -> None:
    """V2 gives them the target's if none is named, and V1 chooses one itself."""
    monkeypatch.setattr(compat, "cpu_prefills_fp8", lambda: True)
    cache = Changed(vllm_config.cache_config, cache_dtype=kind)
    config = speculative(
        Changed(vllm_config, cache_config=cache), method=method, attention_backend=given
    )
    checks.check_config(config)
    assert config.speculative_config.attention_backend is given
    v2 = Changed(config, use_v2_model_runner=True)
    for _ in range(2):  # the second check changes nothing
        checks.check_config(v2)
        assert getattr(v2.speculative_config.attention_backend, "name", None) == backend


@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3", "mtp"])
def test_drafters_take_another_backend(vllm_config, method: str) -> None:
    """Backends per kind of layer hold for the target and the drafter."""
    named = (DRAFTERS, "attention_backend", "--speculative-config")
    adamas, other = SimpleNamespace(name="ADAMAS"), SimpleNamespace(name="CPU_ATTN")
    check_refusal(speculative(vllm_config, method=method, attention_backend=adamas), named)
    for backend, served in ((adamas, False), (other, True)):
        config = speculative(vllm_config, method=method, attention_backend=other)
        kinds = Changed(vllm_config.attention_config, backend_per_kind={"full_attention": backend})
        v2 = method != "draft_model"  # which is refused there
        config = Changed(config, use_v2_model_runner=v2, attention_config=kinds)
        if served:
            checks.check_config(config)
        else:
            check_refusal(config, named)


@pytest.mark.refuses("draft models by Model Runner V2")
@pytest.mark.parametrize("named", [None, SimpleNamespace(name="FLASH_ATTN")])
def test_draft_models_of_model_runner_v2_are_refused(vllm_config, record_property, named) -> None:
    config = speculative(vllm_config, attention_backend=named)
    checks.check_config(config)
    sentence = ("draft models by Model Runner V2", "VLLM_USE_V2_MODEL_RUNNER=0")
    v2 = Changed(config, use_v2_model_runner=True)
    record_property("sentence", check_refusal(v2, sentence))


def test_a_cache_of_another_type_than_the_model(vllm_config) -> None:
    cache = Changed(vllm_config.cache_config, cache_dtype="float16")
    config = Changed(vllm_config, cache_config=cache)
    check_refusal(config, ("--kv-cache-dtype float16", "bfloat16", "auto"))


@pytest.mark.refuses("{named[0]}")
@pytest.mark.parametrize(("name", "value", "named"), [(n, *c) for n, c in ENVIRONMENT.items()])
def test_environment(
    vllm_config, monkeypatch, record_property, name: str, value, named: tuple
) -> None:
    monkeypatch.setattr(f"vllm.envs.{name}", value, raising=False)
    record_property("sentence", check_refusal(vllm_config, (name, *named)))


@pytest.mark.supports("KV cache layouts by name")
def test_the_layout_may_be_named(vllm_config, monkeypatch) -> None:
    for layout in ("LBHNC", "HND"):
        monkeypatch.setattr("vllm.envs.VLLM_KV_CACHE_LAYOUT", layout, raising=False)
        checks.check_config(vllm_config)


def test_layers_that_rewrite_metadata_are_refused() -> None:
    """Chunked, encoder, prefix and sink attention wrap the backend of the layers around them."""
    from vllm.v1.attention.backend import subclass_attention_backend

    from vllm_adamas.serving.backend import AdamasBackend
    from vllm_adamas.serving.metadata import AdamasMetadataBuilder

    refused(
        lambda: subclass_attention_backend("Chunked_", AdamasBackend, AdamasMetadataBuilder),
        "'Chunked_AdamasBackend'",
        OTHER,
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"chunk_lookback": 1}, "chunk_lookback"),
        ({"attn_type": "encoder_only"}, "encoder_only attention"),
    ],
)
def test_layers_of_other_kinds_are_refused(options: dict, named: str) -> None:
    from vllm_adamas.serving.impl import AdamasImpl

    refused(lambda: AdamasImpl(9, 64, 0.125, 3, **options), named, OTHER)


@pytest.mark.refuses("fp8 KV cache without AVX-512 and AMX")
def test_fp8_needs_a_processor_that_prefills_it(vllm_config, monkeypatch, record_property) -> None:
    cache = Changed(vllm_config.cache_config, cache_dtype="fp8_e5m2")
    config = Changed(vllm_config, cache_config=cache)
    for supported in ("_is_avx512_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, supported, lambda: False)
    record_property("sentence", check_refusal(config, ("fp8", "AVX-512", "--kv-cache-dtype auto")))
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    checks.check_config(config)


@pytest.mark.parametrize(("size", "served"), [(80, False), (96, True), (112, False), (512, True)])
def test_fp8_needs_head_sizes_that_the_processor_prefills(
    vllm_config, monkeypatch, size: int, served: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    cache = Changed(vllm_config.cache_config, cache_dtype="fp8")
    model = Changed(vllm_config.model_config, get_head_size=lambda: size)
    checks.check_config(Changed(vllm_config, model_config=model))
    config = Changed(vllm_config, model_config=model, cache_config=cache)
    if served:
        checks.check_config(config)
    else:
        check_refusal(config, ("fp8", f"head_size {size}", "32", "--kv-cache-dtype auto"))


def test_the_stock_backend_has_no_other_head_sizes() -> None:
    """Prefill on a CPU is its kernel's."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from vllm_adamas.serving.backend import AdamasBackend

    stock = CPUAttentionBackend.get_supported_head_sizes()
    assert AdamasBackend.get_supported_head_sizes() == stock


def on_gpu(monkeypatch, **changes) -> None:
    """A Hopper GPU with its kernels built, or what the changes make of it."""
    hopper = {"is_cpu": lambda: False, "is_cuda": lambda: True, "device_name": "cuda"}
    hopper["get_device_capability"] = lambda: SimpleNamespace(major=9, minor=0)
    platform = SimpleNamespace(**{**hopper, **changes})
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    most = Limits(
        max_context=1 << 20,
        max_block=1 << 16,
        max_rows=8192,
        max_step=1 << 37,
        max_group=16,
        max_cluster=16,
        most_wanted=512,
        max_groups=1 << 10,
    )
    for module in ("policy", "backend"):
        monkeypatch.setattr(f"vllm_adamas.backends.cuda.{module}.limits", lambda library: most)


def test_a_hopper_gpu_passes(vllm_config, monkeypatch) -> None:
    on_gpu(monkeypatch)
    for size in (16, 48, 64):  # no kernel there needs 32
        cache = Changed(vllm_config.cache_config, block_size=size, user_specified_block_size=True)
        checks.check_config(Changed(vllm_config, cache_config=cache))


def with_text(vllm_config, changes: dict, kernels: str = "auto", **model) -> Changed:
    text = Changed(vllm_config.model_config.hf_text_config, **changes)
    model = Changed(vllm_config.model_config, hf_text_config=text, **model)
    options = {"adamas": {"kernels": kernels}}
    return Changed(vllm_config, model_config=model, additional_config=options)


def with_flash_attention(monkeypatch, version: int) -> None:
    name = "vllm.v1.attention.backends.fa_utils.get_flash_attn_version"
    monkeypatch.setattr(name, lambda **about: version)


def with_dcp(config) -> Changed:
    """The configuration of a server whose ranks keep a share of every context each."""
    return Changed(
        config, parallel_config=Changed(config.parallel_config, decode_context_parallel_size=2)
    )


OTHER_DCP = {  # fields of a model's configuration, those of the model; what is named
    "windows": ({"layer_types": ["sliding_attention", "full_attention"]}, {}, "sliding windows"),
    "sinks": ({"model_type": "gpt_oss"}, {}, "learned attention sinks"),
    "hybrid": ({}, {"is_hybrid": True}, "state-space or linear-attention layers"),
    "chunks": ({}, {"attention_chunk_size": 8192}, "chunked local attention"),
}


@pytest.mark.refuses("DCP of models with {what}")
@pytest.mark.parametrize(("text", "model", "what"), OTHER_DCP.values(), ids=OTHER_DCP)
def test_models_with_dcp(
    vllm_config, monkeypatch, record_property, text: dict, model: dict, what: str
) -> None:
    with_flash_attention(monkeypatch, 3)
    on_gpu(monkeypatch)
    config = with_text(vllm_config, text, **model)
    named = (f"DCP of models with {what}", "--decode-context-parallel-size")
    record_property("sentence", check_refusal(with_dcp(config), named))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sinks": torch.zeros(9)}, "learned attention sinks with DCP"),
        ({"sliding_window": 64}, "sliding windows with DCP"),
        ({"kv_sharing_target_layer_name": "layers.0.attn"}, "layers that share keys with DCP"),
    ],
)
def test_layers_with_dcp(vllm_config, monkeypatch, options: dict, named: str) -> None:
    """Where the model's configuration does not tell."""
    from vllm.config import set_current_vllm_config

    from vllm_adamas.serving.impl import AdamasImpl

    group = Group(Ranks(2), 0)
    monkeypatch.setattr("vllm_adamas.serving.compat.context_group", lambda config: (group, 1))
    with set_current_vllm_config(vllm_config):
        way_out = "--decode-context-parallel-size"
        refused(lambda: AdamasImpl(9, 64, 0.125, 3, **options), named, way_out)


@pytest.mark.refuses("DCP without NCCL")
@pytest.mark.parametrize("nccl", [None, SimpleNamespace(disabled=True)], ids=["none", "disabled"])
def test_ranks_need_nccl(monkeypatch, record_property, nccl) -> None:
    """Without it, vLLM's ``reduce_scatter`` returns what it has not written."""
    group = SimpleNamespace(device_communicator=SimpleNamespace(pynccl_comm=nccl))
    monkeypatch.setattr("vllm_adamas.serving.compat.context_group", lambda config: (group, 1))
    named = ("DCP without NCCL", "VLLM_NCCL_SO_PATH", "--decode-context-parallel-size")
    record_property("sentence", refused(lambda: ContextShare.of(None), *named))


@pytest.mark.refuses("DCP on GPUs with FlashAttention 2")
def test_gpus_with_dcp(vllm_config, monkeypatch, record_property) -> None:
    with_flash_attention(monkeypatch, 3)
    on_gpu(monkeypatch)
    for version in (3, 4):
        with_flash_attention(monkeypatch, version)
        checks.check_config(with_dcp(vllm_config))
    with_flash_attention(monkeypatch, 2)
    named = ("DCP on this GPU", "FlashAttention 2", "--decode-context-parallel-size")
    record_property("sentence", check_refusal(with_dcp(vllm_config), named))


@pytest.mark.refuses("KV connectors with DCP")
def test_connectors_with_dcp(vllm_config, monkeypatch, record_property) -> None:
    with_flash_attention(monkeypatch, 3)
    on_gpu(monkeypatch)
    cache = Changed(vllm_config.cache_config, kv_offloading_size=1.0)
    config = with_dcp(Changed(vllm_config, cache_config=cache))
    named = ("KV connectors with DCP", "--decode-context-parallel-size")
    record_property("sentence", check_refusal(config, named))


def test_ranks_with_dcp_decode_each_others_queries(vllm_config, monkeypatch) -> None:
    with_flash_attention(monkeypatch, 3)
    on_gpu(monkeypatch)
    heads = {"get_num_attention_heads": lambda parallel: 9, "get_num_kv_heads": lambda parallel: 1}
    config = with_text(vllm_config, {}, **heads)
    checks.check_config(config)
    check_refusal(with_dcp(config), ("18 query heads per KV head", OTHER))


def test_ranks_with_dcp_hold_a_share_of_the_longest_context(vllm_config, monkeypatch) -> None:
    with_flash_attention(monkeypatch, 3)
    on_gpu(monkeypatch)
    most = 1 << 20  # tokens that the kernels hold
    model = Changed(vllm_config.model_config, max_model_len=2 * most)
    config = Changed(vllm_config, model_config=model)
    checks.check_config(with_dcp(config))
    for refused_one in (
        config,
        with_dcp(Changed(config, model_config=Changed(model, max_model_len=2 * most + 1))),
    ):
        check_refusal(refused_one, (f"--max-model-len {most}",))


def test_a_model_without_layers_has_no_budget_for_one(vllm_config) -> None:
    config = with_text(vllm_config, {"num_hidden_layers": 0})
    assert checks.check_config(config).layer_budgets == {}


@pytest.mark.parametrize("changes", SINKS.values(), ids=SINKS)
def test_models_with_sinks(vllm_config, monkeypatch, changes: dict) -> None:
    for kernels in ("auto", "cpu", "reference"):
        checks.check_config(with_text(vllm_config, changes, kernels))
    on_gpu(monkeypatch)
    for kernels in ("auto", "cuda", "triton"):
        config = with_text(vllm_config, changes, kernels)
        with_flash_attention(monkeypatch, 3)
        checks.check_config(config)
        with_flash_attention(monkeypatch, 2)
        check_refusal(config, ("FlashAttention 2", "sinks", OTHER))


def test_a_granite_without_sinks(vllm_config, monkeypatch) -> None:
    on_gpu(monkeypatch)
    with_flash_attention(monkeypatch, 2)
    kinds = ["full_attention"] * 30
    for changes in ({}, {"layer_types": kinds, "attention_sinks": False}):
        checks.check_config(with_text(vllm_config, {"model_type": "granite", **changes}))


def test_sinks_that_the_prefill_kernel_does_not_take(vllm_config, monkeypatch) -> None:
    on_gpu(monkeypatch)
    sinks, cap = {"model_type": "gpt_oss"}, {"attn_logit_softcapping": 50.0}
    with_flash_attention(monkeypatch, 2)
    checks.check_config(with_text(vllm_config, cap))
    half = {"dtype": torch.float16}
    many = {
        "get_num_attention_heads": lambda parallel: 80,
        "get_num_kv_heads": lambda parallel: 8,
    }
    for version in (3, 4):
        with_flash_attention(monkeypatch, version)
        named = ("float16", "sinks", "--dtype bfloat16")
        check_refusal(with_text(vllm_config, sinks, **half), named)
        checks.check_config(with_text(vllm_config, cap, **half))
    checks.check_config(with_text(vllm_config, sinks, **many))
    with_flash_attention(monkeypatch, 3)
    named = ("80 query heads", "64", "--tensor-parallel-size")
    check_refusal(with_text(vllm_config, sinks, **many), named)


def test_layers_are_checked_again(vllm_config, monkeypatch) -> None:
    """Not every model's configuration tells what its layers do."""
    from vllm.config import set_current_vllm_config

    from vllm_adamas.serving.impl import AdamasImpl

    with set_current_vllm_config(vllm_config):
        AdamasImpl(9, 64, 0.125, 3, sinks=torch.zeros(9))
        monkeypatch.setattr(compat, "on_cpu", lambda: False)
        with_flash_attention(monkeypatch, 2)
        AdamasImpl(9, 64, 0.125, 3, logits_soft_cap=50.0)
        refused(
            lambda: AdamasImpl(9, 64, 0.125, 3, sinks=torch.zeros(9)), "FlashAttention 2", OTHER
        )


OFFLOADING = compat.OFFLOADING
FILES = {"type": "fs", "root_dir": "/pages"}
TIERS = {"spec_name": "TieringOffloadingSpec", "secondary_tiers": [FILES]}


def transferring(
    vllm_config, name: str | None = OFFLOADING, module=None, size=None, backend="native", **options
) -> Changed:
    """A configuration with a connector, with ``--kv-offloading-size``, or with both."""
    transfer = name and KVTransferConfig(
        kv_connector=name,
        kv_role="kv_both",
        kv_buffer_device="cuda",
        kv_connector_module_path=module,
        kv_connector_extra_config=options,
    )
    changes = {"kv_offloading_size": size, "kv_offloading_backend": backend}
    cache = Changed(vllm_config.cache_config, **changes)
    return Changed(vllm_config, kv_transfer_config=transfer, cache_config=cache)


OFFLOADED = {
    "a connector": {"cpu_bytes_to_use": 1 << 30},
    "a size": {"name": None, "size": 1.0},
    "chunks": {"blocks_per_chunk": 4},
    "host memory by name": {"spec_name": "CPUOffloadingSpec"},
    "host memory and files": TIERS,
    "a size, host memory and files": {"size": 1.0, **TIERS},
    "no connector": {"name": None},
}


@pytest.mark.parametrize("options", OFFLOADED.values(), ids=OFFLOADED)
def test_whole_pages_are_offloaded_from_gpus(vllm_config, monkeypatch, options: dict) -> None:
    from vllm_adamas.serving.backend import AdamasBackend

    assert not AdamasBackend.supports_kv_connector()
    on_gpu(monkeypatch)
    assert AdamasBackend.supports_kv_connector()
    checks.check_config(transferring(vllm_config, **options))


def test_every_other_connector_is_refused_by_name(vllm_config, monkeypatch) -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    on_gpu(monkeypatch)
    others = KVConnectorFactory._registry.keys() - {OFFLOADING, compat.SIMPLE_OFFLOADING}
    for name in [*others, "NoSuchConnector"]:
        check_refusal(transferring(vllm_config, name), (repr(name), OFFLOADING))
    for start in checks.CONNECTORS:
        assert any(name.startswith(start) for name in others), start


TIER = "secondary tier"
CONNECTORS = {  # what transferring is given -> what the sentence names
    "a disk": (
        {"name": "SimpleCPUOffloadConnector", "kv_offload_backend": "disk"},
        ("multiples of 4096 bytes", "leave kv_offload_backend out"),
    ),
    "another package": ({"module": "my.connectors"}, ("kv_connector_module_path='my.connectors'",)),
    "a size, another package": ({"module": "mine", "size": 1.0}, ("kv_connector_module_path",)),
    "lmcache": (
        {"name": None, "size": 1.0, "backend": "lmcache"},
        ("LMCacheMPConnector", "K and V alone", "--kv-offloading-backend native"),
    ),
    "a size over a name": (
        {"name": "ExampleConnector", "size": 1.0, "backend": "lmcache"},
        ("LMCacheMPConnector",),
    ),
    "files named by tokens": ({"name": "ExampleConnector"}, ("do not say how keys were coded",)),
    "hidden states": (
        {"name": "ExampleHiddenStatesConnector"},
        ("speculative decoding by extract_hidden_states",),
    ),
    "another spec": (
        {"spec_name": "MySpec", "spec_module_path": "mine"},
        ("'MySpec'", "CPUOffloadingSpec or TieringOffloadingSpec"),
    ),
    "a spec that is none": ({"spec_name": ["x"]}, ("['x']", "CPUOffloadingSpec")),
    "canonical pages": ({"canonical_layout": True}, ("canonical_layout", "leave it out")),
    "another tier": (
        {**TIERS, "secondary_tiers": [FILES, {"type": "p2p"}]},
        (TIER, "'p2p'", "type fs"),
    ),
    "no type": ({**TIERS, "secondary_tiers": [{}]}, (TIER, "None", "type fs")),
    "tiers that vLLM would not read": ({"secondary_tiers": 3}, ("secondary_tiers", "list")),
    "no folder": ({**TIERS, "secondary_tiers": [{"type": "fs"}]}, (TIER, "root_dir")),
    "tiers that are no list": ({**TIERS, "secondary_tiers": FILES}, ("secondary_tiers", "list")),
    "tiers that are no objects": ({**TIERS, "secondary_tiers": ["fs"]}, ("secondary_tiers", "fs")),
}


@pytest.mark.parametrize(("options", "named"), CONNECTORS.values(), ids=CONNECTORS)
def test_connectors(vllm_config, monkeypatch, options: dict, named: tuple) -> None:
    on_gpu(monkeypatch)
    check_refusal(transferring(vllm_config, **options), named)


@pytest.mark.parametrize("simple", ["0", "1"])
@pytest.mark.parametrize("backend", ["native", "lmcache"])
@pytest.mark.parametrize("name", [None, "ExampleConnector"])
def test_the_connector_is_the_one_that_vllm_makes(
    vllm_config, monkeypatch, name, backend: str, simple: str
) -> None:
    """vLLM chooses it after it has asked the backend."""
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", simple)
    options = {"size": 1.0, "backend": backend, "module": name and "mine", "extra": 1}
    config = transferring(vllm_config, name, **options)
    found = compat.kv_connector(config)
    made = SimpleNamespace(
        cache_config=config.cache_config, kv_transfer_config=config.kv_transfer_config
    )
    VllmConfig._post_init_kv_transfer_config(made)
    transfer = made.kv_transfer_config
    assert (found.name, found.module) == (
        transfer.kv_connector,
        transfer.kv_connector_module_path,
    )
    assert found.name in KVConnectorFactory._registry
    assert found.options.items() <= transfer.kv_connector_extra_config.items()


def test_vllm_has_the_specs_and_tiers_that_are_served() -> None:
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

    assert set(compat.OFFLOADING_SPECS) == OffloadingSpecFactory._registry.keys()
    assert compat.FILES in SecondaryTierFactory._registry


def test_the_simple_connector_is_served_by_either_name(vllm_config, monkeypatch) -> None:
    on_gpu(monkeypatch)
    checks.check_config(transferring(vllm_config, compat.SIMPLE_OFFLOADING))
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", "1")
    config = transferring(vllm_config, None, size=1.0)
    assert compat.kv_connector(config).name == compat.SIMPLE_OFFLOADING
    checks.check_config(config)


def test_files_of_pages_that_differ_lie_in_different_folders(vllm_config, monkeypatch) -> None:
    """vLLM names files by the model and the tokens, and not by what the backend writes into a page."""
    on_gpu(monkeypatch)

    def folder(parallel: int = 1, **options) -> str:
        config = transferring(vllm_config, **TIERS)
        ranks = Changed(vllm_config.parallel_config, tensor_parallel_size=parallel)
        config = Changed(
            config,
            parallel_config=ranks,
            additional_config={"adamas": {"token_budget": 64, **options}},
        )
        found = []
        for _ in range(2):  # the second check changes nothing
            checks.check_config(config)
            (tier,) = config.kv_transfer_config.kv_connector_extra_config["secondary_tiers"]
            assert tier["type"] == "fs"
            found.append(tier["root_dir"])
        assert found[0] == found[1]
        assert Path(found[0]).parent == Path(FILES["root_dir"])
        return found[0]

    same = {"token_budget": 128, "layer_budgets": {"3": 64}, "kernels": "triton"}
    assert folder() == folder(**same) == folder(thresholds="rms")
    others = [{"thresholds": 0.5}, {"score": "manhattan"}, {"profile": MODEL.name}, {"parallel": 3}]
    assert len({folder(), *(folder(**other) for other in others)}) == 1 + len(others)


@pytest.mark.refuses("{row}")
@pytest.mark.parametrize(
    ("row", "changes", "named"),
    [
        (
            "contexts above 1M tokens on Hopper",
            {"max_model_len": (1 << 20) + 1},
            ("1048577", "--max-model-len 1048576", "triton"),
        ),
        (
            "steps of too many tokens on Hopper",
            {"max_model_len": 1 << 20, "get_num_kv_heads": lambda parallel: 1 << 16},
            (str(1 << 37), "--max-num-seqs", "triton"),
        ),
        (
            "more than 16 query heads per KV head on GPUs",
            {"get_num_attention_heads": lambda parallel: 51},
            ("17 query heads", "16", OTHER),
        ),
    ],
    ids=["context", "step", "heads"],
)
def test_what_the_cuda_kernels_cannot_hold(
    vllm_config, monkeypatch, record_property, row: str, changes: dict, named: tuple
) -> None:
    on_gpu(monkeypatch)
    model = Changed(vllm_config.model_config, **changes)
    changed = Changed(vllm_config, model_config=model)
    record_property("sentence", check_refusal(changed, named))


@pytest.mark.parametrize("size", [32, 80, 112, 160, 224])
def test_head_sizes_without_cuda_kernels(vllm_config, monkeypatch, size: int) -> None:
    on_gpu(monkeypatch)
    for kernels in ("auto", "cuda"):
        config = with_text(vllm_config, {}, kernels, get_head_size=lambda: size)
        check_refusal(config, (f"head_size {size}", "64, 96, 128, 192, 256", "kernels=triton"))
    checks.check_config(with_text(vllm_config, {}, "triton", get_head_size=lambda: size))


def test_head_sizes_that_the_prefill_kernel_does_not_take(vllm_config, monkeypatch) -> None:
    """The largest counts: beside it are layers of 256, as in Gemma 4."""
    on_gpu(monkeypatch)
    layers = SimpleNamespace(per_layer_overrides=[{"head_size": 256}, {}])
    large = {"get_head_size": lambda: 512, "model_arch_config": layers}
    config = with_text(vllm_config, {}, "triton", **large)
    for version in (2, 3):
        with_flash_attention(monkeypatch, version)
        check_refusal(config, ("head_size 512", f"FlashAttention {version}", "256", OTHER))
    with_flash_attention(monkeypatch, 4)
    checks.check_config(config)


def test_what_the_cuda_kernels_cannot_count(vllm_config, monkeypatch) -> None:
    on_gpu(monkeypatch)
    scheduler = Changed(vllm_config.scheduler_config, max_num_seqs=8193)
    named = ("8193 rows", "--max-num-seqs 8192", "triton")
    check_refusal(Changed(vllm_config, scheduler_config=scheduler), named)
    cache = Changed(vllm_config.cache_config, block_size=(1 << 16) + 64)
    check_refusal(Changed(vllm_config, cache_config=cache), ("65600", "--block-size", "triton"))


def test_other_devices(vllm_config, monkeypatch) -> None:
    on_gpu(monkeypatch, is_cuda=lambda: False, device_name="tpu")
    check_refusal(vllm_config, ("tpu", "CPU", "NVIDIA"))
    for capability in (None, SimpleNamespace(major=7, minor=5)):
        on_gpu(monkeypatch, get_device_capability=lambda found=capability: found)
        check_refusal(vllm_config, ("capability 8.0", OTHER))


@pytest.mark.parametrize(("major", "minor"), [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_take_the_triton_kernels(vllm_config, monkeypatch, major, minor) -> None:
    capability = SimpleNamespace(major=major, minor=minor)
    on_gpu(monkeypatch, get_device_capability=lambda: capability)
    assert registry.find_kernels("auto", "cuda", (major, minor)).name == "triton"
    for kernels in ("auto", "triton", "cuda"):
        checks.check_config(
            Changed(vllm_config, additional_config={"adamas": {"kernels": kernels}})
        )


def test_cuda_kernels_of_other_gpus_have_limits_of_their_own(vllm_config, monkeypatch) -> None:
    on_gpu(monkeypatch, get_device_capability=lambda: SimpleNamespace(major=8, minor=9))
    fewer = Limits(*(1 << 18, 1 << 16, 2048, 1 << 37, 16, 16, 1024, 1 << 10))
    most = {"sm80": fewer, "sm90": None}
    for module in ("policy", "backend"):
        monkeypatch.setattr(f"vllm_adamas.backends.cuda.{module}.limits", most.__getitem__)
    scheduler = Changed(vllm_config.scheduler_config, max_num_seqs=2049)
    cuda = {"additional_config": {"adamas": {"kernels": "cuda"}}}
    checks.check_config(Changed(vllm_config, **cuda))
    check_refusal(
        Changed(vllm_config, scheduler_config=scheduler, **cuda),
        ("2049 rows", "--max-num-seqs 2048", "triton"),
    )


def test_gpus_without_cuda_kernels(vllm_config, monkeypatch) -> None:
    on_gpu(monkeypatch, get_device_capability=lambda: SimpleNamespace(major=11, minor=0))
    checks.check_config(vllm_config)
    cuda = Changed(vllm_config, additional_config={"adamas": {"kernels": "cuda"}})
    check_refusal(cuda, ("kernels='cuda'", "12.x", "triton"))


@pytest.mark.parametrize(("major", "minor"), [(9, 0), (8, 0)])
def test_gpu_kernels_that_are_not_built(vllm_config, monkeypatch, major, minor) -> None:
    on_gpu(monkeypatch, get_device_capability=lambda: SimpleNamespace(major=major, minor=minor))
    name = library.library_of((major, minor))
    monkeypatch.setitem(library.LIBRARIES, name, Path(f"/no/libadamas_{name}.so"))
    monkeypatch.setattr("vllm_adamas.backends.cuda.backend.limits", library.limits.__wrapped__)
    library.load.cache_clear()
    cuda = Changed(vllm_config, additional_config={"adamas": {"kernels": "cuda"}})
    check_refusal(cuda, (f"libadamas_{name}.so", "ADAMAS_BUILD_CUDA=1", "kernels=triton"))
    triton = Changed(vllm_config, additional_config={"adamas": {"kernels": "triton"}})
    checks.check_config(triton)


def test_types_without_gpu_kernels(vllm_config, monkeypatch) -> None:
    on_gpu(monkeypatch)
    model = Changed(vllm_config.model_config, dtype=torch.float32)
    check_refusal(Changed(vllm_config, model_config=model), ("float32", "--dtype bfloat16"))
    cache = Changed(vllm_config.cache_config, cache_dtype="int8")
    check_refusal(Changed(vllm_config, cache_config=cache), ("--kv-cache-dtype int8", "fp8_e5m2"))


@pytest.mark.parametrize("kind", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_gpus_take_fp8_pages_whatever_the_processor(vllm_config, monkeypatch, kind: str) -> None:
    on_gpu(monkeypatch)
    for supported in ("_is_avx512_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, supported, lambda: False)
    cache = Changed(vllm_config.cache_config, cache_dtype=kind)
    checks.check_config(Changed(vllm_config, cache_config=cache))


def test_sizes_of_blocks(vllm_config) -> None:
    for size in (32, 64, 96, 128, 1024):
        cache = Changed(vllm_config.cache_config, block_size=size, user_specified_block_size=True)
        checks.check_config(Changed(vllm_config, cache_config=cache))


@pytest.mark.refuses("chunked local attention over chunks that blocks do not divide")
def test_blocks_divide_the_chunks_of_local_attention(vllm_config, record_property) -> None:
    model = Changed(vllm_config.model_config, attention_chunk_size=8192)
    for size, fits in ((64, True), (96, False)):
        cache = Changed(vllm_config.cache_config, block_size=size, user_specified_block_size=True)
        config = Changed(vllm_config, model_config=model, cache_config=cache)
        if fits:
            checks.check_config(config)
    named = ("block_size 96", "chunks of 8192 tokens", "--block-size", "divides 8192")
    record_property("sentence", check_refusal(config, named))


def test_a_size_of_blocks_that_vllm_has_yet_to_choose(vllm_config) -> None:
    """vLLM 0.33 asks the backend for the size on CPUs after the check; until then it is 16."""
    from vllm.v1.worker.utils import select_common_block_size

    from vllm_adamas.serving.backend import AdamasBackend

    cache = Changed(vllm_config.cache_config, block_size=16)
    assert not cache.user_specified_block_size
    checks.check_config(Changed(vllm_config, cache_config=cache))
    for default in (16, 128):
        assert AdamasBackend.supports_block_size(AdamasBackend.get_preferred_block_size(default))
    with pytest.raises(ValueError, match="No common block size for 16"):  # none stays unchecked
        select_common_block_size(16, [AdamasBackend])
