"""The CPU backend: C++ kernels of ``csrc/cpu``, loaded through tvm-ffi."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from vllm_adamas.backends.base import Backend, Params
from vllm_adamas.errors import AdamasError

LIBRARY = Path(__file__).with_name("libadamas_cpu.so")
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FP8_ELEMENTS = {"e4m3": 3, "e5m2": 4}


@cache
def _library():
    if not LIBRARY.exists():
        raise AdamasError(
            f"the CPU kernels are not built ({LIBRARY.name} is missing): run `make setup`, or "
            "reinstall the package on a host with a C++17 compiler."
        )
    import tvm_ffi

    return tvm_ffi.load_module(str(LIBRARY))


def _check(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


def _dense_last(name: str, x: torch.Tensor, *shape: int | None) -> None:
    fits = x.dim() == len(shape) and all(w in (None, s) for s, w in zip(x.shape, shape, strict=True))
    _check(
        fits and x.stride(-1) == 1,
        f"{name}: expected [{', '.join('*' if s is None else str(s) for s in shape)}] with a contiguous "
        f"last dimension, got {tuple(x.shape)} with strides {x.stride()}",
    )


class CpuBackend(Backend):
    """C++ kernels with AVX-512, AVX2 or portable vectors, chosen by what the processor runs.

    Args:
        isa: ``auto``, ``avx512``, ``avx2`` or ``portable``. The choice holds for the process.
    """

    name = "cpu"

    def __init__(self, isa: str = "auto"):
        self._lib = _library()
        self.isa = str(self._lib.use_isa(isa))
        self._pages: dict[tuple, tuple] = {}

    @property
    def description(self) -> str:
        return f"cpu ({self.isa})"

    def append(self, params, key, value, page, slot_mapping):
        heads, size = params.num_kv_heads, params.layout.head_size
        _dense_last("key", key, None, heads, size)
        _dense_last("value", value, *key.shape)
        tokens = slot_mapping.shape[0]
        _check(slot_mapping.dtype == torch.int64 and tokens <= key.shape[0], "slot_mapping: int64 [T]")
        coding = params.coding
        self._lib.append(
            key, value, slot_mapping, coding.threshold, coding.relative, *self._page(params, page)
        )

    def decode(self, params, query, page, block_table, context_lens, budgets, output, stats):
        rows = self._rows(params, query, block_table, context_lens)
        _dense_last("output", output, rows, params.num_query_heads, params.layout.head_size)
        _check(budgets.dtype == torch.int32 and budgets.shape == (rows,), "budgets: int32 [R]")
        _check(stats.dtype == torch.int64 and stats.shape == (4,), "stats: int64 [4]")
        self._lib.decode(
            query,
            output,
            block_table,
            context_lens,
            budgets,
            stats,
            params.softmax_scale,
            params.score == "dot",
            params.selection == "query_head",
            params.num_sink_tokens,
            params.recent_window,
            params.sliding_window,
            params.coding.threshold,
            params.coding.relative,
            *self._page(params, page),
        )

    def scan(self, params, query, page, block_table, context_lens):
        rows = self._rows(params, query, block_table, context_lens)
        longest = int(context_lens.max()) if rows else 0
        scores = torch.full((rows, params.num_score_heads, longest), float("-inf"))
        self._lib.scan(
            query,
            block_table,
            context_lens,
            scores,
            params.score == "dot",
            params.selection == "query_head",
            params.coding.threshold,
            params.coding.relative,
            *self._page(params, page),
        )
        return scores

    def select(self, params, scores, context_lens, budgets):
        rows, heads, _ = scores.shape
        _check(scores.dtype == torch.float32, "scores: float32 [R, heads, L]")
        most = int(torch.minimum(budgets, context_lens).max()) if rows else 0
        tokens = torch.full((rows, heads, most), -1, dtype=torch.int32)
        self._lib.select(
            scores, context_lens, budgets, tokens, params.num_sink_tokens, params.recent_window
        )
        return tokens

    def gather(self, params, page, block_table, context_lens, key, value):
        _dense_last("key", key, None, params.num_kv_heads, params.layout.head_size)
        _dense_last("value", value, *key.shape)
        _check(key.dtype == value.dtype, "key and value: one dtype")
        self._lib.gather(key, value, block_table, context_lens, *self._page(params, page))

    def _rows(self, params, query, block_table, context_lens) -> int:
        rows = context_lens.shape[0]
        _dense_last("query", query, rows, params.num_query_heads, params.layout.head_size)
        _check(
            block_table.dtype == torch.int32 and block_table.shape[0] == rows and block_table.stride(1) == 1,
            "block_table: int32 [R, blocks]",
        )
        _check(context_lens.dtype == torch.int32, "context_lens: int32 [R]")
        return rows

    def _page(self, params: Params, page: torch.Tensor) -> tuple:
        """The arguments that describe a page; computed once per page and parameters."""
        key = (id(params), page.data_ptr(), page.shape)
        found = self._pages.get(key)
        if found is None:
            layout = params.layout
            element = FP8_ELEMENTS[params.fp8] if params.fp8 else ELEMENTS[layout.dtype]
            found = (
                layout.runs(page),
                layout.block_size,
                layout.head_size,
                layout.v_offset,
                layout.hi_offset,
                layout.lo_offset,
                layout.scale_offset,
                element,
                params.k_scale,
                params.v_scale,
            )
            if len(self._pages) >= 1024:
                self._pages.clear()
            # params is kept so that its id stays its own.
            self._pages[key] = (*found, params)
        else:
            found = found[:-1]
        return found
