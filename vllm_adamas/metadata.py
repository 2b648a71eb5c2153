"""Per-step metadata: which rows decode, which prefill, and each row's token budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_adamas.checks import adamas_options
from vllm_adamas.config import AdamasConfig
from vllm_adamas.prefill import PrefillPlan


@dataclass
class AdamasMetadata(AttentionMetadata):
    """One step's batch; decode requests come first, then those with several query tokens.

    Args:
        num_decodes: requests with one query token, R.
        context_lens: int32 ``[R]``, tokens in the context, the query's own included.
        budgets: int32 ``[R]``, tokens that a sparse layer attends; the context length where the
            step is dense: prompts (a prefill's last token too) and contexts within the budget.
        block_table: int32 ``[R, blocks]``.
        prefill: plan of the other requests, None without any.
    """

    num_actual_tokens: int
    num_decodes: int
    context_lens: torch.Tensor
    budgets: torch.Tensor
    block_table: torch.Tensor
    prefill: PrefillPlan | None


class AdamasMetadataBuilder(AttentionMetadataBuilder[AdamasMetadata]):
    """Builds :class:`AdamasMetadata` once per step for all layers of a KV cache group."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        self.config = AdamasConfig.parse(adamas_options(vllm_config))

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> AdamasMetadata:
        common = common_attn_metadata
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(common)
        seq_lens = common.seq_lens[: common.num_reqs].to(torch.int32)
        context_lens = seq_lens[:num_decodes].contiguous()
        plan = None
        if num_prefills:
            starts = common.query_start_loc[num_decodes : common.num_reqs + 1].to(torch.int32)
            plan = PrefillPlan.build(
                first_token=num_decode_tokens,
                num_tokens=common.num_actual_tokens - num_decode_tokens,
                query_start_loc=starts - starts[0],
                seq_lens=seq_lens[num_decodes:].contiguous(),
                block_table=common.block_table_tensor[num_decodes : common.num_reqs],
                block_size=self.kv_cache_spec.block_size,
            )
        return AdamasMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=num_decodes,
            context_lens=context_lens,
            budgets=self._budgets(context_lens, common.is_prefilling),
            block_table=common.block_table_tensor[:num_decodes],
            prefill=plan,
        )

    def _budgets(self, context_lens: torch.Tensor, prefilling: torch.Tensor | None) -> torch.Tensor:
        lens = context_lens.tolist()
        dense = prefilling[: len(lens)].tolist() if prefilling is not None else [False] * len(lens)
        return torch.tensor(
            [n if whole else self.config.budget(n) for n, whole in zip(lens, dense, strict=True)],
            dtype=torch.int32,
        )
