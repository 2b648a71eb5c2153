"""Refuses what the backend cannot serve before a server starts, with one sentence per constraint."""

from __future__ import annotations

import hashlib
import json
from difflib import get_close_matches

import torch

from vllm_adamas import __version__, identity
from vllm_adamas import profile as profiles
from vllm_adamas.backends.base import MAX_GROUP, MIN_CAPABILITY
from vllm_adamas.backends.registry import find_kernels, kernel_names
from vllm_adamas.config import AdamasConfig
from vllm_adamas.dtypes import KV_CACHE_DTYPES, MODEL_DTYPES, fp8_element
from vllm_adamas.errors import AdamasError, shortened
from vllm_adamas.layout import HEAD_SIZES, TILE
from vllm_adamas.serving import compat
from vllm_adamas.serving.dcp import longest_share

OTHER_BACKEND = "serve this model with another --attention-backend"
CPU_FP8_MULTIPLE = 32  #: of head sizes, in vLLM's CPU kernel over fp8 pages
FA_HEAD_SIZE = 256  #: the largest of FlashAttention 2 and 3
FA3_SINK_HEADS = 64  #: most query heads whose sinks FlashAttention 3 takes


def check_config(vllm_config) -> AdamasConfig:
    """Checks a complete VllmConfig that selects the adamas backend.

    Defaults that depend on the model and the hash of a profile are written into the configuration, so that
    every process uses the same ones.

    Raises:
        AdamasError: the first constraint that is not met.
    """
    _check_place_of_options(vllm_config.additional_config)
    config = AdamasConfig.parse(adamas_options(vllm_config))
    for check in (
        _check_device,
        _check_parallel,
        _check_features,
        _check_connector,
        _check_speculation,
        _check_model,
        _check_context_parallel,
        _check_cache,
    ):
        check(vllm_config)
    model = vllm_config.model_config
    if model is not None:
        check_layers(model, config)
    _check_kernels(vllm_config, config)
    if model is None:
        return config
    _admit_budgets(vllm_config, config)
    config = _pin(vllm_config, _with_pinned_profile(model, resolve(model, config)))
    _separate_files(vllm_config, config)
    return config


def resolve(model, config: AdamasConfig) -> AdamasConfig:
    """The configuration with its defaults for a model, a ModelConfig of vLLM."""
    undecided = config.combine is None and config.profile is None
    return config.resolved(
        qk_norm=undecided and identity.has_qk_norm(model),
        budgeted=getattr(model.hf_text_config, "num_hidden_layers", None) != 0
        and _kinds_of_layers(model).get(0) not in WITHOUT_BUDGET,
    )


def read_config(vllm_config) -> AdamasConfig:
    """The configuration that :func:`check_config` has written down, in any process of a server."""
    return AdamasConfig.parse(adamas_options(vllm_config)).resolved()


def _with_pinned_profile(model, config: AdamasConfig) -> AdamasConfig:
    if config.profile is None:
        return config
    profile = profiles.load(config.profile)
    profiles.check_fits(profile, config.profile.partition("#")[0], identity.identify(model))
    return config.model_copy(update={"profile": profiles.pin(config.profile)})


def _pin(vllm_config, config: AdamasConfig) -> AdamasConfig:
    """Writes the options that depend on the model or on a file into ``additional_config``."""
    pinned = config.model_dump(
        mode="json", include={"combine", "num_dense_layers", "layer_budgets", "profile"}
    )
    additional = vllm_config.additional_config
    if isinstance(additional, dict | None):  # else it is an object of another plugin
        options = {**(adamas_options(vllm_config) or {}), **pinned}
        vllm_config.additional_config = {**(additional or {}), "adamas": options}
    return config


def _admit_budgets(vllm_config, config: AdamasConfig) -> None:
    """Lets requests ask for token budgets, if the operator does."""
    if config.max_token_budget is None:
        return
    if hidden := compat.hides_requests(vllm_config):
        what, way_out = hidden
        _refuse(f"max_token_budget with {what}", f"{way_out}, or leave max_token_budget out")
    from vllm_adamas.serving import request_budgets

    runner = compat.model_runner(vllm_config)
    compat.add_logits_processor(vllm_config, request_budgets.processor(runner, config))


def warnings(vllm_config, config: AdamasConfig) -> list[str]:
    """Settings that are served but known to give poor quality: one sentence each, with a better one."""
    model, found = vllm_config.model_config, []
    if model is not None and config.profile is None and identity.has_qk_norm(model):
        also = " and score dot" if config.score == "manhattan" else ""
        better = f"use a calibration profile{also} (`vllm-adamas calibrate`)"
        if model.is_hybrid or len(head_sizes(model)) > 1:  # which cannot be calibrated
            better = "raise token_budget"
        found.append(
            "This model normalises its keys (QK-norm), so they share a large mean that 2-bit codes "
            f"represent badly: {better}."
        )
    return found


def _check_place_of_options(additional) -> None:
    """Refuses misplaced options. Other entries of ``additional_config`` may belong to another plugin."""
    for key in additional if isinstance(additional, dict) else ():
        misspelt = key != "adamas" and get_close_matches(key.lower(), ["adamas"], cutoff=0.8)
        if misspelt or key in AdamasConfig.model_fields:
            entry = "OPTIONS" if misspelt else f'{{"{key}": ...}}'
            raise AdamasError(
                f"additional_config[{key!r}] is not read: options of the adamas backend are written as "
                f"--additional-config '{{\"adamas\": {entry}}}'."
            )


def adamas_options(vllm_config):
    """The ``adamas`` entry of ``--additional-config``."""
    additional = vllm_config.additional_config
    return additional.get("adamas") if isinstance(additional, dict) else None


def _refuse(what: str, way_out: str) -> None:
    raise AdamasError(f"the adamas backend does not support {what}: {way_out}.")


def block_size_multiple() -> int:
    """Required divisor of the block size in tokens: vLLM's CPU prefill kernel works in blocks of 32."""
    return 32 if compat.on_cpu() else TILE


def _check_kernels(vllm_config, config: AdamasConfig) -> None:
    device, model = "cpu" if compat.on_cpu() else "cuda", vllm_config.model_config
    if config.kernels not in kernel_names(device):
        names = ", ".join(kernel_names(device))
        _refuse(f"kernels={config.kernels!r} on this device", f"choose one of {names}")
    capability = _capability()
    kernels = find_kernels(config.kernels, device, capability)
    if model is None:
        return
    parallel = vllm_config.parallel_config
    kv_heads = model.get_num_kv_heads(parallel)
    ranks = parallel.decode_context_parallel_size  # decode each other's queries, over a share each
    group = ranks * model.get_num_attention_heads(parallel) // kv_heads
    if device == "cuda" and group > MAX_GROUP:
        _refuse(f"{group} query heads per KV head on GPUs (at most {MAX_GROUP})", OTHER_BACKEND)
    sizes = head_sizes(model)
    _check_prefill(sizes)
    if _uses_sinks(model.hf_text_config):
        num_heads = model.get_num_attention_heads(parallel)
        check_sinks(model.dtype, model.get_head_size(), num_heads)
    kernels.backend_class().check_server(
        sizes,
        vllm_config.cache_config.block_size,
        kv_heads,
        compat.max_decode_rows(vllm_config),
        longest_share(model.max_model_len, ranks, parallel.cp_kv_cache_interleave_size),
        capability,
    )


def _check_prefill(sizes: list[int]) -> None:
    """Refuses head sizes that vLLM's FlashAttention does not take on this GPU."""
    if compat.on_cpu() or (size := sizes[-1]) <= FA_HEAD_SIZE:
        return
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(head_size=size)
    if version != 4:
        _refuse(
            f"head_size {size} on this GPU (vLLM's prefill kernel, FlashAttention {version}, takes at most "
            f"{FA_HEAD_SIZE})",
            OTHER_BACKEND,
        )


def check_sinks(dtype: torch.dtype, head_size: int, num_heads: int) -> None:
    """Checks that vLLM's kernel of prefill takes the learned sinks of a model or a layer.

    Args:
        num_heads: query heads on a rank.

    Raises:
        AdamasError: it does not.
    """
    if compat.on_cpu():
        return
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(head_size=head_size)
    if version not in (3, 4):
        _refuse(
            "learned attention sinks on this GPU (vLLM's prefill kernel, FlashAttention 2, has none)",
            OTHER_BACKEND,
        )
    if dtype != torch.bfloat16:
        _refuse(
            f"learned attention sinks with dtype {dtype} on GPUs (FlashAttention reads them in bfloat16)",
            "pass --dtype bfloat16",
        )
    if version == 3 and num_heads > FA3_SINK_HEADS:
        _refuse(
            f"learned attention sinks of {num_heads} query heads on a GPU (FlashAttention 3 takes "
            f"{FA3_SINK_HEADS})",
            "raise --tensor-parallel-size",
        )


def _capability() -> tuple[int, int]:
    from vllm.platforms import current_platform

    found = current_platform.get_device_capability()
    return (found.major, found.minor) if found else (0, 0)


def _check_device(vllm_config) -> None:
    from vllm.platforms import current_platform

    if compat.on_cpu():
        return
    if not current_platform.is_cuda():
        _refuse(f"{current_platform.device_name} devices", "serve on a CPU or an NVIDIA GPU")
    if _capability() < MIN_CAPABILITY:
        _refuse(
            f"GPUs below compute capability {'.'.join(map(str, MIN_CAPABILITY))}", OTHER_BACKEND
        )


def _check_parallel(vllm_config) -> None:
    parallel = vllm_config.parallel_config
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        _refuse("prefill context parallelism (PCP)", "drop --prefill-context-parallel-size")
    if parallel.use_ubatching:
        # Their layers run concurrently but share the workspace of the process.
        _refuse("micro-batches that overlap", "drop --enable-dbo and --ubatch-size")


def _check_context_parallel(vllm_config) -> None:
    """Checks what ranks that keep a share of every context each (``dcp.py``) are asked to serve."""
    if vllm_config.parallel_config.decode_context_parallel_size == 1:
        return
    way_out, model = "drop --decode-context-parallel-size", vllm_config.model_config
    if compat.on_cpu():
        _refuse("DCP on CPUs, where vLLM has none", way_out)
    if compat.kv_connector(vllm_config) is not None:
        _refuse(f"KV connectors with DCP, {UNTRIED}", way_out)
    if model is None:
        return
    if model.is_hybrid:
        _refuse("DCP of models with state-space or linear-attention layers", way_out)
    if "sliding_attention" in _kinds_of_layers(model).values():
        _refuse("DCP of models with sliding windows, for which vLLM has none", way_out)
    if model.attention_chunk_size:
        _refuse("DCP of models with chunked local attention", way_out)
    if _uses_sinks(model.hf_text_config):
        _refuse("DCP of models with learned attention sinks", way_out)
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    if get_flash_attn_version(head_size=head_sizes(model)[-1]) == 2:
        _refuse(
            "DCP on this GPU (vLLM's prefill kernel, FlashAttention 2, can fail for mixed batches of it)",
            way_out,
        )


def _check_features(vllm_config) -> None:
    from vllm import envs

    cache = vllm_config.cache_config
    if vllm_config.attention_config.use_non_causal:
        _refuse("non-causal attention", OTHER_BACKEND)
    if vllm_config.diffusion_config is not None:
        _refuse("block diffusion (non-causal attention over a canvas)", OTHER_BACKEND)
    if cache.kv_sharing_fast_prefill:
        # Its metadata present the prompts' last tokens as decode steps, which would be sparse.
        _refuse("the fast prefill of layers that share keys", "drop --kv-sharing-fast-prefill")
    if envs.VLLM_BATCH_INVARIANT:
        _refuse("batch invariance", "unset VLLM_BATCH_INVARIANT")
    if envs.VLLM_KV_CACHE_LAYOUT not in (None, "LBHNC", "HND"):  # two names of the same layout
        _refuse(
            f"the layout VLLM_KV_CACHE_LAYOUT={envs.VLLM_KV_CACHE_LAYOUT}",
            "unset it, or set it to LBHNC",
        )


#: Why connectors, specs, tiers and methods of speculative decoding without a better reason are not served.
UNTRIED = "which has not been tried with pages that carry signatures"
#: Better reasons, for vLLM's other connectors, by how their names begin.
CONNECTORS = {
    "DecodeBench": "which fills pages with made-up values",
    "ExampleConnector": "whose files do not say how keys were coded",
    "ExampleHiddenStates": "which is for speculative decoding by extract_hidden_states",
    "HF3FS": "whose files do not say how keys were coded",
    "HiSparse": "which is for MLA",
    "LMCache": "which expects pages of K and V alone",
    "Mooncake": "which does not ask whether the other server codes keys alike",
    "MoRIIO": "which does not ask whether the other server codes keys alike",
    "Multi": "whose parts it cannot check",
    "Nixl": "which does not ask whether the other server codes keys alike",
}
USE_OFFLOADING = (
    f"name {compat.OFFLOADING}, or give --kv-offloading-size with --kv-offloading-backend native"
)


def _check_connector(vllm_config) -> None:
    """Lets through the connectors that copy pages as whole runs of bytes, signatures included."""
    connector = compat.kv_connector(vllm_config)
    if connector is None:
        return
    if compat.on_cpu():
        _refuse(
            "KV connectors on CPUs, where vLLM does not offload",
            "drop --kv-offloading-size and --kv-transfer-config",
        )
    if connector.module is not None:
        module = shortened(connector.module)
        _refuse(
            f"KV connectors of other packages (kv_connector_module_path={module})", USE_OFFLOADING
        )
    if connector.name == compat.SIMPLE_OFFLOADING:
        if connector.options.get("kv_offload_backend", "cpu") != "cpu":
            _refuse(
                f"the KV connector {compat.SIMPLE_OFFLOADING} with a disk, which takes blocks of multiples of 4096 bytes",
                "leave kv_offload_backend out of kv_connector_extra_config",
            )
        return
    if connector.name != compat.OFFLOADING:
        known = (why for start, why in CONNECTORS.items() if connector.name.startswith(start))
        why = next(known, UNTRIED)
        _refuse(f"the KV connector {shortened(connector.name)}, {why}", USE_OFFLOADING)
    memory, tiered = compat.OFFLOADING_SPECS
    spec = connector.options.get("spec_name", memory)
    if spec not in (memory, tiered):
        _refuse(
            f"the offloading spec {shortened(spec)}, {UNTRIED}",
            f"give {memory} or {tiered} as spec_name",
        )
    if connector.options.get("canonical_layout"):
        _refuse(
            "canonical_layout, which knows pages of K and V alone",
            "leave it out of kv_connector_extra_config",
        )
    _check_tiers(connector.options.get("secondary_tiers", []))


def _check_tiers(tiers) -> None:
    """Checks where TieringOffloadingSpec keeps what does not fit into the memory of the host."""
    if not isinstance(tiers, list) or not all(isinstance(tier, dict) for tier in tiers):
        raise AdamasError(
            "secondary_tiers in kv_connector_extra_config is not a list of objects: write "
            '[{"type": "fs", "root_dir": FOLDER}].'
        )
    for tier in tiers:
        if not compat.offloads_to_files(tier):
            _refuse(
                f"the secondary tier {shortened(tier.get('type'))}, {UNTRIED}",
                f"give the type {compat.FILES}, or leave secondary_tiers out",
            )
        if not isinstance(tier.get("root_dir"), str):
            raise AdamasError(
                "a secondary tier of the type fs has no root_dir: name a folder in its object."
            )


def _separate_files(vllm_config, config: AdamasConfig) -> None:
    """Gives pages in files a folder of their own for all that decides about their bytes.

    Otherwise servers that share a folder could read pages of another backend, or signatures that were
    coded in another way.
    """
    connector, model = compat.kv_connector(vllm_config), vllm_config.model_config
    if connector is None or not connector.options.get("secondary_tiers"):
        return
    parts = (
        __version__,
        config.score,
        str(config.coding(model.get_head_size())),
        config.profile,
        vllm_config.parallel_config.tensor_parallel_size,
    )
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
    compat.put_offloaded_files_below(vllm_config, f"adamas-{digest}")


#: Methods of speculative decoding that are served.
SPECULATION = ("ngram", "ngram_gpu", "suffix", "draft_model", "medusa", "eagle", "eagle3", "mtp")
#: Why vLLM's other methods are not.
OTHER_SPECULATION = {
    "custom_class": UNTRIED,
    "dflash": UNTRIED,
    "dspark": UNTRIED,
    "extract_hidden_states": "which drafts nothing and needs a KV connector that is not served",
    "mlp_speculator": "for which vLLM has no drafter",
}


def _check_speculation(vllm_config) -> None:
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    method = speculative.method
    if method not in SPECULATION:
        why, names = OTHER_SPECULATION.get(method, UNTRIED), ", ".join(SPECULATION)
        _refuse(f"speculative decoding by {method}, {why}", f"choose one of {names}")
    if method == "ngram_gpu" and compat.on_cpu():
        _refuse(
            "speculative decoding by ngram_gpu on CPUs, where vLLM's drafter does not run",
            "choose the method ngram",
        )
    if speculative.enable_adaptive_verification:
        _refuse(
            "adaptive verification, which tells the number of drafts to the GPU alone",
            "drop enable_adaptive_verification from --speculative-config",
        )
    if compat.drafter_reads_target(vllm_config):
        _refuse(
            "drafters that read the target's keys under another backend (Gemma 4)",
            "choose another method in --speculative-config",
        )
    if compat.draft_backend_is_ignored(vllm_config):
        _refuse(
            "draft models by Model Runner V2, which gives their layers this backend",
            "set VLLM_USE_V2_MODEL_RUNNER=0, or choose another method in --speculative-config",
        )
    compat.name_draft_backend(vllm_config)
    if compat.drafts_with_adamas(vllm_config):
        _refuse(
            "drafters with layers of their own, which would have no token budget",
            "name another attention_backend for the drafter in --speculative-config",
        )


def _check_model(vllm_config) -> None:
    model = vllm_config.model_config
    if model is None:
        return
    text = model.hf_text_config
    if model.use_mla:
        _refuse("multi-head latent attention (MLA)", OTHER_BACKEND)
    if model.is_encoder_decoder:
        _refuse("encoder-decoder models", OTHER_BACKEND)
    if model.runner_type != "generate":
        _refuse(f"the {model.runner_type} runner (non-causal attention)", OTHER_BACKEND)
    if model.is_mm_prefix_lm:
        _refuse("prefix language models (non-causal attention over images)", OTHER_BACKEND)
    if _is_non_causal(model):
        _refuse("models that attend to later tokens (non-causal attention)", OTHER_BACKEND)
    if model.is_attention_free:
        _refuse("models without attention", "drop --attention-backend adamas")
    if model.rswa_window is not None:
        _refuse("reference sliding window attention (R-SWA)", OTHER_BACKEND)
    if getattr(text, "dual_chunk_attention_config", None):
        _refuse("dual chunk attention", OTHER_BACKEND)
    if _uses_alibi(text):
        _refuse("ALiBi position biases", OTHER_BACKEND)
    if getattr(text, "param_sink_number", 0):
        _refuse("learned sink tokens with keys of their own", OTHER_BACKEND)
    dtypes = MODEL_DTYPES["cpu" if compat.on_cpu() else "cuda"]
    if model.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        _refuse(f"dtype {model.dtype} on this device", f"pass --dtype {names}")
    for size in head_sizes(model):
        if size not in HEAD_SIZES:
            _refuse(
                f"head_size {size} (kernels exist for {', '.join(map(str, HEAD_SIZES))})",
                OTHER_BACKEND,
            )
    value_size = getattr(text, "v_head_dim", None) or getattr(text, "v_channels", None)
    if value_size not in (None, model.get_head_size()) and not _pads_values(text):
        _refuse(
            f"value heads of another size than key heads ({value_size} and {model.get_head_size()})",
            OTHER_BACKEND,
        )


#: Architectures that pad their values to the size of the keys, so that layers have heads of one size.
PADS_VALUES = {"MiniCPM3ForCausalLM"}


def _pads_values(text) -> bool:
    return bool(PADS_VALUES.intersection(getattr(text, "architectures", None) or ()))


def head_sizes(model) -> list[int]:
    """The head sizes of a model's layers, ascending."""
    text = model.hf_text_config
    if _pads_values(text):  # its head_dim is that of the rotated part
        return [text.qk_nope_head_dim + text.qk_rope_head_dim]
    return compat.head_sizes(model)


#: Kinds of layers that are dense whatever their budget, or keep no keys, in a model's ``layer_types``.
WITHOUT_BUDGET = (
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
    "mamba",
    "conv",
    "mlp",
    "moe",
)


def check_layers(model, config: AdamasConfig) -> None:
    """Checks the layers that have a budget of their own against a model's configuration.

    Raises:
        AdamasError: the model has no such layer, or the layer has no budget.
    """
    layers, kinds = model.get_total_num_hidden_layers(), _kinds_of_layers(model)
    for number in config.layer_budgets:
        if number >= layers:
            raise AdamasError(
                f"adamas.layer_budgets names layer {number}, and the layers of this model are 0 to "
                f"{layers - 1}: name layers of the model."
            )
        if kinds.get(number) in WITHOUT_BUDGET:
            raise AdamasError(
                f"adamas.layer_budgets names layer {number}, which has no token budget in this model "
                f"({kinds[number]}): leave it out."
            )


def _kinds_of_layers(model) -> dict[int, str]:
    """The kinds of a model's layers by number, as far as its configuration tells them."""
    return dict(enumerate(getattr(model.hf_text_config, "layer_types", None) or ()))


#: Fields of a model's configuration that declare learned sinks in some layers.
SINK_FLAGS = (
    "attention_sinks",
    "swa_attention_sink_enabled",
    "add_swa_attention_sink_bias",
    "add_full_attention_sink_bias",
)
GRANITE = ("granite", "granitemoe")


def _uses_sinks(text) -> bool:
    kind = getattr(text, "model_type", "")
    if kind in GRANITE:  # sinks unless the flag says otherwise, if its layers are of several kinds
        return getattr(text, "attention_sinks", getattr(text, "layer_types", None) is not None)
    return kind == "gpt_oss" or any(getattr(text, flag, False) for flag in SINK_FLAGS)


def _is_non_causal(model) -> bool:
    """Whether the configuration of a decoder declares bidirectional attention for prompts or all tokens."""
    configs = (model.hf_config, model.hf_text_config)
    declared = any(getattr(config, "is_causal", None) is False for config in configs)
    return declared or getattr(model.hf_text_config, "model_type", "") == "hrm_text"


#: Architectures whose ALiBi their configurations do not mention.
ALIBI_ARCHITECTURES = {"Step1ForCausalLM"}


def _uses_alibi(text) -> bool:
    nested = getattr(text, "attn_config", None)
    declared = nested.get("alibi") if isinstance(nested, dict) else getattr(nested, "alibi", False)
    return bool(
        getattr(text, "alibi", False)
        or getattr(text, "model_type", "") == "bloom"
        or getattr(text, "position_embedding_type", "") == "alibi"
        or declared
        or ALIBI_ARCHITECTURES.intersection(getattr(text, "architectures", None) or ())
    )


def _check_cache(vllm_config) -> None:
    cache = vllm_config.cache_config
    multiple, kind = block_size_multiple(), cache.cache_dtype
    # A block size chosen by vLLM may still change, to one that the backend supports.
    if cache.user_specified_block_size and cache.block_size % multiple:
        _refuse(
            f"block_size {cache.block_size}",
            f"pass a --block-size that is a multiple of {multiple}",
        )
    chunk = vllm_config.model_config and vllm_config.model_config.attention_chunk_size
    if chunk and chunk % cache.block_size:
        _refuse(
            f"block_size {cache.block_size} with chunked local attention over chunks of {chunk} tokens",
            f"pass a --block-size that is a multiple of {multiple} and divides {chunk}",
        )
    if kind not in KV_CACHE_DTYPES:
        _refuse(f"--kv-cache-dtype {kind}", f"choose one of {', '.join(KV_CACHE_DTYPES)}")
    if (
        kind in ("bfloat16", "float16")
        and vllm_config.model_config is not None
        and getattr(torch, kind) != vllm_config.model_config.dtype
    ):
        _refuse(
            f"--kv-cache-dtype {kind} with dtype {vllm_config.model_config.dtype}",
            "pass --kv-cache-dtype auto",
        )
    if not fp8_element(kind) or not compat.on_cpu():
        return
    if not compat.cpu_prefills_fp8():
        _refuse(
            "an fp8 KV cache on this processor (vLLM's prefill kernel needs AVX-512 or AMX)",
            "pass --kv-cache-dtype auto",
        )
    model = vllm_config.model_config
    for size in () if model is None else head_sizes(model):
        if size % CPU_FP8_MULTIPLE:
            _refuse(
                f"an fp8 KV cache with head_size {size} on CPUs (vLLM's prefill kernel takes multiples of "
                f"{CPU_FP8_MULTIPLE})",
                "pass --kv-cache-dtype auto",
            )
