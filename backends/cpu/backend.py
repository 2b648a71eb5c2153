"""The CPU backend: C++ kernels of ``csrc/cpu``, loaded through tvm-ffi."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from vllm_adamas.backends.base import Backend, Layer, Params
from vllm_adamas.backends.inspect import Inspectable
from vllm_adamas.errors import AdamasError

#: ADAMAS_CPU_LIBRARY names another build of the same sources (`make sanitize-cpu`).
LIBRARY = Path(os.environ.get("ADAMAS_CPU_LIBRARY") or Path(__file__).with_name("libadamas_cpu.so"))


@cache
def _library():
    if not LIBRARY.exists():
        raise AdamasError(
            f"the CPU kernels are not built ({LIBRARY.name} is missing): run `make setup`, or "
            "reinstall the package on a host with a C++20 compiler."
        )
    import tvm_ffi

    return tvm_ffi.load_module(str(LIBRARY))


class CpuLayer(Layer):
    """A layer with its native counterpart."""

    def __init__(self, params: Params, kv_cache: torch.Tensor, library):
        super().__init__(params, kv_cache)
        self.native = library.bind(kv_cache, params.native, params.key_mean, params.sinks)


class CpuBackend(Backend, Inspectable):
    """C++ kernels with AVX-512, AVX2 or portable vectors, chosen at run time.

    Args:
        isa: ``auto``, ``avx512``, ``avx2`` or ``portable``. The choice holds for the whole process.
    """

    name = "cpu"

    def __init__(self, isa: str = "auto"):
        self._lib = _library()
        self.isa = str(self._lib.use_isa(isa))

    @classmethod
    def check_server(
        cls, head_sizes, block_size, num_kv_heads, max_rows, max_seq_len, capability=None
    ):
        _library()

    @property
    def description(self) -> str:
        return f"cpu ({self.isa})"

    def prepare(self, cache):
        self._lib.advise_huge(torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage()))

    def bind(self, params, kv_cache):
        return CpuLayer(params, kv_cache, self._lib)

    # csrc/cpu/api.cc checks shapes, strides and dtypes, at a cost of nanoseconds.

    def append(self, layer, key, value, slot_mapping):
        self._lib.append(layer.native, key, value, slot_mapping)

    def decode(self, layer, query, batch, output, stats, lse=None):
        rows = (batch.block_table, batch.seq_lens, batch.budgets)
        self._lib.decode(layer.native, query, *rows, output, stats, lse)

    def scan(self, layer, query, block_table, seq_lens, longest=None):
        rows = seq_lens.shape[0]
        if longest is None:
            longest = int(seq_lens.max()) if rows else 0
        scores = torch.full((rows, layer.params.num_score_heads, longest), float("-inf"))
        self._lib.scan(layer.native, query, block_table, seq_lens, scores)
        return scores

    def select(self, params, scores, seq_lens, budgets, most=None):
        rows, heads, _ = scores.shape
        if most is None:
            most = int(params.attended(seq_lens, budgets).max()) if rows else 0
        tokens = torch.full((rows, heads, most), -1, dtype=torch.int32)
        self._lib.select(
            scores, seq_lens, budgets, tokens, params.num_sink_tokens, params.recent_window
        )
        return tokens

    def gather(self, layer, block_table, seq_lens, key, value):
        self._lib.gather(layer.native, block_table, seq_lens, key, value)
