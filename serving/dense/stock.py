"""Decode by vLLM's own attention of a host, called without an engine: what ours is compared with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from vllm_adamas.backends.base import DecodeBatch, Layer
from vllm_adamas.serving import compat
from vllm_adamas.serving.dense import get_dense_attention


class Stock(ABC):
    """The tokens of one layer, as the device's stock attention backend of vLLM keeps them.

    Args:
        layer: without a sliding window, its pages in the model's own dtype.
    """

    name: str

    @abstractmethod
    def __init__(self, layer: Layer):
        pass

    @abstractmethod
    def append(self, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Stores tokens that the layer's pages also hold, in the same slots (:meth:`Backend.append`)."""

    @abstractmethod
    def attention(
        self, query: torch.Tensor, batch: DecodeBatch, output: torch.Tensor
    ) -> Callable[[], None]:
        """A call that writes the dense attention of the batch's rows.

        What a step prepares once for all layers is prepared before the call.

        Args:
            query, output: ``[R, Hq, D]``.
        """


class CpuStock(Stock):
    """CPU_ATTN, over a cache in the kernel's own layout."""

    name = "CPU_ATTN"

    def __init__(self, layer):
        self._params, layout = layer.params, layer.params.layout
        self._ops, isa_of = compat.cpu_attention()
        compat.allow_amx()
        self._isa = isa_of(layout.dtype, layout.block_size, layout.head_size, "auto")
        shape = (*layer.kv_cache.shape[:2], 2 * layout.block_size, layout.head_size)
        self._key_cache, self._value_cache = torch.zeros(shape, dtype=layout.dtype).chunk(2, dim=2)

    def append(self, key, value, slot_mapping):
        self._ops.cpu_attn_reshape_and_cache(
            key, value, self._key_cache, self._value_cache, slot_mapping, self._isa
        )

    def attention(self, query, batch, output):
        params, rows = self._params, len(batch.seq_lens)
        starts = torch.arange(rows + 1, dtype=torch.int32)
        schedule = self._ops.cpu_attn_get_scheduler_metadata(
            num_reqs=rows,
            num_heads=params.num_query_heads,
            num_kv_heads=params.num_kv_heads,
            head_dim=params.layout.head_size,
            seq_lens=batch.seq_lens,
            dtype=query.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=self._isa,
            enable_kv_split=True,
        )
        return lambda: self._ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=self._key_cache,
            value_cache=self._value_cache,
            output=output,
            query_start_loc=starts,
            seq_lens=batch.seq_lens,
            scale=params.softmax_scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=batch.block_table,
            softcap=0,
            scheduler_metadata=schedule,
            s_aux=None,
        )


class FlashStock(Stock):
    """FLASH_ATTN, over the planes of the layer's pages; their strides cost it at most 2 %."""

    name = "FLASH_ATTN"

    def __init__(self, layer):
        self._layer, self._dense = layer, get_dense_attention("cuda")

    def append(self, key, value, slot_mapping):
        """The pages are written already."""

    def attention(self, query, batch, output):
        starts = torch.arange(len(batch.seq_lens) + 1, dtype=torch.int32, device=query.device)
        return lambda: self._dense.decode(self._layer, query, batch, starts, output)


STOCK = {"cpu": CpuStock, "cuda": FlashStock}  #: by the type of the device
