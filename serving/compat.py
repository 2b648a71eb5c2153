"""Everything that depends on a vLLM version: the supported range, registration and two patches.

No other module checks a version or patches vLLM or Python. Both patches wrap a method once per process,
call the original and leave the behaviour of other backends unchanged.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from packaging.version import InvalidVersion, Version

from vllm_adamas.errors import AdamasError

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata

NAME = "ADAMAS"
BACKEND_PATH = "vllm_adamas.serving.backend.AdamasBackend"

#: The first supported release, and the first unsupported one after it. 0.32 introduced the LBHNC cache
#: layout and ``customize_spec`` with ``state_content_bytes``, which pages with signatures need.
VLLM_MIN = (0, 32)
VLLM_MAX = (0, 34)
SUPPORTED = ">= {}.{}, < {}.{}".format(*VLLM_MIN, *VLLM_MAX)


def vllm_version() -> str:
    """The installed vLLM's version.

    Raises:
        AdamasError: vLLM is not installed.
    """
    try:
        import vllm
    except ModuleNotFoundError:
        raise AdamasError(
            "vllm-adamas runs inside vLLM, which is not installed: install 'vllm-adamas[cuda]' on a "
            "host with an NVIDIA GPU or 'vllm-adamas[cpu]' elsewhere."
        ) from None
    return vllm.__version__


def unsupported_vllm() -> str | None:
    """The message that refuses the installed vLLM, or None if it is in the supported range.

    Raises:
        AdamasError: vLLM is not installed.
    """
    version = vllm_version()
    try:
        release = Version(version).release[:2]  # ignores pre-release and local parts
    except InvalidVersion:  # vLLM calls a build without a version "dev"
        return None
    if not VLLM_MIN <= release < VLLM_MAX:
        return (
            f"vLLM {version} is not supported: this release of vllm-adamas needs vLLM {SUPPORTED}."
        )
    return None


def require_supported_vllm() -> None:
    """
    Raises:
        AdamasError: vLLM is missing or outside the supported range.
    """
    if problem := unsupported_vllm():
        raise AdamasError(problem)


def _member():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, BACKEND_PATH)
    return AttentionBackendEnum[NAME]


def _unpickle_member():
    return _member()


def register_backend() -> None:
    """Adds ADAMAS to vLLM's enum of attention backends.

    A spawned engine core unpickles its configuration before it loads plugins, when the enum does not
    have the new member yet. The member therefore pickles as a call that registers it first.
    """
    member = _member()
    member.__reduce_ex__ = lambda protocol: (_unpickle_member, ())


def _is_adamas(backend) -> bool:
    return getattr(backend, "name", None) == NAME


def is_selected(vllm_config) -> bool:
    """Whether a configuration selects the adamas backend, for all layers or for some kinds."""
    attention = getattr(vllm_config, "attention_config", None)
    chosen = [
        getattr(attention, "backend", None),
        *(getattr(attention, "backend_per_kind", None) or {}).values(),
    ]
    return any(map(_is_adamas, chosen))


#: Methods of speculative decoding whose drafters have attention layers of their own.
DRAFTERS_WITH_LAYERS = ("draft_model", "eagle", "eagle3", "mtp")
#: Backends for the layers of a drafter that has none of its own: the first that has the type of the cache.
DRAFT_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")


def name_draft_backend(vllm_config) -> None:
    """Gives the layers of a drafter a dense backend where they would take the target's.

    Model Runner V1 chooses their backend anew unless the speculative configuration names one. V2 takes the target's, and
    for a draft model even then (:func:`draft_backend_is_ignored`).
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    speculative = vllm_config.speculative_config
    if speculative.method not in DRAFTERS_WITH_LAYERS or not vllm_config.use_v2_model_runner:
        return
    if speculative.attention_backend is None and _is_adamas(vllm_config.attention_config.backend):
        kind = speculative.kv_cache_dtype or vllm_config.cache_config.cache_dtype
        backends = [AttentionBackendEnum[name] for name in DRAFT_BACKENDS]
        able = (one for one in backends if one.get_class().supports_kv_cache_dtype(kind))
        speculative.attention_backend = next(able, backends[0])


def draft_backend_is_ignored(vllm_config) -> bool:
    """Whether the layers of a drafter take the target's backend whatever is named for them.

    ``StandaloneARSpeculator.load_draft_model`` does not call ``apply_draft_overrides``, as ``load_eagle_model`` does.
    """
    return vllm_config.use_v2_model_runner and vllm_config.speculative_config.uses_draft_model()


def drafts_with_adamas(vllm_config) -> bool:
    """Whether the layers of a drafter would take the adamas backend, once :func:`name_draft_backend` has run.

    Backends per kind of layer hold for both models.
    """
    speculative, attention = vllm_config.speculative_config, vllm_config.attention_config
    if speculative.method not in DRAFTERS_WITH_LAYERS:
        return False
    chosen = [speculative.attention_backend, *(attention.backend_per_kind or {}).values()]
    return any(map(_is_adamas, chosen))


def drafter_reads_target(vllm_config) -> bool:
    """Whether the layers of a drafter have no keys of their own and read the target's."""
    return vllm_config.speculative_config.use_gemma4_mtp()


def _wrap_classmethod(cls: type, name: str, make: Callable) -> None:
    original = getattr(cls, name).__func__
    if getattr(original, "_vllm_adamas", False):
        return
    wrapped = functools.wraps(original)(make(original))
    wrapped._vllm_adamas = True
    setattr(cls, name, classmethod(wrapped))


def check_config_with(check: Callable) -> None:
    """Patch 1: runs ``check(vllm_config)`` after the platform has completed a configuration.

    An invalid option must end the command before an engine process starts. vLLM has no hook for a
    plugin there: it first queries an attention backend in the worker, when weights are being loaded.
    The patch can go when backends can validate a VllmConfig.
    """
    from vllm.platforms import current_platform

    def make(original):
        def check_and_update_config(cls, vllm_config):
            original(cls, vllm_config)
            if is_selected(vllm_config):
                check(vllm_config)

        return check_and_update_config

    _wrap_classmethod(type(current_platform), "check_and_update_config", make)
    _one_sentence_errors()


def _one_sentence_errors() -> None:
    """Makes an AdamasError that ends a command print its message instead of a traceback."""
    previous = sys.excepthook
    if getattr(previous, "_vllm_adamas", False):
        return

    def hook(kind, error, traceback):
        cause = error
        while cause is not None and not isinstance(cause, AdamasError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            print(f"vllm-adamas: {cause}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    hook._vllm_adamas = True
    sys.excepthook = hook


def select_on_cpu(problems: Callable[..., list[str]]) -> None:
    """Patch 2: makes the CPU platform honour ``--attention-backend adamas``.

    ``CpuPlatform.get_attn_backend_cls`` ignores the selected backend and returns CPU_ATTN. An
    out-of-tree platform would replace the whole platform, and only one can be active. Overriding the
    CPU_ATTN entry would affect encoder layers too. The patch can go when the CPU platform resolves
    registered backends as the CUDA platform does.

    Args:
        problems: returns the reasons why the backend cannot serve a layer, given the fields of vLLM's
            selector configuration.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return

    def make(original):
        def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
            if getattr(selected_backend, "name", None) != NAME:
                return original(cls, selected_backend, attn_selector_config, num_heads)
            reasons = problems(**attn_selector_config._asdict())
            if reasons:
                raise AdamasError(
                    f"the adamas backend cannot serve a layer of this model ({'; '.join(reasons)}): "
                    "serve it with --attention-backend cpu_attn."
                )
            return BACKEND_PATH

        return get_attn_backend_cls

    _wrap_classmethod(type(current_platform), "get_attn_backend_cls", make)


def page_spec(spec, content_bytes: int):
    """A copy of a KV cache spec whose pages hold ``content_bytes`` per token and KV head.

    Its caller ``AttentionBackend.customize_spec`` is a temporary interface of vLLM (vllm issue 42449).
    """
    import dataclasses

    return dataclasses.replace(spec, state_content_bytes=content_bytes)


#: vLLM's KV connectors that copy pages as whole runs of bytes, and the specs of the first that do: to host memory,
#: and from there to secondary tiers.
OFFLOADING, SIMPLE_OFFLOADING = "OffloadingConnector", "SimpleCPUOffloadConnector"
OFFLOADING_SPECS = ("CPUOffloadingSpec", "TieringOffloadingSpec")
FILES = "fs"  #: the type of secondary tier that is a folder of files


class Connector(NamedTuple):
    """A KV connector as a configuration names it.

    Args:
        name: of its class.
        options: its ``kv_connector_extra_config``.
        module: where its class is imported from if it is not one of vLLM's.
    """

    name: str
    options: dict
    module: str | None = None


def kv_connector(vllm_config) -> Connector | None:
    """The KV connector that vLLM will make, if any.

    vLLM makes one of ``--kv-offloading-size`` after it has called :func:`check_config_with`'s check.
    """
    from vllm import envs

    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    name = None if transfer is None else transfer.kv_connector
    if cache.kv_offloading_size is not None:
        if cache.kv_offloading_backend == "lmcache":
            name = "LMCacheMPConnector"
        else:
            simple = envs.environment_variables["VLLM_USE_SIMPLE_KV_OFFLOAD"]()
            name = SIMPLE_OFFLOADING if simple else OFFLOADING
    if name is None:
        return None
    if transfer is None:
        return Connector(name, {})
    return Connector(name, transfer.kv_connector_extra_config, transfer.kv_connector_module_path)


def offloads_to_files(tier: dict) -> bool:
    """Whether a secondary tier of vLLM's ``TieringOffloadingSpec`` is a folder of files."""
    return tier.get("type") == FILES


def put_offloaded_files_below(vllm_config, folder: str) -> None:
    """Adds a folder to the paths of tiers that keep pages in files; once.

    vLLM names these files by the model, the cache's dtype, the layers' names and the tokens. Neither the
    attention backend nor what it writes into a page is among them.
    """
    transfer = vllm_config.kv_transfer_config
    tiers = transfer.kv_connector_extra_config.get("secondary_tiers", [])
    tiers = [
        {**tier, "root_dir": str(Path(tier["root_dir"], folder))}
        if offloads_to_files(tier) and Path(tier["root_dir"]).name != folder
        else tier
        for tier in tiers
    ]
    options = transfer.kv_connector_extra_config
    transfer.kv_connector_extra_config = {**options, "secondary_tiers": tiers}


def head_sizes(model) -> list[int]:
    """The head sizes of the layers of a ModelConfig, ascending: more than one in Gemma 4."""
    layers = model.model_arch_config.per_layer_overrides or ()
    return sorted({model.get_head_size(), *(layer.get("head_size", 0) for layer in layers)} - {0})


#: How the name of the backend begins that vLLM derives for the layers of :func:`attention_chunk`.
CHUNKED = "ChunkedLocalAttention_"


def attention_chunk(layer) -> int:
    """Tokens of the chunks that a layer attends within (Llama 4's local layers); 0 if it attends to all.

    The builder that vLLM derives for such layers cuts a step's requests at the chunks. Those parts are the
    requests that our builder sees, each with the blocks of one chunk.
    """
    from vllm.model_executor.layers.attention import ChunkedLocalAttention

    return layer.attention_chunk_size if isinstance(layer, ChunkedLocalAttention) else 0


def on_cpu() -> bool:
    """Whether vLLM's platform is the CPU."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def device() -> str:
    """What vLLM serves on: ``cpu``, ``cuda`` for an NVIDIA GPU, empty for another device or none."""
    from vllm.platforms import current_platform

    if on_cpu():
        return "cpu"
    return "cuda" if current_platform.is_cuda() else ""


def cpu_attention() -> tuple:
    """vLLM's CPU attention operations, and the function that returns the kernel's name for a dtype, a
    block size, a head size and a KV cache dtype."""
    from vllm import _custom_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return _custom_ops, _get_attn_isa


def allow_amx() -> None:
    """Asks Linux for permission to use the processor's AMX tiles, if it has any."""
    torch.cpu._init_amx()


def cpu_prefills_fp8() -> bool:
    """Whether vLLM's CPU kernel reads an fp8 cache on this processor."""
    return torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()


def kv_scales(layer: AttentionLayer) -> tuple[float, float]:
    """Factors from the fp8 K and V of a layer's pages to real values."""
    return layer._k_scale_float, layer._v_scale_float


def max_decode_rows(vllm_config) -> int:
    """Rows of the largest decode step, including the padding of captured graphs.

    A request has one for its last token and one for each token that a drafter may propose. Where vLLM cuts requests
    at chunks, the few new tokens of a cached prompt may become two requests with as many rows each.
    """
    from vllm.v1.attention.backend import max_decode_query_len

    rows = vllm_config.scheduler_config.max_num_seqs * max_decode_query_len(vllm_config)
    if vllm_config.model_config.attention_chunk_size:
        rows *= 2
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(rows, captured)


def max_prefill_tokens(vllm_config) -> int:
    """Tokens of the longest context or of the largest step, whichever is more."""
    step = vllm_config.scheduler_config.max_num_batched_tokens
    return max(vllm_config.model_config.max_model_len, step)


def add_logits_processor(vllm_config, name: str) -> None:
    """Adds a logits processor, ``module:class``, as ``--logits-processors`` does; once."""
    model = vllm_config.model_config
    if name not in (model.logits_processors or ()):
        model.logits_processors = [*(model.logits_processors or ()), name]


def model_runner(vllm_config) -> str:
    """The model runner that serves a configuration, ``V1`` or ``V2``."""
    return "V2" if vllm_config.use_v2_model_runner else "V1"


def hides_requests(vllm_config) -> tuple[str, str] | None:
    """What keeps a model runner from telling logits processors or metadata builders about requests, and the
    way out; None if nothing does."""
    if not vllm_config.use_v2_model_runner:
        if vllm_config.speculative_config is not None:  # it has no custom logits processors then
            return "speculative decoding by Model Runner V1", "drop --speculative-config"
    elif vllm_config.parallel_config.pipeline_parallel_size > 1:  # its last rank alone samples
        return "pipeline parallelism", "drop --pipeline-parallel-size"
    elif vllm_config.model_config.return_sampling_mask:  # it allows no custom logits processors
        return "--return-sampling-mask", "drop --return-sampling-mask"
    elif vllm_config.model_config.is_hybrid:  # its metadata have no request_slots
        return "models with state-space or linear-attention layers", "serve another model"
    return None


def request_slots(common_attn_metadata: CommonAttentionMetadata, rows: int) -> list[int]:
    """Where the runner keeps the requests of the first rows; the padding of a graph may be left out.

    Model Runner V2 names them. V1 keeps requests in the order of the batch.
    """
    slots = common_attn_metadata.req_idx
    return list(range(rows)) if slots is None else slots[:rows].tolist()


def captures_decode(vllm_config) -> bool:
    """Whether decode steps may be captured in full CUDA graphs, which replay without Python."""
    return vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()


def layers_of(vllm_config) -> dict:
    """The layers of an engine that have been built so far, by name."""
    return vllm_config.compilation_config.static_forward_context


def attention_backends(vllm_config) -> list[str]:
    """The names of the attention backends that an engine's layers have."""
    layers = layers_of(vllm_config).values()  # others than attention are among them
    return sorted(
        {
            layer.get_attn_backend().get_name()
            for layer in layers
            if hasattr(layer, "get_attn_backend")
        }
    )


def engine_index(vllm_config) -> int:
    """Index of an engine among those of a data-parallel server, the label ``engine`` of its metrics."""
    return vllm_config.parallel_config.data_parallel_index


def context_group(vllm_config):
    """vLLM's group of the ranks of decode context parallelism and the number of consecutive tokens on a rank;
    None without it."""
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size == 1:
        return None
    from vllm.distributed import get_dcp_group

    return get_dcp_group(), parallel.cp_kv_cache_interleave_size


def has_nccl(group) -> bool:
    """Whether vLLM has loaded NCCL for a group. Without it, ``reduce_scatter`` of the group returns memory that nobody
    has written (0.32)."""
    found = group.device_communicator.pynccl_comm
    return found is not None and not found.disabled


def adamas_parts(worker) -> tuple[dict, list, Callable[[int], list]]:
    """The parts of an in-process worker that an evaluation modifies.

    Returns:
        the adamas layers by name in model order; the metadata builders; and a function that returns
        ``SamplingParams.extra_args`` of the first requests of the batch, in row order.
    """
    runner = worker.model_runner
    layers = {
        name: layer
        for name, layer in runner.compilation_config.static_forward_context.items()
        if type(getattr(layer, "impl", None)).__name__ == "AdamasImpl"
    }
    builders = [group.get_metadata_builder() for groups in runner.attn_groups for group in groups]

    def extra_args(rows: int) -> list[dict]:
        ids = runner.input_batch.req_ids[:rows]
        return [runner.requests[name].sampling_params.extra_args or {} for name in ids]

    return layers, builders, extra_args
