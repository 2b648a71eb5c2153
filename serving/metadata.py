"""Metadata of a step: decode rows, prefill requests and the token budget of each row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_adamas.backends.base import DecodeBatch
from vllm_adamas.budget import TokenBudget
from vllm_adamas.config import AdamasConfig
from vllm_adamas.errors import AdamasError
from vllm_adamas.serving import compat
from vllm_adamas.serving.audit import Audit
from vllm_adamas.serving.checks import OTHER_BACKEND, read_config, warnings
from vllm_adamas.serving.dcp import ContextShare
from vllm_adamas.serving.dense.base import PrefillPlan, SharedContext

logger = init_logger("vllm.adamas")


@dataclass
class AdamasMetadata(AttentionMetadata):
    """The batch of a step: first the rows of decode requests, then requests with more query tokens.

    A decode request has one query token, and one more for each token that a drafter proposed. Each of
    them is a row, whose context ends with its own token.

    Args:
        num_decode_rows: number of rows, R.
        decode: the rows, by the budget of a layer. The budget of a dense row is its context length;
            rows are dense if they belong to a prompt (the last token of a prefill too) or if the budget
            covers the context. With DCP their lengths are those of this rank's shares, and the budgets
            those of the whole contexts.
        query_start_loc: int32 ``[R + 1]``, 0 to R.
        prefill: plan of the other requests, None if there are none.
        slot_mapping: int64 ``[tokens]``, slots of the step's keys and values.
        audit: keeps rows of what the layers decode; None unless the step is audited or captured.
    """

    num_decode_rows: int
    decode: dict[TokenBudget, DecodeBatch]
    query_start_loc: torch.Tensor
    prefill: PrefillPlan | None
    slot_mapping: torch.Tensor
    audit: Audit | None = None


def row_budgets(
    budget: TokenBudget,
    seq_lens: torch.Tensor,
    prefilling: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Writes the budget of every row, on the rows' device and without a host sync.

    Args:
        seq_lens, out: int32 ``[R]``, including the padding of a captured graph.
        prefilling: bool on the host, whether a row belongs to a prompt and is therefore dense. It may be
            shorter than R: Model Runner V2 pads lengths to the size of a graph but not this mask.
    """
    budget.fill(seq_lens, out)
    if prefilling is not None and bool(prefilling.any()):
        rows, whole = len(prefilling), prefilling.to(out.device, non_blocking=True)
        out[:rows] = torch.where(whole, seq_lens[:rows], out[:rows])


def raise_budgets(requested: torch.Tensor, seq_lens: torch.Tensor, out: torch.Tensor) -> None:
    """Raises the budgets of rows to what their requests ask for, on the rows' device and without a host sync.

    Args:
        requested: int32 on the host, tokens that a row's request asks for, 0 for none. It may have another
            length than R: either may lack the padding of a captured graph.
        seq_lens, out: int32 ``[R]``.
    """
    rows = min(len(requested), len(out))
    wanted = requested[:rows].to(out.device, non_blocking=True)
    torch.maximum(out[:rows], torch.minimum(wanted, seq_lens[:rows]), out=out[:rows])


def draft_rows(
    tokens: torch.Tensor, ends: torch.Tensor, seq_lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The requests and context lengths of query tokens, without a host sync.

    Args:
        tokens: ``[R]`` indices of query tokens.
        ends: ``[requests]`` the number of query tokens up to each request's last one.
        seq_lens: int32 ``[requests]`` context lengths at each request's last query token.

    Returns:
        ``[R]`` requests and ``[R]`` lengths; those of tokens past the last request's have no meaning.
    """
    requests = torch.searchsorted(ends, tokens, right=True).clamp_(max=len(ends) - 1)
    return requests, seq_lens[requests] - (ends[requests] - 1 - tokens)


def require_supported(common: CommonAttentionMetadata) -> None:
    """
    Raises:
        AdamasError: the step needs attention that is not causal over the whole context. Models known to
            need it are refused before the server starts.
    """
    for wanted, what in (
        (common.causal is not True, "non-causal attention"),
        (common.rswa_prefix_lens is not None, "reference sliding window attention"),
    ):
        if wanted:
            raise AdamasError(f"the adamas backend does not support {what}: {OTHER_BACKEND}.")


class AdamasMetadataBuilder(AttentionMetadataBuilder[AdamasMetadata]):
    """Builds :class:`AdamasMetadata` once per step for all layers of a KV cache group."""

    # As many query tokens per request as drafts allow; graphs replay with any context lengths, budgets and
    # block tables, because a captured graph holds rows and knows no requests.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(
            1, supports_spec_as_decode=True, supports_dcp_with_varlen=True
        )
        self._share = ContextShare.of(vllm_config)
        config = read_config(vllm_config)
        layer = compat.layers_of(vllm_config)[layer_names[0]]
        self._chunked, shared = compat.attention_chunk(layer) > 0, layer.impl.shared
        self.stats, self._requested = shared.stats, shared.requested
        # Once per builder and not per layer, because it reads the model's files.
        for warning in warnings(vllm_config, config):
            logger.warning_once(warning)
        # Captured graphs read starts, lengths, positions, block tables and budgets from these tensors.
        rows = compat.max_decode_rows(vllm_config)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros_like(self._starts[:-1])
        self._positions = torch.zeros_like(self._seq_lens)
        self._share_lens = torch.zeros_like(self._seq_lens)
        self._block_table: torch.Tensor | None = None  # made when its width is known
        self.audit = Audit.of(vllm_config, config, layer_names, device)
        self.configure(config)

    def configure(self, config: AdamasConfig) -> None:
        """Makes a tensor for each distinct budget of the layers; called once in a server."""
        self._budgets = {budget: torch.zeros_like(self._seq_lens) for budget in config.budgets}

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata):
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)
        self.stats.warming_up = True
        if self.audit is not None:
            self.audit.reset()
            metadata.audit = self.audit
        return metadata

    def set_budgets(self, budget: TokenBudget, seq_lens, prefilling, out) -> None:
        """Writes the configured budgets; an evaluation replaces this method to set a budget per request."""
        row_budgets(budget, seq_lens, prefilling, out)

    def _fill(self, budget: TokenBudget, seq_lens, prefilling, requested, out) -> None:
        """Writes the budgets of the rows of a step."""
        if self._chunked:  # rows are those of dense layers, and their requests parts of requests
            out.copy_(seq_lens)
            return
        self.set_budgets(budget, seq_lens, prefilling, out)
        if requested is not None:
            raise_budgets(requested, seq_lens, out)

    def _rows(
        self, common: CommonAttentionMetadata, num_decodes: int, num_rows: int
    ) -> tuple[
        torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
    ]:
        """Rows of the decode requests, on their device and without a host sync.

        Returns:
            int32 ``[R]`` context lengths and int32 ``[R, blocks]`` block tables, both with zero lengths for
            the padding of a captured graph; int32 ``[R]`` the rows' places in their requests, None in
            servers without drafts; and on the host which rows belong to a prompt, None if
            vLLM does not say it, and int32 the tokens that their requests ask for, None if none asks.
        """
        seq_lens, tables = common.seq_lens[:num_decodes], common.block_table_tensor[:num_decodes]
        prefilling = common.is_prefilling
        prefilling = None if prefilling is None else prefilling[:num_decodes]
        requested = None
        if self._requested:
            slots = compat.request_slots(common, num_decodes)
            requested = torch.tensor(
                [self._requested.get(slot, 0) for slot in slots], dtype=torch.int32, device="cpu"
            )
        if self.reorder_batch_threshold == 1 or not num_decodes:
            return seq_lens, tables, None, prefilling, requested
        tokens, ends = self._starts[:num_rows], common.query_start_loc[1 : num_decodes + 1]
        requests, own = draft_rows(tokens, ends, seq_lens)
        query_lens = common.query_start_loc_cpu.diff()
        prefilling, requested = (
            None if each is None else each.repeat_interleave(query_lens[: len(each)])
            for each in (prefilling, requested)
        )
        if self._block_table is None:
            self._block_table = tables.new_zeros(len(self._seq_lens), tables.shape[1])
        return (
            torch.mul(own, tokens < ends[-1], out=self._seq_lens[:num_rows]),  # 0 for padding
            torch.index_select(tables, 0, requests, out=self._block_table[:num_rows]),
            torch.sub(tokens, common.query_start_loc[requests], out=self._positions[:num_rows]),
            prefilling,
            requested,
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> AdamasMetadata:
        common = common_attn_metadata
        require_supported(common)
        num_decodes, num_prefills, num_decode_tokens, num_prefill_tokens = (
            split_decodes_and_prefills(common, decode_threshold=self.reorder_batch_threshold)
        )
        seq_lens, block_table, positions, *hosted = self._rows(
            common, num_decodes, num_decode_tokens
        )
        rows, decode, share = len(seq_lens), {}, self._share
        held, longest = seq_lens, common.max_seq_len
        if share:  # captured graphs read these lengths too
            held = self._share_lens[:rows].copy_(share.lens(seq_lens))
            longest = share.most(longest)
        for budget, buffer in self._budgets.items():
            budgets = buffer[:rows]
            self._fill(budget, seq_lens, *hosted, budgets)
            decode[budget] = DecodeBatch(
                block_table=block_table,
                seq_lens=held,
                budgets=budgets,
                max_seq_len=longest,
                positions=positions,
                num_requests=num_decodes,
                overlap=True,  # projections precede decode in a step
            )
        plan = None
        if num_prefills:
            starts = common.query_start_loc[num_decodes : common.num_reqs + 1]
            plan = PrefillPlan(
                first_token=num_decode_tokens,
                num_tokens=num_prefill_tokens,
                query_start_loc=starts - starts[0],
                seq_lens=common.seq_lens[num_decodes : common.num_reqs],
                block_table=common.block_table_tensor[num_decodes : common.num_reqs],
                query_start_loc_cpu=common.query_start_loc_cpu[num_decodes : common.num_reqs + 1],
                seq_lens_cpu=common.seq_lens_cpu_upper_bound[num_decodes : common.num_reqs],
                max_query_len=common.max_query_len,
                max_seq_len=common.max_seq_len,
            )
            if share:
                plan.context = SharedContext.of(share, plan)
        self.stats.tick()
        return AdamasMetadata(
            num_decode_rows=rows,
            decode=decode,
            query_start_loc=self._starts[: rows + 1],
            prefill=plan,
            slot_mapping=common.slot_mapping,
            audit=self._audited(common, decode, num_decodes, hosted),
        )

    def _audited(
        self,
        common: CommonAttentionMetadata,
        decode: dict[TokenBudget, DecodeBatch],
        num_decodes: int,
        hosted: list[torch.Tensor | None],
    ) -> Audit | None:
        """The audit, if this step is audited."""
        if self.audit is None:
            return None
        lens = common.seq_lens
        if lens.device.type != "cpu":
            lens = common.seq_lens_cpu_upper_bound
        made_up = lens is None  # requests that vLLM has made up
        if made_up or not num_decodes:
            return self.audit.step(decode, None)
        return self.audit.step(
            decode, partial(self._sparse_rows, common, lens[:num_decodes], hosted)
        )

    def _sparse_rows(
        self,
        common: CommonAttentionMetadata,
        seq_lens: torch.Tensor,
        hosted: list[torch.Tensor | None],
        budget: TokenBudget,
    ) -> list[tuple[int, int]]:
        """The rows of a step that a budget makes sparse, and upper bounds of their lengths.

        Args:
            seq_lens: int32 on the host, those of the decode requests.
        """
        if self.reorder_batch_threshold > 1:
            ends = common.query_start_loc_cpu[1 : len(seq_lens) + 1]
            tokens = torch.arange(int(ends[-1]), dtype=ends.dtype, device="cpu")
            seq_lens = draft_rows(tokens, ends, seq_lens)[1]
        budgets = torch.empty_like(seq_lens)
        self._fill(budget, seq_lens, *hosted, budgets)
        held = self._share.lens(seq_lens) if self._share else seq_lens
        rows = (budgets < held).nonzero().flatten().tolist()
        return [(row, int(held[row])) for row in rows]
