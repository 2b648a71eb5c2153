"""The attention implementation of a layer: append, then sparse decode and dense prefill."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_adamas import profile as profiles
from vllm_adamas.backends.base import Layer, Params
from vllm_adamas.backends.reference.signature import hadamard
from vllm_adamas.backends.workspace import capturing
from vllm_adamas.budget import TokenBudget
from vllm_adamas.config import AdamasConfig
from vllm_adamas.dtypes import fp8_element, page_dtype
from vllm_adamas.errors import AdamasError
from vllm_adamas.layout import TILE, PageLayout, overhead
from vllm_adamas.serving import compat
from vllm_adamas.serving.checks import check_sinks, read_config
from vllm_adamas.serving.dcp import ContextShare
from vllm_adamas.serving.metadata import AdamasMetadata
from vllm_adamas.serving.shared import Shared

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention

logger = init_logger("vllm.adamas")


class Balance(NamedTuple):
    """Channel factors, powers of two: of keys ``[Hkv, D]``, and their inverses for queries ``[Hq, D]``."""

    key: torch.Tensor
    query: torch.Tensor


class AdamasImpl(AttentionImpl[AdamasMetadata]):
    """See :class:`vllm.v1.attention.backend.AttentionImpl`; one instance per layer."""

    can_return_lse_for_decode = True
    supports_dcp = True
    supports_mtp_with_cp_non_trivial_interleave_size = True  # every draft is a row of its own

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **others,
    ) -> None:
        for unsupported, what in (
            (alibi_slopes is not None, "ALiBi position biases"),
            (attn_type != AttentionType.DECODER, f"{attn_type} attention"),
            (bool(others), f"attention with {', '.join(others)}"),
        ):
            if unsupported:
                raise AdamasError(
                    f"the adamas backend does not support {what}: serve this model with another "
                    "--attention-backend."
                )
        vllm_config = get_current_vllm_config()
        self.share = share = ContextShare.of(vllm_config)
        for unsupported, what in (  # not every model's configuration tells
            (sinks is not None, "learned attention sinks with DCP"),
            (sliding_window is not None, "sliding windows with DCP"),
            (kv_sharing_target_layer_name is not None, "layers that share keys with DCP"),
        ):
            if share and unsupported:
                raise AdamasError(
                    f"the adamas backend does not support {what}: drop --decode-context-parallel-size."
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        #: that this rank decodes: with DCP, those of all ranks that share its KV heads
        self.num_decode_heads = num_heads * (share.size if share else 1)
        self.sliding_window = sliding_window
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.sinks = sinks
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.config = read_config(vllm_config)
        layers, device = compat.layers_of(vllm_config), current_platform.device_type
        engine = compat.engine_index(vllm_config)
        self.shared = Shared.among(layers.values(), self.config, device, engine)
        self.backend = self.shared.backend(self.config.kernels)
        self.dense = self.shared.dense
        self.max_model_len = vllm_config.model_config.max_model_len
        if share:
            self.max_model_len = share.most(self.max_model_len)
        self.dtype = vllm_config.model_config.dtype
        if sinks is not None:  # not every model's configuration tells
            check_sinks(self.dtype, head_size, num_heads)
        self._appends = compat.on_cpu() and not kv_sharing_target_layer_name
        self._params: Params | None = None
        self._bound: Layer | None = None
        self._dense = False
        self._layer_name = ""  # known when its parameters are loaded
        self._balance: Balance | None = None
        self._largest_step = (
            compat.max_decode_rows(vllm_config),
            compat.max_prefill_tokens(vllm_config),
        )
        self._reserved = False
        logger.info_once(
            "Using ADAMAS attention backend: score %s (thresholds %s), token budget %s per %s%s%s, "
            "%d dense layers, profile %s, pages +%.1f%%, kernels %s.",
            self.config.score,
            self.config.coding(head_size),
            self.config.budget,
            self.config.selection.replace("_", " "),
            " (maximum)" if self.config.combine == "max" else "",
            "".join(
                f", {self.config.budget_of(n)} in layer {n}" for n in self.config.layer_budgets
            ),
            sum(map(self.config.is_dense, range(self.config.dense_layers))),
            self.config.profile or "none",
            100 * overhead(head_size, self._cache_dtype),
            self.backend.description,
        )

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes K, V and signatures of a step's tokens; vLLM calls it unless :meth:`forward` appends."""
        bound = self.bind(layer, kv_cache)
        if self._balance is not None:
            key = key * self._balance.key
        self.backend.append(bound, key, value, slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AdamasMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the step's tokens.

        Args:
            query: ``[tokens, Hq, D]``.
            key, value: ``[tokens, Hkv, D]``.
            kv_cache: ``[num_blocks, Hkv, block_size, C]``, see :mod:`vllm_adamas.layout`.
            output: ``[tokens, Hq, D]``, written.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not supported by ADAMAS")
        if attn_metadata is None:  # vLLM profiles the memory use of a step
            self._reserve()
            if self.share:  # as much as a step takes
                self.share.combine(*self._everyone(self.share.gather(query)))
            return output
        bound = self.bind(layer, kv_cache)
        if self._balance is not None:
            query = query * self._balance.query
            if key is not None and (self._appends or attn_metadata.prefill is not None):
                key = key * self._balance.key
        if self._appends:
            self.backend.append(bound, key, value, attn_metadata.slot_mapping)
        if attn_metadata.num_decode_rows:
            self._decode(bound, query, attn_metadata, output)
        if attn_metadata.prefill is not None:
            plan = attn_metadata.prefill
            self.dense.prefill(self.backend, bound, plan, query, key, value, output)
        return output

    def _decode(self, bound: Layer, query, metadata: AdamasMetadata, output) -> None:
        rows, batch = metadata.num_decode_rows, metadata.decode[bound.params.budget]
        if capturing(output.device):  # a graph replays with contexts of any length
            batch = replace(batch, max_seq_len=self.max_model_len)
        share, stats = self.share, self.shared.stats.counters(dense_layer=self._dense)
        if self._dense and not share and self.dense.decodes(bound.params):
            starts = metadata.query_start_loc
            self.dense.decode(bound, query[:rows], batch, starts, output[:rows])
            return
        if self._dense:
            batch = batch.dense
        if not share:
            self.backend.decode(bound, query, batch, output, stats)
            self._audit(metadata, query, output)
            return
        query = share.gather(query[:rows])
        found, lse = self._everyone(query)
        self.backend.decode(bound, query, batch, found, stats, lse)
        self._audit(metadata, query, found)  # of this rank's share
        output[:rows] = share.combine(found, lse)[0]

    def _audit(self, metadata: AdamasMetadata, query, output) -> None:
        if metadata.audit is not None:
            metadata.audit.keep(self._layer_name, query, output)

    @staticmethod
    def _everyone(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New tensors for the output and the log-sum-exp of the queries of all ranks."""
        return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)

    def reconfigure(self, config: AdamasConfig, wrap=None) -> None:
        """Applies another configuration from the next step on; never called in a server.

        Args:
            wrap: wraps the backend, for example in a recorder.
        """
        self.config = config
        backend = self.shared.backend(config.kernels)
        self.backend = wrap(backend) if wrap else backend
        self._params = self._bound = None

    def key_factor(self) -> torch.Tensor | float:
        """Factors of the channels of stored keys, ``[Hkv, D]`` or 1."""
        return 1.0 if self._balance is None else self._balance.key

    def bind(self, layer: Attention, kv_cache: torch.Tensor) -> Layer:
        """This layer bound to its KV cache; bound again when vLLM passes another one."""
        if self._bound is None or not self._bound.is_bound_to(kv_cache):
            if self._params is None:
                self._params = self._load_params(layer, kv_cache)
            self.shared.prepare(self.backend, kv_cache)
            self._bound = self.backend.bind(self._params, kv_cache)
        return self._bound

    def _load_params(self, layer: Attention, kv_cache: torch.Tensor) -> Params:
        """Builds the parameters at the first step with a KV cache, when vLLM has loaded its weights."""
        self._reserve()
        self._layer_name = layer.layer_name
        index = extract_layer_index(layer.layer_name)
        # A request that vLLM has cut at the chunks lies within a window of their size.
        window = self.sliding_window or compat.attention_chunk(layer)
        self._dense = self.config.is_dense(index) or window > 0
        k_scale, v_scale = compat.kv_scales(layer)
        return self._make_params(
            PageLayout(self.head_size, kv_cache.shape[2], kv_cache.dtype),
            self.config.budget_of(index),
            window,
            k_scale=k_scale,
            v_scale=v_scale,
            key_mean=None if window else self._load_profile(layer, kv_cache.device),
            sinks=self._load_sinks(layer, kv_cache.device),
        )

    @property
    def _cache_dtype(self) -> torch.dtype:
        return page_dtype(self.kv_cache_dtype, self.dtype)

    def _reserve(self) -> None:
        """Allocates the workspace of the largest step, once, before a graph is captured.

        It is not allocated when the layer is built, since vLLM's sleep mode discards that memory.
        """
        if self._reserved:
            return
        self._reserved = True
        rows, tokens = self._largest_step
        layout = PageLayout(self.head_size, TILE, self._cache_dtype)
        window = self.sliding_window or 0
        kinds = [self._make_params(layout, budget, window) for budget in self.config.budgets]
        workspace = max(self.backend.reserve(kind, rows, self.max_model_len) for kind in kinds)
        workspace += self.dense.reserve(kinds[0], self.dtype, tokens)
        if workspace:
            logger.info_once("The ADAMAS workspace takes %.0f MiB.", workspace / 2**20)

    def _load_sinks(self, layer: Attention, device: torch.device) -> torch.Tensor | None:
        """The learned sinks of this rank's query heads, which vLLM loads after it has built the layer."""
        if self.sinks is None:
            return None
        _refuse_capture(layer, device)
        return self.sinks.detach().float().contiguous()

    def _load_profile(self, layer: Attention, device: torch.device) -> torch.Tensor | None:
        """Sets the balance and returns the mean of the balanced, transformed keys."""
        self._balance = None
        if self.config.profile is None:
            return None
        _refuse_capture(layer, device)
        profile = profiles.load(self.config.profile)
        owner = self.kv_sharing_target_layer_name or layer.layer_name  # owner of the pages
        index = extract_layer_index(owner)
        first = get_tensor_model_parallel_rank() * profile.model.num_kv_heads
        first //= get_tensor_model_parallel_world_size()  # more ranks than heads: ranks share heads
        heads = range(first, first + self.num_kv_heads)
        exponents = profile.balance(index, heads).float()
        factor = torch.exp2(exponents).to(device)  # [Hkv, D]
        if exponents.any():
            group = self.num_heads // self.num_kv_heads
            self._balance = Balance(
                factor.to(self.dtype), (1 / factor).repeat_interleave(group, 0).to(self.dtype)
            )
        return hadamard(profile.key_mean(index, heads).to(device) * factor).contiguous()

    def _make_params(
        self, layout: PageLayout, budget: TokenBudget, sliding_window: int, **loaded
    ) -> Params:
        return Params.of(
            self.config,
            layout,
            budget,
            num_query_heads=self.num_decode_heads,
            num_kv_heads=self.num_kv_heads,
            softmax_scale=self.scale,
            sliding_window=sliding_window,
            fp8=fp8_element(self.kv_cache_dtype),
            logits_soft_cap=self.logits_soft_cap,
            **loaded,
        )


def _refuse_capture(layer: Attention, device: torch.device) -> None:
    """
    Raises:
        RuntimeError: a graph is being captured, and new tensors would be computed only when it is replayed.
    """
    if capturing(device):
        raise RuntimeError(f"{layer.layer_name} has to run once before a CUDA graph is captured")
