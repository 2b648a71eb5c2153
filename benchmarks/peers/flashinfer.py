"""FlashInfer's paged decode: on tensor cores or on CUDA cores.

A step is planned outside the CUDA graph: either for any lengths, as engines do, or for exactly these.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from peers.base import Call, Cell, Peer

BLOCK_SIZE = 64
WORKSPACE_BYTES = 128 << 20
#: A plan takes less than 1 KiB; the default is 8 MiB, on the GPU and again in pinned memory.
PLAN_BYTES = 1 << 20


def prepare(cell: Cell) -> dict[str, Callable[[], list[Call]]]:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    pages = cell.pages(BLOCK_SIZE)
    device, dtype = pages[0].device, pages[0].dtype
    tables = cell.block_tables(BLOCK_SIZE)
    queries = cell.queries(len(tables))
    outputs = [torch.empty_like(query) for query in queries]
    # A plan reads these on the host.
    starts = torch.arange(cell.rows + 1, dtype=torch.int32) * (cell.length // BLOCK_SIZE)
    last = torch.full((cell.rows,), BLOCK_SIZE, dtype=torch.int32)
    # Shared by all calls, since they run one after another on one stream.
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def planned(table: torch.Tensor, tensor_cores: bool, any_lengths: bool):
        indices = table.view(-1)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=any_lengths,
            use_tensor_cores=tensor_cores,
            paged_kv_indptr_buffer=starts.to(device=device),
            paged_kv_indices_buffer=torch.empty_like(indices),
            paged_kv_last_page_len_buffer=last.to(device=device),
        )
        plan_memory = torch.empty(PLAN_BYTES, dtype=torch.uint8, device=device)
        wrapper.reset_workspace_buffer(workspace, plan_memory)
        wrapper.plan(
            starts,
            indices,
            last,
            cell.num_query_heads,
            cell.num_kv_heads,
            cell.head_size,
            BLOCK_SIZE,
            q_data_type=dtype,
            kv_data_type=dtype,
            sm_scale=cell.softmax_scale,
        )
        return wrapper

    def calls(tensor_cores: bool, any_lengths: bool) -> list[Call]:
        wrappers = [planned(table, tensor_cores, any_lengths) for table in tables]
        return [
            lambda w=w, q=q, o=o: w.run(q, pages, out=o)
            for w, q, o in zip(wrappers, queries, outputs, strict=True)
        ]

    return {
        f"{cores} cores, {plan} plan": partial(calls, cores == "tensor", plan == "general")
        for cores in ("tensor", "CUDA")
        for plan in ("general", "exact")
    }


PEER = Peer("flashinfer", "FlashInfer", "FlashInfer", "flashinfer", "flashinfer-python", prepare)
