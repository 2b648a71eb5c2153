"""Dense prefill on NVIDIA GPUs: vLLM's FlashAttention over strided views of the page."""

from __future__ import annotations

from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

from vllm_adamas.prefill import Prefill


class FlashPrefill(Prefill):
    """K and V planes are passed as they lie: FlashAttention takes any page and token stride."""

    def run(self, backend, params, plan, kv_cache_dtype, query, key, value, page, output):
        layout = params.layout
        window = [params.sliding_window - 1, 0] if params.sliding_window else [-1, -1]
        flash_attn_varlen_func(
            q=query[plan.tokens],
            k=layout.k(page).transpose(1, 2),  # [num_blocks, N, Hkv, D]
            v=layout.v(page).transpose(1, 2),
            out=output[plan.tokens],
            cu_seqlens_q=plan.query_start_loc,
            max_seqlen_q=plan.max_query_len,
            seqused_k=plan.seq_lens,
            max_seqlen_k=plan.max_seq_len,
            softmax_scale=params.softmax_scale,
            causal=True,
            window_size=window,
            block_table=plan.block_table,
            fa_version=get_flash_attn_version(head_size=layout.head_size),
        )
