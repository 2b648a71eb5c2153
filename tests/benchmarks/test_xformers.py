"""xformers' dense decode: what it refuses, what it is given, and kernels against it on a GPU."""

import sys

import pytest
import torch
from cases import CASES, TOLERANCE, Case, relative_error
from common import is_one_sentence
from peers import xformers

from vllm_adamas.backends.reference import ReferenceBackend
from vllm_adamas.backends.registry import get_backend
from vllm_adamas.errors import AdamasError


class Bias:
    """A stand-in where xformers is not needed."""

    page_size = 64


def decode(query: torch.Tensor, block_size: int = 64) -> None:
    key = torch.zeros(3, block_size, 1, query.shape[-1], dtype=query.dtype)
    xformers.dense_decode(query, key, key, Bias(), 1.0)


@pytest.fixture
def no_cache():
    xformers._operator.cache_clear()
    yield
    xformers._operator.cache_clear()


REFUSALS = {
    "head size 96": lambda: decode(torch.zeros(1, 2, 96, dtype=torch.float16)),
    "float32": lambda: decode(torch.zeros(1, 2, 64)),
    "compute capability 8.0": lambda: decode(torch.zeros(1, 2, 64, dtype=torch.float16)),
    "block_size 96": lambda: xformers.attention_bias([1], torch.zeros(1, 1).int(), 96),
    "fp8": lambda: xformers.planes(CASES["e4m3"].params, torch.zeros(0)),
}


@pytest.mark.parametrize("named", REFUSALS)
def test_refusals_name_the_constraint(named: str) -> None:
    with pytest.raises(AdamasError) as error:
        REFUSALS[named]()
    assert named in str(error.value)
    assert is_one_sentence(str(error.value))


def test_a_missing_xformers_is_named(no_cache, monkeypatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.6.0")
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", None)
    with pytest.raises(AdamasError, match=r"xformers==0\.0\.35") as error:
        xformers.attention_bias([1], torch.zeros(1, 1).int(), 64)
    assert is_one_sentence(str(error.value))


def test_a_triton_without_block_pointers_is_named(no_cache, monkeypatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.9.0")
    with pytest.raises(AdamasError, match=r"block pointers, which Triton 3\.9\.0") as error:
        xformers.attention_bias([1], torch.zeros(1, 1).int(), 64)
    assert is_one_sentence(str(error.value))


@pytest.mark.parametrize("lengths", [[0], [65], [3, 3]])
def test_lengths_must_fit_the_block_table(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^(seq_lens|block_table): "):
        xformers.attention_bias(lengths, torch.zeros(1, 1).int(), 64)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^key: "):
        decode(torch.zeros(1, 2, 64, dtype=torch.float16), block_size=128)


@pytest.mark.parametrize("name", ["block128", "group3", "fp16"])
def test_planes_keep_the_block_table(name: str) -> None:
    batch = CASES[name].build(ReferenceBackend())
    size, layout = batch.params.layout.block_size, batch.params.layout
    slots = batch.slots[batch.slots >= 0]
    for got, stored in zip(
        xformers.planes(batch.params, batch.kv_cache), batch.stored(), strict=True
    ):
        assert got.is_contiguous()
        assert got.shape[1:] == (size, batch.params.num_kv_heads, layout.head_size)
        assert torch.equal(got[slots // size, slots % size].float(), stored)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda", "triton"])
@pytest.mark.parametrize("head_size", xformers.HEAD_SIZES)
@pytest.mark.parametrize("heads", [(8, 2), (9, 3), (4, 4), (5, 1)])
def test_dense_rows_are_what_xformers_computes(kernels: str, head_size: int, heads) -> None:
    """Two implementations that share no code read the same keys through the same block table."""
    lengths = (1, 63, 64, 65, 5000)
    for dtype in (torch.float16, torch.bfloat16):
        case = Case(lengths, 1 << 30, heads, head_size, dtype=dtype, padding=0)
        backend = get_backend(kernels, "cuda")
        batch = case.build(backend, "cuda")
        ours, _ = batch.decode(backend)
        key, value = xformers.planes(batch.params, batch.kv_cache)
        bias = xformers.attention_bias(list(lengths), batch.block_table, case.block_size)
        theirs = xformers.dense_decode(batch.query, key, value, bias, batch.params.softmax_scale)
        assert relative_error(ours, theirs).max() <= 2 * TOLERANCE[dtype]  # both round
