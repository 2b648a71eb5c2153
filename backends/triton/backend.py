"""The host side: argument checks, launch shapes, workspaces.

Launch shapes depend on the number of rows and on ``max_seq_len`` alone; kernels read lengths and
budgets on the device. A decode step therefore never synchronises and can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_adamas.backends.arguments import check_tensor
from vllm_adamas.backends.base import (
    COUNTERS,
    MAX_GROUP,
    MIN_CAPABILITY,
    Backend,
    Layer,
    Params,
)
from vllm_adamas.backends.inspect import Inspectable
from vllm_adamas.backends.launch import rounded_context
from vllm_adamas.backends.triton.append import append_kernel
from vllm_adamas.backends.triton.attend import attend_kernel, merge_kernel
from vllm_adamas.backends.triton.gather import gather_kernel
from vllm_adamas.backends.triton.scan import PLANES, encode_kernel, sample_kernel, scan_kernel
from vllm_adamas.backends.triton.select import select_kernel
from vllm_adamas.backends.workspace import Workspace
from vllm_adamas.dtypes import ELEMENTS
from vllm_adamas.errors import AdamasError
from vllm_adamas.layout import PageLayout

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

#: With TRITON_INTERPRET=1, kernels run in Python on CPU tensors, for tests.
INTERPRETED = not isinstance(append_kernel, triton.JITFunction)

PROGRAMS_PER_SM = 8  #: programs per SM that splitting contexts into parts aims at
MAX_PARTS = 64  #: most parts of one context; merge loads them all at once
SCORE_BYTES = 512 << 20  #: bytes of scores and tokens in one pass; more rows take several passes
APPEND_TOKENS, SCAN_TOKENS, SELECT_TOKENS, GATHER_TOKENS = 16, 128, 4096, 32  #: at a time
SAMPLES, CANDIDATES = 1024, 1024  #: of select: sampled scores, and candidates at a time


class TritonLayer(Layer):
    """A layer with views of its pages, dropped together with the KV cache."""

    def __init__(self, params: Params, kv_cache: torch.Tensor):
        super().__init__(params, kv_cache)
        if params.sinks is not None:
            check_tensor("sinks", params.sinks, torch.float32, params.num_query_heads)
        found = [Planes.of(params, kv_cache)]
        self._found, self._gone = found, weakref.ref(kv_cache, lambda _: found.clear())

    @property
    def planes(self) -> Planes:
        """
        Raises:
            RuntimeError: the KV cache has been dropped.
        """
        return self._found[0] if self._found else Planes.of(self.params, self.kv_cache)


class TritonBackend(Backend, Inspectable):
    """Triton kernels: encode and scan, select, attend (sparse rows, dense rows), merge.

    They take every element type of pages, up to 16 query heads per KV head and contexts of any length.
    """

    name = "triton"

    def __init__(self):
        self._plans: dict[tuple, Plan] = {}
        self._workspace = Workspace(release=self._plans.clear)
        self._reserved: dict[tuple, int] = {}
        if INTERPRETED:
            return
        if not torch.cuda.is_available():
            raise AdamasError(
                "kernels='triton' need a GPU that Triton compiles for, and none is visible: choose "
                "kernels=auto on a CPU."
            )
        if torch.version.cuda and torch.cuda.get_device_capability() < MIN_CAPABILITY:
            raise AdamasError(
                f"the Triton kernels need compute capability {'.'.join(map(str, MIN_CAPABILITY))}, "
                f"{torch.cuda.get_device_name()} has "
                f"{'.'.join(map(str, torch.cuda.get_device_capability()))}: serve with another "
                "attention backend."
            )

    @property
    def description(self) -> str:
        where = "interpreted" if INTERPRETED else torch.cuda.get_device_name()
        return f"triton {triton.__version__} ({where})"

    def reserve(self, params, max_rows, max_seq_len):
        """As :meth:`Backend.reserve`. Steps of a device share the workspace, so they must run on one stream."""
        device = torch.device("cpu" if INTERPRETED else torch.cuda.current_device())
        key = (params, max_rows, max_seq_len)
        if key not in self._reserved:  # once for all layers of a model
            self._reserved[key] = max(
                Plan(params, rows + 1, rounded_context(max_seq_len), device).nbytes
                for rows in range(max_rows)
            )
        return self._workspace.at_least(device, self._reserved[key]).nbytes

    def bind(self, params, kv_cache):
        return TritonLayer(params, kv_cache)

    def append(self, layer, key, value, slot_mapping):
        params, planes = layer.params, layer.planes
        layout, heads = params.layout, params.num_kv_heads
        check_tensor("slot_mapping", slot_mapping, torch.int64, None)
        tokens = slot_mapping.shape[0]
        key, value = key[:tokens], value[:tokens]  # vLLM pads keys, not slots
        dtype = key.dtype if params.fp8 else layout.dtype
        check_tensor("key", key, dtype, tokens, heads, layout.head_size)
        check_tensor("value", value, dtype, tokens, heads, layout.head_size)
        if not tokens:
            return
        stored_key = _to_fp8(key, params.fp8, params.k_scale) if params.fp8 else key
        stored_value = _to_fp8(value, params.fp8, params.v_scale) if params.fp8 else value
        append_kernel[triton.cdiv(tokens, APPEND_TOKENS), heads](
            key, params.key_mean, stored_key, stored_value, slot_mapping, tokens,
            len(planes.k) * layout.block_size,
            *key.stride()[:2], *stored_key.stride()[:2], *stored_value.stride()[:2],
            planes.k, planes.v, planes.hi, planes.lo, planes.scale, *planes.strides,
            params.coding.threshold, RELATIVE=params.coding.relative, N=layout.block_size,
            **_sizes(layout.head_size), **_transform(layout), TOKENS=APPEND_TOKENS,
        )  # fmt: skip

    def scan(self, layer, query, block_table, seq_lens, longest=None):
        params = layer.params
        rows = self._rows(params, query, block_table, seq_lens)
        held = block_table.shape[1] * params.layout.block_size
        if longest is None:
            longest = max(0, min(int(seq_lens.max()), held)) if rows else 0
        shape = (rows, params.num_score_heads, longest)
        scores = torch.full(shape, float("-inf"), dtype=torch.float32, device=query.device)
        if longest:
            plan = self._plan(params, rows, longest, query.device)
            for first in range(0, rows, plan.rows):
                some = slice(first, first + plan.rows)
                batch = (block_table[some], seq_lens[some], None, scores[some])
                self._scan(plan, layer, query[some], *batch)
        return scores

    def select(self, params, scores, seq_lens, budgets, most=None):
        rows, heads, _ = scores.shape
        check_tensor("scores", scores, torch.float32, rows, heads, None)
        check_tensor("seq_lens", seq_lens, torch.int32, rows)
        check_tensor("budgets", budgets, torch.int32, rows)
        kept = params.attended(seq_lens.clamp_max(scores.shape[2]), budgets)
        if most is None:
            most = int(kept.max()) if rows else 0
        tokens = torch.empty_like(scores, dtype=torch.int32)
        if most:
            self._select(params, scores, tokens, seq_lens, budgets, sparse_only=False)
        index = torch.arange(most, device=scores.device)
        return tokens[..., :most].masked_fill(index >= kept[:, None, None], -1)

    def decode(self, layer, query, batch, output, stats, lse=None):
        """As :meth:`Backend.decode`; if ``budgets`` is the tensor ``seq_lens``, every row is dense."""
        params, block_table = layer.params, batch.block_table
        seq_lens, budgets = batch.seq_lens, batch.budgets
        rows = seq_lens.shape[0]
        query, output = query[:rows], output[:rows]  # padding may follow
        self._rows(params, query, block_table, seq_lens)
        check_tensor("output", output, output.dtype, *query.shape)
        check_tensor("budgets", budgets, torch.int32, rows)
        check_tensor("stats", stats, torch.int64, COUNTERS)
        if lse is not None:
            check_tensor("lse", lse, torch.float32, rows, params.num_query_heads)
        if not rows:
            return
        longest = block_table.shape[1] * params.layout.block_size
        if batch.max_seq_len is not None:
            longest = min(longest, batch.max_seq_len)
        dense = params.sliding_window > 0 or budgets is seq_lens
        plan = self._plan(params, rows, longest, query.device)
        scores, tokens = (x[..., :longest] for x in (plan.scores, plan.tokens))
        for first in range(0, rows, plan.rows):
            some = slice(first, first + plan.rows)
            out = output[some]
            rows_of_pass = (block_table[some], seq_lens[some], budgets[some])
            if not dense:
                self._scan(plan, layer, query[some], *rows_of_pass, scores)
                self._select(params, scores, tokens, *rows_of_pass[1:], sparse_only=True)
                self._attend(plan, layer, query[some], *rows_of_pass, longest, tokens)
            self._attend(plan, layer, query[some], *rows_of_pass, longest, None)
            merge_kernel[len(out), params.num_query_heads](
                plan.partial, plan.maximum, plan.total, out, *out.stride()[:2], *rows_of_pass[1:],
                params.sinks, stats, None if lse is None else lse[some], params.v_scale, longest, params.least_budget, WINDOW=params.sliding_window,
                PARTS=plan.parts, **_sizes(params.layout.head_size),
            )  # fmt: skip

    def gather(self, layer, block_table, seq_lens, key, value):
        params, planes = layer.params, layer.planes
        layout, rows = params.layout, seq_lens.shape[0]
        check_tensor("key", key, key.dtype, None, params.num_kv_heads, layout.head_size)
        check_tensor("value", value, key.dtype, *key.shape)
        check_tensor("seq_lens", seq_lens, torch.int32, rows)
        check_tensor("block_table", block_table, torch.int32, rows, None)
        longest = min(len(key), block_table.shape[1] * layout.block_size)
        if not rows or not longest:
            return
        gather_kernel[triton.cdiv(longest, GATHER_TOKENS), rows, params.num_kv_heads](
            planes.k, planes.v, *planes.strides[:2], block_table, block_table.stride(0),
            seq_lens, key, value, *key.stride()[:2], *value.stride()[:2], len(key), longest,
            params.k_scale, params.v_scale, N=layout.block_size, **_sizes(layout.head_size),
            MANTISSA=_mantissa(params), TOKENS=GATHER_TOKENS,
        )  # fmt: skip

    def _scan(self, plan, layer, query, block_table, seq_lens, budgets, scores):
        params, planes = layer.params, layer.planes
        rows, heads, layout = len(query), params.num_kv_heads, params.layout
        dot = params.score == "dot"
        shared, maximum = params.selection == "kv_head", params.combine == "max"
        summed = dot and shared and not maximum
        encode_kernel[rows, heads](
            query, plan.planes, plan.bias, plan.factor, *query.stride()[:2], params.coding.threshold,
            params.logit_scale, DOT=dot, SUMMED=summed, RELATIVE=params.coding.relative, GROUP=params.group,
            GROUP_PADDED=_padded(params.group), **_sizes(layout.head_size), **_transform(layout),
        )  # fmt: skip
        sizes = {
            "ROWS": 1 if summed else _padded(params.group),
            "N": layout.block_size,
            "CODED": layout.coded_size,
            "TOKENS": SCAN_TOKENS,
            "enable_fp_fusion": False,
        }
        coded = (plan.planes, plan.bias, plan.factor, plan.log_sum)
        pages = (planes.hi, planes.lo, planes.scale, *planes.strides[2:])
        table = (block_table, block_table.stride(0), seq_lens, budgets)
        limits = (scores.shape[2], params.least_budget)
        if maximum:
            sample_kernel[rows, heads](*coded, *pages, *table, *limits, **sizes)
        scan_kernel[rows, heads, plan.scan_parts](
            *coded, *pages, *table, scores, *scores.stride()[:2], *limits, DOT=dot, SHARED=shared,
            MAXIMUM=maximum, GROUP=params.group, **sizes,
        )  # fmt: skip

    def _select(self, params, scores, tokens, seq_lens, budgets, sparse_only):
        select_kernel[len(seq_lens), scores.shape[1]](
            scores, tokens, *scores.stride()[:2], *tokens.stride()[:2], seq_lens, budgets,
            params.num_sink_tokens, params.recent_window, scores.shape[2], params.least_budget,
            SPARSE_ONLY=sparse_only,
            SAMPLES=SAMPLES, TOKENS=SELECT_TOKENS, CANDIDATES=CANDIDATES, num_warps=8,
        )  # fmt: skip

    def _attend(self, plan, layer, query, block_table, seq_lens, budgets, longest, tokens):
        """Partial attention of the sparse rows, or of the dense ones if ``tokens`` is None."""
        params, planes, sparse = layer.params, layer.planes, tokens is not None
        layout = params.layout
        alone = sparse and params.selection == "query_head"
        units = params.num_query_heads if alone else params.num_kv_heads
        dtype = torch.float32 if INTERPRETED else query.dtype  # numpy has no bfloat16
        row_bytes = _padded(layout.head_size) * dtype.itemsize
        attend_kernel[len(query), units, plan.parts](
            query, *query.stride()[:2], planes.k, planes.v, *planes.strides[:2],
            block_table, block_table.stride(0), seq_lens, budgets,
            tokens, *(tokens.stride()[:2] if sparse else (0, 0)),
            plan.partial, plan.maximum, plan.total,
            params.softmax_scale * params.k_scale / math.log(2), longest,
            params.least_budget, CAP=params.logits_soft_cap / math.log(2), WINDOW=params.sliding_window,
            SPARSE=sparse, HEADS=1 if alone else params.group, GROUP=params.group,
            N=layout.block_size, **_sizes(layout.head_size), MANTISSA=_mantissa(params), DTYPE=DTYPES[dtype],
            TOKENS=max(16, min(64, 16384 // row_bytes)),
        )  # fmt: skip

    def _rows(self, params, query, block_table, seq_lens) -> int:
        rows = seq_lens.shape[0]
        check_tensor("seq_lens", seq_lens, torch.int32, rows)
        check_tensor("block_table", block_table, torch.int32, rows, None)
        dtype = query.dtype if params.fp8 else params.layout.dtype
        check_tensor("query", query, dtype, rows, params.num_query_heads, params.layout.head_size)
        return rows

    def _plan(self, params: Params, rows: int, longest: int, device: torch.device) -> Plan:
        longest = rounded_context(longest)
        key = (params, rows, longest, device)
        plan = self._plans.get(key) or Plan(params, rows, longest, device)
        memory = self._workspace.at_least(device, plan.nbytes)
        if key not in self._plans:
            plan.place(memory)
            self._plans[key] = plan
        return plan


class Planes(NamedTuple):
    """Views of the planes of a KV cache, and their strides between blocks and heads in elements."""

    k: torch.Tensor
    v: torch.Tensor
    hi: torch.Tensor
    lo: torch.Tensor
    scale: torch.Tensor
    strides: tuple[int, ...]

    @classmethod
    def of(cls, params: Params, kv_cache: torch.Tensor) -> Planes:
        if params.group > MAX_GROUP:
            raise AdamasError(
                f"{params.group} query heads per KV head are more than the {MAX_GROUP} that the Triton "
                "kernels handle: serve this model with another attention backend."
            )
        layout = params.layout
        # Views through another dtype: they keep the memory alive, but not the tensor kv_cache.
        planes = [
            plane(kv_cache) for plane in (layout.k, layout.v, layout.hi, layout.lo, layout.scale)
        ]
        k, _, hi, _, scale = planes
        return cls(*planes, (*k.stride()[:2], *hi.stride()[:2], *scale.stride()[:2]))


class Plan:
    """The programs and passes of a step of R rows, and its views of the workspace.

    Args:
        longest: an upper bound of the context lengths in tokens.
    """

    def __init__(self, params: Params, rows: int, longest: int, device: torch.device):
        heads, padded = params.num_kv_heads, _padded(params.layout.head_size)
        self.rows = min(rows, max(1, SCORE_BYTES // (8 * params.num_score_heads * longest)))
        processors = (
            torch.cuda.get_device_properties(device).multi_processor_count
            if device.type == "cuda"
            else 1
        )
        wanted = -(-PROGRAMS_PER_SM * processors // (self.rows * heads))
        self.scan_parts = min(wanted, triton.cdiv(longest, SCAN_TOKENS))
        self.parts = min(MAX_PARTS, triton.next_power_of_2(wanted))
        queries = (self.rows, heads, _padded(params.group))
        split = (self.rows, params.num_query_heads, self.parts)
        self._shapes = {
            "scores": (self.rows, params.num_score_heads, longest),
            "tokens": (self.rows, params.num_score_heads, longest),
            "planes": (*queries, PLANES.value, params.layout.words),
            "bias": queries,
            "factor": queries,
            "log_sum": queries,
            "partial": (*split, padded),
            "maximum": split,
            "total": split,
        }
        #: every tensor starts at a multiple of 256 bytes
        self.nbytes = 4 * sum(_aligned(shape) for shape in self._shapes.values())

    def place(self, memory: torch.Tensor) -> None:
        """Cuts the workspace up."""
        memory, first = memory[: self.nbytes].view(torch.float32), 0
        for name, shape in self._shapes.items():
            setattr(self, name, memory[first : first + math.prod(shape)].view(shape))
            first += _aligned(shape)
        for name in ("tokens", "planes", "bias"):
            setattr(self, name, getattr(self, name).view(torch.int32))


def _aligned(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // 64) * 64


def _mantissa(params: Params) -> int | None:
    return ELEMENTS[params.fp8].mantissa if params.fp8 else None


def _padded(size: int) -> int:
    return triton.next_power_of_2(size)


def _sizes(size: int) -> dict[str, int]:
    return {"SIZE": size, "PADDED": _padded(size)}


def _transform(layout: PageLayout) -> dict[str, int]:
    """Dimensions of a signature, and the block size of the Hadamard transform."""
    return {"CODED": layout.coded_size, "BLOCK": layout.coded_size & -layout.coded_size}


def _to_fp8(x: torch.Tensor, kind: str, scale: float) -> torch.Tensor:
    """Quantises to fp8 as the reference does, in PyTorch, because not every GPU has an instruction."""
    top = torch.finfo(ELEMENTS[kind].values).max
    return (x.float() / scale).clamp(-top, top).to(ELEMENTS[kind].values).view(torch.uint8)
