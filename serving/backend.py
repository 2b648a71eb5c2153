"""The attention backend class, which vLLM queries before it builds layers."""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_adamas.dtypes import KV_CACHE_DTYPES, MODEL_DTYPES
from vllm_adamas.errors import AdamasError
from vllm_adamas.layout import HEAD_SIZES, token_bytes
from vllm_adamas.serving import checks, compat


class AdamasBackend(AttentionBackend):
    """Dense prefill, sparse decode over pages that carry key signatures."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(MODEL_DTYPES["cpu"])
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(KV_CACHE_DTYPES)
    # Without CUDA graphs, a separate cache update per layer costs more than it saves: about 2 % of a
    # small model's decode step on a CPU.
    forward_includes_kv_cache_update = compat.on_cpu()

    def __init_subclass__(cls, **kwargs) -> None:
        """Refuses subclasses, which layers of other kinds, such as encoder attention, create.

        Their builders rewrite the metadata of a step, which would silently give wrong attention. Those of
        chunked local attention cut requests into smaller ones, and their layers are dense.

        Raises:
            AdamasError: the subclass is of another kind.
        """
        if not cls.__name__.startswith(compat.CHUNKED):
            raise AdamasError(
                f"the adamas backend does not support layers of the kind {cls.__name__!r}, which rewrite the "
                f"metadata of a step: {checks.OTHER_BACKEND}."
            )

    @staticmethod
    def get_name() -> str:
        return compat.NAME

    @staticmethod
    def get_impl_cls():
        from vllm_adamas.serving.impl import AdamasImpl

        return AdamasImpl

    @staticmethod
    def get_builder_cls():
        from vllm_adamas.serving.metadata import AdamasMetadataBuilder

        return AdamasMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(checks.block_size_multiple())]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        # Planes of 64 tokens are long enough to be read at full bandwidth.
        return max(default_block_size, 64)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Head-major blocks: the (block_size, content) interior of a (block, head) is one dense run.
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if spec.head_size_v != spec.head_size:
            raise AdamasError(
                f"the adamas backend does not support value heads of another size than key heads "
                f"({spec.head_size_v} and {spec.head_size}): {checks.OTHER_BACKEND}."
            )
        return compat.page_spec(spec, token_bytes(spec.head_size, spec.dtype))

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True  # where prefill does not, checks.check_sinks names the way out

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return not compat.on_cpu()  # which ones, checks.py says
