"""Objects shared by the layers of an engine."""

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
    """The backends with their workspaces, dense attention with its scratch, and counters of an engine.

    Only the engine's layers and metadata builders refer to it, so it is freed with them.
    """

    def __init__(self, config: AdamasConfig, device_type: str, engine: int):
        self._config = config
        self._engine = engine
        self._device_type = device_type
        self._backends: dict[str, Backend] = {}
        self._prepared = False
        self.dense: DenseAttention = get_dense_attention(device_type)
        #: Budgets of the requests that ask for one, by slot: see ``request_budgets.py``.
        self.requested: dict[int, int] = {}

    @classmethod
    def among(cls, layers: Iterable, config: AdamasConfig, device_type: str, engine: int) -> Shared:
        """The object of the layers built so far, or a new one for the first layer.

        Args:
            engine: index of the engine in a data-parallel server.
        """
        return cls.find(layers) or cls(config, device_type, engine)

    @classmethod
    def find(cls, layers: Iterable) -> Shared | None:
        """The object of these layers, None if no layer has the adamas backend."""
        impls = (getattr(layer, "impl", None) for layer in layers)
        found = (impl.shared for impl in impls if isinstance(getattr(impl, "shared", None), cls))
        return next(found, None)

    def backend(self, kernels: str) -> Backend:
        """The engine's instance of the backend for a value of the option ``kernels``."""
        if kernels not in self._backends:
            self._backends[kernels] = get_backend(kernels, self._device_type)
        return self._backends[kernels]

    @cached_property
    def stats(self) -> SelectionStats:
        """The counters, created when the metadata builder first uses them.

        Layers must not create them: vLLM's sleep mode discards memory allocated while layers are built.
        """
        rank = get_tensor_model_parallel_rank()
        return SelectionStats(self._config, self._device_type, self._engine, rank)

    def prepare(self, backend: Backend, cache: torch.Tensor) -> None:
        """Prepares the KV cache allocation, which all layers share, once."""
        if not self._prepared:
            self._prepared = True
            backend.prepare(cache)
