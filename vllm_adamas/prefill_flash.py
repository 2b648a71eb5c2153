"""Dense attention on NVIDIA GPUs: vLLM's FlashAttention over strided views of the page."""

from __future__ import annotations

from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

from vllm_adamas.prefill import Prefill


class FlashPrefill(Prefill):
    """K and V planes are passed as they lie: FlashAttention takes any page and token stride.

    Decode leaves the schedule to the kernel itself, which works it out on the device: a captured
    graph then replays with any lengths. A schedule prepared once per step, as vLLM's own backend
    does it, saves 1 to 1.5 µs a layer (`benchmarks/results/decode_gpu.json`), less than preparing
    it costs for the few dense layers of a model.
    """

    decodes = True

    def run(self, backend, params, plan, kv_cache_dtype, query, key, value, page, output):
        self._attend(
            params,
            page,
            q=query[plan.tokens],
            out=output[plan.tokens],
            cu_seqlens_q=plan.query_start_loc,
            max_seqlen_q=plan.max_query_len,
            seqused_k=plan.seq_lens,
            max_seqlen_k=plan.max_seq_len,
            block_table=plan.block_table,
        )

    def decode(
        self,
        params,
        query,
        page,
        block_table,
        context_lens,
        query_start_loc,
        output,
        max_context_len,
    ):
        self._attend(
            params,
            page,
            q=query,
            out=output,
            cu_seqlens_q=query_start_loc,
            max_seqlen_q=1,
            seqused_k=context_lens,
            max_seqlen_k=max_context_len,
            block_table=block_table,
        )

    @staticmethod
    def _attend(params, page, **batch):
        layout = params.layout
        flash_attn_varlen_func(
            k=layout.k(page).transpose(1, 2),  # [num_blocks, N, Hkv, D]
            v=layout.v(page).transpose(1, 2),
            softmax_scale=params.softmax_scale,
            causal=True,
            window_size=[params.sliding_window - 1, 0] if params.sliding_window else [-1, -1],
            fa_version=get_flash_attn_version(head_size=layout.head_size),
            **batch,
        )
