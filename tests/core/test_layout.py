"""Where the planes of a page lie."""

import math

import pytest
import torch
from common import is_one_sentence

from vllm_adamas.errors import AdamasError
from vllm_adamas.layout import (
    HEAD_SIZES,
    TILE,
    WORD,
    PageLayout,
    coded_size,
    overhead,
    token_bytes,
)

PLANES = ("k", "v", "hi", "lo", "scale")
every_layout = pytest.mark.parametrize(
    "layout",
    [
        PageLayout(size, block, dtype)
        for size in HEAD_SIZES
        for block in (16, 32, 48, 128)
        for dtype in (torch.uint8, torch.bfloat16, torch.float32)
    ],
    ids=lambda layout: f"{layout.head_size}-{layout.block_size}-{layout.dtype}",
)


def empty_page(layout: PageLayout, blocks: int = 3, heads: int = 2) -> torch.Tensor:
    content = layout.token_bytes // layout.dtype.itemsize
    return torch.zeros(blocks, heads, layout.block_size, content, dtype=layout.dtype)


@every_layout
def test_planes_share_no_byte_and_leave_only_padding(layout: PageLayout) -> None:
    page = empty_page(layout)
    for name in PLANES:
        getattr(layout, name)(page).view(torch.uint8).add_(1)
    runs = layout.runs(page)
    end = layout.scale_offset + 2 * layout.block_size
    assert (runs[..., :end] == 1).all()
    assert (runs[..., end:] == 0).all()
    parts = math.ceil(layout.head_size / 256)  # a token of 512 takes as much as two of 256
    padding = parts * layout.dtype.itemsize + 2 * (parts - 1)
    assert runs.shape[-1] - end < layout.block_size * padding


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_two_heads_of_256_take_the_place_of_one_of_512(dtype: torch.dtype) -> None:
    """So that vLLM can share a pool between layers of both without padding."""
    assert token_bytes(512, dtype) == 2 * token_bytes(256, dtype)


@pytest.mark.parametrize("size", HEAD_SIZES)
def test_signatures_are_whole_words(size: int) -> None:
    coded = coded_size(size)
    assert coded % WORD == 0
    assert coded == size if size % WORD == 0 else size < coded == 1 << (size - 1).bit_length()


def test_a_single_head_may_have_any_stride() -> None:
    """As tensor parallelism leaves it: PyTorch does not care, kernels ask for aligned strides."""
    layout = PageLayout(64, 32, torch.bfloat16)
    page = empty_page(layout, heads=1)
    odd = page.as_strided(page.shape, (page.stride(0), 1, *page.stride()[2:]))
    assert layout.runs(odd).stride() == layout.runs(page).stride()
    assert layout.k(odd).stride() == layout.k(page).stride()


@every_layout
def test_shapes_of_the_planes(layout: PageLayout) -> None:
    page, n, d = empty_page(layout), layout.block_size, layout.head_size
    bits = (n // TILE, {80: 4, 112: 4}.get(d, d // 32), TILE)
    shapes = [tuple(getattr(layout, name)(page).shape[2:]) for name in PLANES]
    assert shapes == [(n, d), (n, d), bits, bits, (n,)]


def test_planes_are_views_of_their_block_and_head() -> None:
    """Also when the cache is a slice of a larger allocation."""
    layout = PageLayout(64, 32, torch.bfloat16)
    memory = empty_page(layout, blocks=5, heads=4)
    for name in PLANES:
        getattr(layout, name)(memory[1::2, 1:3])[1, 0] = 1
    touched = memory.view(torch.uint8).flatten(2).any(-1)
    assert touched.nonzero().tolist() == [[3, 1]]


@pytest.mark.parametrize(
    ("size", "dtype", "expected", "extra"),
    [
        (128, torch.bfloat16, 546, 0.0664),
        (128, torch.uint8, 290, 0.1328),
        (64, torch.bfloat16, 274, 0.0703),
        (64, torch.float32, 532, 0.0391),  # 530, up to a multiple of the element
        (256, torch.float16, 1090, 0.0645),
        (80, torch.bfloat16, 354, 0.1063),  # signatures of 128 dimensions
        (112, torch.bfloat16, 482, 0.0759),
        (512, torch.bfloat16, 2180, 0.0645),
    ],
)
def test_bytes_of_a_token(size: int, dtype: torch.dtype, expected: int, extra: float) -> None:
    assert token_bytes(size, dtype) == PageLayout(size, 32, dtype).token_bytes == expected
    assert overhead(size, dtype) == pytest.approx(extra, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((72, 32), "head_size 72"), ((64, 0), "block_size 0"), ((64, 24), "block_size 24")],
)
def test_impossible_layouts_are_refused(arguments: tuple[int, int], named: str) -> None:
    with pytest.raises(AdamasError, match=named) as error:
        PageLayout(*arguments, torch.bfloat16)
    assert is_one_sentence(str(error.value))


def test_a_cache_in_another_layout_is_refused() -> None:
    """With tokens before heads, or with blocks of another size, the offsets would be nonsense."""
    layout = PageLayout(64, 32, torch.bfloat16)
    tokens_first = empty_page(layout).transpose(1, 2).contiguous().transpose(1, 2)
    for page in (tokens_first, empty_page(PageLayout(64, 48, torch.bfloat16))):
        with pytest.raises(AdamasError, match="LBHNC") as error:
            layout.runs(page)
        assert is_one_sentence(str(error.value))
