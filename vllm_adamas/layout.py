"""The layout of a page: offsets of K, V and the signature planes in one block of one KV head.

vLLM passes the KV cache of a layer as ``[num_blocks, num_kv_heads, block_size, C]``. The
``(block_size, C)`` interior of each (block, KV head) is one dense run of bytes, divided into planes
(sizes in bytes, N = block_size, D = head_size, E = bytes of a K or V element, S = coded_size(D)):

    one (block, KV head)                                            N * token_bytes
    +------------------+------------------+-----------+-----------+---------+-----+
    | K  [N, D]        | V  [N, D]        | hi        | lo        | scale   | pad |
    | token-major      | token-major      | N*S/8     | N*S/8     | fp16[N] |     |
    +------------------+------------------+-----------+-----------+---------+-----+
    0                  N*D*E              2*N*D*E     +N*S/8      +N*S/8    +2*N

A signature has two bits per dimension of the transformed key, which has S: code = 2*hi + lo, in 0..3, with the
levels 2*code - 3 = {-3, -1, 1, 3}; ``scale`` is the factor that fits the levels to the key (only
the dot score reads it). The planes are stored in tiles of 16 tokens: one 512-bit register holds the
same 32 dimensions of 16 tokens, and one tile is the 16 x S operand of a binary tensor core.

    hi, lo:  uint32 [N/16 tiles][S/32 words][16 tokens]     bit i of word w is dimension 32*w + i

The hi plane alone is a 1-bit signature. For bf16 and D = 128 a token costs 546 bytes instead of
512: 6.6 % more.

This module owns every offset; kernels receive them as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_adamas.errors import AdamasError

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  #: those of vLLM's CPU backend
TILE = 16  #: tokens per signature tile; block sizes are multiples of it
WORD = 32  #: dimensions per signature word
WHOLE = 256  #: head size up to which a token is one run; a larger one takes the bytes of several


@dataclass(frozen=True)
class PageLayout:
    """Offsets and strides of one (block, KV head) run.

    Args:
        head_size: D, one of ``HEAD_SIZES``.
        block_size: N, tokens per block, a multiple of ``TILE``.
        dtype: element type of the K and V planes (``torch.uint8`` holds fp8 bytes).

    Raises:
        AdamasError: the head size or the block size is not supported.
    """

    head_size: int
    block_size: int
    dtype: torch.dtype

    def __post_init__(self):
        if self.head_size not in HEAD_SIZES:
            raise AdamasError(
                f"head_size {self.head_size} is not supported: the adamas backend has kernels for "
                f"{', '.join(map(str, HEAD_SIZES))}; serve this model with another backend."
            )
        if self.block_size < 1 or self.block_size % TILE:
            raise AdamasError(
                f"block_size {self.block_size} is not supported: pass a --block-size that is a "
                f"multiple of {TILE}."
            )

    @property
    def coded_size(self) -> int:
        """S, dimensions of the transformed key."""
        return coded_size(self.head_size)

    @property
    def words(self) -> int:
        """32-bit words of one signature plane per token."""
        return self.coded_size // WORD

    @property
    def v_offset(self) -> int:
        return self.block_size * self.head_size * self.dtype.itemsize

    @property
    def hi_offset(self) -> int:
        return 2 * self.v_offset

    @property
    def lo_offset(self) -> int:
        return self.hi_offset + self.block_size * self.coded_size // 8

    @property
    def scale_offset(self) -> int:
        return self.lo_offset + self.block_size * self.coded_size // 8

    @cached_property
    def token_bytes(self) -> int:
        """C in bytes: what one token of one KV head occupies, a multiple of the element size."""
        return token_bytes(self.head_size, self.dtype)

    def check(self, page: torch.Tensor) -> None:
        """
        Raises:
            AdamasError: the tensor does not hold pages of this layout.
        """
        tokens, content = page.shape[2], page.shape[3] * page.element_size()
        dense = page.stride()[2:] == (page.shape[3], 1)
        if (tokens, content) != (self.block_size, self.token_bytes) or not dense:
            raise AdamasError(
                f"the KV cache has blocks of shape {(tokens, content)} bytes where the page "
                f"layout needs dense ({self.block_size}, {self.token_bytes}): vLLM's KV cache "
                "layout is not the LBHNC that the backend asked for."
            )

    def runs(self, page: torch.Tensor) -> torch.Tensor:
        """The page as bytes: ``[num_blocks, num_kv_heads, block_size * token_bytes]`` uint8."""
        self.check(page)
        raw = page.view(torch.uint8)  # [B, H, N, C]
        blocks, heads = raw.shape[:2]
        run = self.block_size * self.token_bytes
        # PyTorch leaves the stride of a single head arbitrary, and kernels check its alignment.
        strides = (raw.stride(0), raw.stride(1) if heads > 1 else run, 1)
        return raw.as_strided((blocks, heads, run), strides, raw.storage_offset())

    def _plane(
        self, page: torch.Tensor, offset: int, size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        return self.runs(page)[:, :, offset : offset + size].view(dtype)

    def k(self, page: torch.Tensor) -> torch.Tensor:
        """K plane, a view ``[num_blocks, num_kv_heads, N, D]``."""
        plane = self._plane(page, 0, self.v_offset, self.dtype)
        return plane.unflatten(2, (self.block_size, self.head_size))

    def v(self, page: torch.Tensor) -> torch.Tensor:
        """V plane, a view ``[num_blocks, num_kv_heads, N, D]``."""
        plane = self._plane(page, self.v_offset, self.v_offset, self.dtype)
        return plane.unflatten(2, (self.block_size, self.head_size))

    def hi(self, page: torch.Tensor) -> torch.Tensor:
        """High signature bits, an int32 view ``[num_blocks, num_kv_heads, N/16, S/32, 16]``."""
        return self._signature(page, self.hi_offset)

    def lo(self, page: torch.Tensor) -> torch.Tensor:
        """Low signature bits, an int32 view ``[num_blocks, num_kv_heads, N/16, S/32, 16]``."""
        return self._signature(page, self.lo_offset)

    def _signature(self, page: torch.Tensor, offset: int) -> torch.Tensor:
        plane = self._plane(page, offset, self.block_size * self.coded_size // 8, torch.int32)
        return plane.unflatten(2, (self.block_size // TILE, self.words, TILE))

    def scale(self, page: torch.Tensor) -> torch.Tensor:
        """Signature scales, an fp16 view ``[num_blocks, num_kv_heads, N]``."""
        return self._plane(page, self.scale_offset, 2 * self.block_size, torch.float16)


def coded_size(head_size: int) -> int:
    """S, dimensions of a transformed key or query: whole words.

    Zeros pad a head size that is no multiple of 32 to a power of two.
    """
    return head_size if head_size % WORD == 0 else 1 << (head_size - 1).bit_length()


def token_bytes(head_size: int, dtype: torch.dtype) -> int:
    """Bytes of one token and KV head: K, V, two signature bits per dimension and the scale.

    A head of 512 takes as many as two of 256. So layers of both sizes (Gemma 4) can share a pool: vLLM gives the
    smaller ones blocks of twice as many tokens.
    """
    element, parts = dtype.itemsize, -(-head_size // WHOLE)
    signature = coded_size(head_size) // parts // 4 + 2
    return 2 * head_size * element + parts * -(-signature // element) * element


def overhead(head_size: int, dtype: torch.dtype) -> float:
    """Extra bytes of a page over a dense K and V page, as a fraction."""
    return token_bytes(head_size, dtype) / (2 * head_size * dtype.itemsize) - 1.0
