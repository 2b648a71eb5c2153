"""Dense attention on a CPU with vLLM's own kernel.

That kernel needs keys as columns (or AMX tiles) inside a block, but pages keep them token-major for
decode. The K and V of prefilled requests are therefore copied, layer by layer, into a scratch cache in
the kernel's own layout, with the kernel's own ``reshape_and_cache``. The output is bit-identical to
CPU_ATTN, except with fp8 pages, whose values are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vllm_adamas.dtypes import kv_cache_dtype
from vllm_adamas.serving import compat
from vllm_adamas.serving.dense.base import DenseAttention, PrefillPlan, runs_of

#: Tokens copied at a time: gathered rows are still in the L2 cache when they are repacked.
PIECE = 512


@dataclass
class Piece:
    """A piece of a request's context: int32 ``[1, blocks]``, int32 ``[1]`` and its int64 scratch slots."""

    block_table: torch.Tensor
    length: torch.Tensor
    slots: torch.Tensor


@dataclass
class Scratch:
    """The places of a plan's requests in the scratch cache, where they follow each other.

    Args:
        table: block table, int32 ``[P, blocks]``.
        ragged: int64, blocks that a request fills only in part.
        slots: int64 ``[seq_len]`` per request.
        new_slots: int64 slots of the step's own tokens, in their order.
        context: pieces of the earlier tokens, to copy from the pages.
        schedules: the kernel's schedule by kernel name, window and number of query heads.
    """

    table: torch.Tensor
    num_blocks: int
    ragged: torch.Tensor
    slots: list[torch.Tensor]
    new_slots: torch.Tensor
    context: list[Piece]
    schedules: dict = field(default_factory=dict)

    @classmethod
    def build(cls, plan: PrefillPlan, block_size: int) -> Scratch:
        lens, queries = plan.seq_lens.tolist(), plan.query_start_loc.diff().tolist()
        blocks = [-(-n // block_size) for n in lens]
        table = torch.zeros(len(lens), max(blocks), dtype=torch.int32)
        slots, start = [], 0
        for row, (n, used) in enumerate(zip(lens, blocks, strict=True)):
            table[row, :used] = torch.arange(start, start + used)
            slots.append(torch.arange(start * block_size, start * block_size + n))
            start += used
        split = [all_.split([n - q, q]) for all_, n, q in zip(slots, lens, queries, strict=True)]
        earlier, new = zip(*split, strict=True)
        context = pieces(plan.block_table, earlier, block_size)
        last = torch.tensor(blocks).cumsum(0) - 1
        ragged = last[torch.tensor(lens) % block_size > 0]
        return cls(table, start, ragged, slots, torch.cat(new), context)


def parts(plan: PrefillPlan, max_tokens: int, block_size: int) -> list[PrefillPlan]:
    """Splits a plan into prepared plans whose contexts hold at most ``max_tokens`` in total."""
    lens, starts = plan.seq_lens.tolist(), plan.query_start_loc.tolist()
    found = []
    for first, last in runs_of(lens, max_tokens):
        part = PrefillPlan(
            first_token=plan.first_token + starts[first],
            num_tokens=starts[last] - starts[first],
            query_start_loc=plan.query_start_loc[first : last + 1] - starts[first],
            seq_lens=plan.seq_lens[first:last],
            block_table=plan.block_table[first:last],
            query_start_loc_cpu=plan.query_start_loc_cpu[first : last + 1],
            seq_lens_cpu=plan.seq_lens_cpu[first:last],
            max_query_len=plan.max_query_len,
            max_seq_len=plan.max_seq_len,
        )
        part.prepared = Scratch.build(part, block_size)
        found.append(part)
    return found


def pieces(
    block_table: torch.Tensor, slots: Sequence[torch.Tensor], block_size: int
) -> list[Piece]:
    """Splits the first ``len(slots[row])`` tokens of every request into pieces of whole blocks."""
    blocks = -(-PIECE // block_size)
    return [
        Piece(
            block_table[row : row + 1, i * blocks : (i + 1) * blocks],
            torch.tensor([len(part)], dtype=torch.int32),
            part,
        )
        for row, some in enumerate(slots)
        if len(some)
        for i, part in enumerate(some.split(blocks * block_size))
    ]


class CpuAttention(DenseAttention):
    """vLLM's CPU kernel over scratch buffers that all layers share.

    The buffers grow to the largest step, but never past the contexts of ``max_tokens`` tokens: more
    requests take several passes.
    """

    def __init__(self):
        self._cache = torch.empty(0, dtype=torch.uint8)
        self._rows = torch.empty(0, dtype=torch.uint8)
        self._max_tokens = 0

    def reserve(self, params, dtype, max_tokens):
        """Allocates nothing, since short prompts need little."""
        self._max_tokens = max(self._max_tokens, max_tokens)
        return 0

    def prefill(self, backend, layer, plan, query, key, value, output):
        if plan.prepared is None:
            plan.prepared = parts(plan, self._max_tokens, layer.params.layout.block_size)
        ops, isa_of = compat.cpu_attention()
        layout, kind = layer.params.layout, kv_cache_dtype(layer.params.fp8)
        isa = isa_of(query.dtype, layout.block_size, layout.head_size, kind)
        for part in plan.prepared:
            self._prefill(ops, isa, backend, layer, part, query, key, value, output)

    def _prefill(self, ops, isa, backend, layer, plan, query, key, value, output):
        from vllm import envs

        params = layer.params
        kind = kv_cache_dtype(params.fp8)
        layout, window = params.layout, params.sliding_window or -1
        size, heads, block = layout.head_size, params.num_kv_heads, layout.block_size
        here, scratch = plan.tokens, plan.prepared
        cache = self._buffer("_cache", (scratch.num_blocks, heads, 2 * block, size), layout.dtype)
        # The kernel multiplies the unused tail of a block by zero weights, so it must hold no NaN.
        cache.view(torch.uint8)[scratch.ragged] = 0
        key_cache, value_cache = cache.chunk(2, dim=2)
        scales = {
            "k_scale": params.k_scale,
            "v_scale": params.v_scale,
            "kv_cache_dtype": kind,
        }

        def repack(keys, values, slots):
            ops.cpu_attn_reshape_and_cache(
                keys, values, key_cache, value_cache, slots, isa, **scales
            )

        def copy(parts):
            for piece in parts:
                shape = (2, piece.slots.shape[0], heads, size)
                keys, values = self._buffer("_rows", shape, query.dtype)
                backend.gather(layer, piece.block_table, piece.length, keys, values)
                repack(keys, values, piece.slots)

        # A layer that shares another layer's cache has no keys of its own. The kernel truncates to fp8, an
        # error of 4 % on average; values from the page are already rounded to nearest and stay exact.
        if key is None or params.fp8:
            copy(pieces(plan.block_table, scratch.slots, block))
        else:
            copy(scratch.context)
            repack(key[here], value[here], scratch.new_slots)
        schedule = scratch.schedules.get((isa, window, params.num_query_heads))
        if schedule is None:
            schedule = scratch.schedules[isa, window, params.num_query_heads] = (
                ops.cpu_attn_get_scheduler_metadata(
                    num_reqs=plan.seq_lens.shape[0],
                    num_heads=params.num_query_heads,
                    num_kv_heads=heads,
                    head_dim=size,
                    seq_lens=plan.seq_lens,
                    dtype=query.dtype,
                    query_start_loc=plan.query_start_loc,
                    causal=True,
                    sliding_window_size=window,
                    isa=isa,
                    enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                    kv_cache_dtype=kind,
                )
            )
        ops.cpu_attention_with_kv_cache(
            query=query[here],
            key_cache=key_cache,
            value_cache=value_cache,
            output=output[here],
            query_start_loc=plan.query_start_loc,
            seq_lens=plan.seq_lens,
            scale=params.softmax_scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=window,
            block_table=scratch.table,
            softcap=params.logits_soft_cap,
            scheduler_metadata=schedule,
            s_aux=params.sinks,
            **scales,
        )

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        if getattr(self, name).numel() < size:
            # Free it before the larger one is allocated.
            setattr(self, name, torch.empty(0, dtype=torch.uint8))
            setattr(self, name, torch.empty(size + size // 4, dtype=torch.uint8))
        return getattr(self, name)[:size].view(dtype).view(shape)
