"""What the layers of one engine have in common."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_adamas.backends.base import Backend
from vllm_adamas.backends.registry import get_backend
from vllm_adamas.config import AdamasConfig
from vllm_adamas.serving.dense import get_dense_attention
from vllm_adamas.serving.dense.base import DenseAttention
from vllm_adamas.serving.metrics import SelectionStats


class Shared:
    """Kernels with their workspace, prefill with its scratch, and counters, of one engine.

    The engine's layers and metadata builders hold it, and nothing else does: it goes with them.
    """

    def __init__(self, config: AdamasConfig, device_type: str):
        self._config = config
        self._device_type = device_type
        self._backends: dict[str, Backend] = {}
        self._prepared = False
        self.dense: DenseAttention = get_dense_attention(device_type)

    @classmethod
    def among(cls, layers: Iterable, config: AdamasConfig, device_type: str) -> Shared:
        """That of the layers built so far, or a new one for the first."""
        impls = (getattr(layer, "impl", None) for layer in layers)
        found = (impl.shared for impl in impls if isinstance(getattr(impl, "shared", None), cls))
        return next(found, None) or cls(config, device_type)

    def backend(self, kernels: str) -> Backend:
        """The engine's instance of the backend that these ``kernels`` name."""
        if kernels not in self._backends:
            self._backends[kernels] = get_backend(kernels, self._device_type)
        return self._backends[kernels]

    @cached_property
    def stats(self) -> SelectionStats:
        """The counters, made by whoever asks first: the metadata builder.

        Layers are built in the memory that vLLM's sleep mode discards, builders are not.
        """
        return SelectionStats(self._config, self._device_type, get_tensor_model_parallel_rank())

    def prepare(self, backend: Backend, cache: torch.Tensor) -> None:
        """Prepares the allocation of a layer's cache, which is that of all layers, once."""
        if not self._prepared:
            self._prepared = True
            backend.prepare(cache)
