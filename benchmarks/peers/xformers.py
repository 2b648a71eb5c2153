"""Dense decode with xformers' paged split-K operator: an independent oracle, and a peer to time.

It is not a backend of :mod:`vllm_adamas.backends.base`, because the operator supports neither signatures
nor pages of planes. It expects row i of page p at (p * page_size + i) times one stride. The blocks of an
adamas cache are not a multiple of a row apart, so the operator attends to a copy made by :func:`planes`.
Only xformers' Triton operator is used; the compiled ones of the wheel need the PyTorch that they were
built with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from packaging.version import Version

from peers.base import Call, Cell, Peer
from vllm_adamas.backends.arguments import check_tensor
from vllm_adamas.backends.base import Params
from vllm_adamas.errors import AdamasError

HEAD_SIZES = (64, 128, 256)
BLOCK_SIZE = 64  #: tokens per page in timed runs
BLOCK_MULTIPLE = 64  #: the operator's step along the tokens of a page
DTYPES = (torch.float16, torch.bfloat16)
LAST_TRITON = (3, 8)  #: Triton 3.9 dropped block pointers, which the operator uses


@cache
def _operator():
    """xformers' Triton split-K operator, and the class of its inputs."""
    import triton

    if Version(triton.__version__).release[:2] > LAST_TRITON:
        raise AdamasError(
            f"xformers' split-K operator needs block pointers, which Triton {triton.__version__} has "
            f"dropped: install Triton {'.'.join(map(str, LAST_TRITON))} or older."
        )
    try:
        from xformers.ops.fmha import Inputs
        from xformers.ops.fmha.triton_splitk import FwOp
    except ImportError as error:
        raise AdamasError(
            f"xformers cannot be imported ({error}): install 'vllm-adamas[bench]', or xformers==0.0.35 "
            "beside a PyTorch of 2.10 or newer."
        ) from error
    return FwOp, Inputs


def planes(params: Params, page: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of the K and V planes, ``[num_blocks, N, Hkv, D]``, for the same block tables."""
    if params.fp8:
        raise AdamasError(
            "xformers' operator reads no fp8 pages of this layout: compare bf16 pages."
        )
    layout = params.layout
    key, value = (plane(page).transpose(1, 2).contiguous() for plane in (layout.k, layout.v))
    return key, value


def attention_bias(seq_lens: list[int], block_table: torch.Tensor, block_size: int):
    """xformers' description of a decode step: the tokens and pages that each row attends to.

    Args:
        seq_lens: tokens of each row, at least 1, on the host.
        block_table: int32 ``[R, blocks]``.
        block_size: N, a multiple of ``BLOCK_MULTIPLE``.
    """
    if block_size % BLOCK_MULTIPLE:
        raise AdamasError(
            f"xformers' split-K operator walks pages in steps of {BLOCK_MULTIPLE} tokens: block_size "
            f"{block_size} is not a multiple of it."
        )
    rows = len(seq_lens)
    check_tensor("block_table", block_table, torch.int32, rows, None)
    capacity = block_table.shape[1] * block_size
    if not all(1 <= length <= capacity for length in seq_lens):
        raise ValueError(f"seq_lens: expected 1 to {capacity} tokens each, got {seq_lens}")
    _operator()
    from xformers.ops.fmha import attn_bias as bias

    dense = bias.BlockDiagonalPaddedKeysMask.from_seqlens([1] * rows, capacity, seq_lens)
    paged = dense.make_paged(block_table, block_size, bias.PagedBlockDiagonalPaddedKeysMask)
    return paged.to(block_table.device)


def dense_decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias, softmax_scale: float
) -> torch.Tensor:
    """Attention of R query tokens over their whole contexts, ``[R, Hq, D]``.

    Args:
        query: ``[R, Hq, D]``, contiguous.
        key, value: ``[num_blocks, N, Hkv, D]``, contiguous; Hkv divides Hq.
        bias: result of :func:`attention_bias`.

    Raises:
        AdamasError: xformers has no operator for the head size, the dtype or the device.
    """
    rows, query_heads, size = query.shape
    blocks, block_size, heads, _ = key.shape
    if size not in HEAD_SIZES:
        raise AdamasError(
            f"xformers' split-K operator has no head size {size}: it has "
            f"{', '.join(map(str, HEAD_SIZES))}."
        )
    if query.dtype not in DTYPES:
        raise AdamasError(
            f"xformers' split-K operator has no {query.dtype}: it has float16 and bfloat16."
        )
    check_tensor("key", key, query.dtype, blocks, bias.page_size, heads, size)
    check_tensor("value", value, query.dtype, *key.shape)
    if query.device.type != "cuda" or torch.cuda.get_device_capability(query.device) < (8, 0):
        raise AdamasError(
            "xformers' split-K operator needs an NVIDIA GPU of compute capability 8.0 or newer."
        )
    operator, inputs = _operator()
    group = query_heads // heads
    # Grouped heads share keys and values through a dimension of stride 0.
    shared = (1, blocks * block_size, heads, group, size)
    # Not with memory_efficient_attention, which refuses to run without the compiled operators.
    output, _ = operator.apply(
        inputs(
            query.view(1, rows, heads, group, size),
            key.view(*shared[:3], 1, size).expand(shared),
            value.view(*shared[:3], 1, size).expand(shared),
            attn_bias=bias,
            scale=softmax_scale,
        ),
        needs_gradient=False,
    )
    return output.view(rows, query_heads, size)


def prepare(cell: Cell) -> dict[str, Callable[[], list[Call]]]:
    key, value = cell.pages(BLOCK_SIZE)
    tables = cell.block_tables(BLOCK_SIZE)
    queries = cell.queries(len(tables))
    lengths = [cell.length] * cell.rows
    biases = [attention_bias(lengths, table, BLOCK_SIZE) for table in tables]

    def calls() -> list[Call]:
        return [
            lambda q=q, b=b: dense_decode(q, key, value, b, cell.softmax_scale)
            for q, b in zip(queries, biases, strict=True)
        ]

    return {"split-K": calls}


PEER = Peer("xformers", "xformers split-K", "xformers split-K", "xformers", "xformers", prepare)
