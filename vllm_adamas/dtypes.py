"""Element types: what models compute in, what pages hold, and how native code numbers them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Element:
    """One element type of K and V.

    Args:
        code: its number in native code (``csrc/common/element.h``).
        values: what its bytes mean.
        storage: what a KV cache tensor says it holds; fp8 is kept as bytes.
        mantissa: bits of an fp8 element's mantissa; the exponent has the others. With more than two the
            largest code is NaN and there is no infinity.
    """

    code: int
    values: torch.dtype
    storage: torch.dtype
    mantissa: int | None = None


ELEMENTS = {
    "float32": Element(0, torch.float32, torch.float32),
    "bfloat16": Element(1, torch.bfloat16, torch.bfloat16),
    "float16": Element(2, torch.float16, torch.float16),
    "e4m3": Element(3, torch.float8_e4m3fn, torch.uint8, mantissa=3),
    "e5m2": Element(4, torch.float8_e5m2, torch.uint8, mantissa=2),
}
FP8 = tuple(name for name, element in ELEMENTS.items() if element.storage is torch.uint8)

#: ``--kv-cache-dtype`` and the element of the page; None is the model's own.
KV_CACHE_DTYPES = {
    "auto": None,
    "bfloat16": "bfloat16",
    "float16": "float16",
    "fp8": "e4m3",
    "fp8_e4m3": "e4m3",
    "fp8_e5m2": "e5m2",
}

#: What models may compute in, by device.
MODEL_DTYPES = {
    "cpu": (torch.bfloat16, torch.float16, torch.float32),
    "cuda": (torch.bfloat16, torch.float16),
}


def fp8_element(kv_cache_dtype: str) -> str | None:
    """``e4m3`` or ``e5m2`` if pages of this ``--kv-cache-dtype`` hold fp8, else None."""
    element = KV_CACHE_DTYPES[kv_cache_dtype]
    return element if element in FP8 else None


def kv_cache_dtype(fp8: str | None) -> str:
    """The ``--kv-cache-dtype`` of pages that hold this fp8 element, or real values."""
    return f"fp8_{fp8}" if fp8 else "auto"


def page_dtype(kv_cache_dtype: str, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a KV cache tensor under this ``--kv-cache-dtype``."""
    element = KV_CACHE_DTYPES[kv_cache_dtype]
    return ELEMENTS[element].storage if element else model_dtype


def element_of(dtype: torch.dtype, fp8: str | None) -> Element:
    """The element of pages of a dtype, or the fp8 one."""
    return ELEMENTS[fp8 or str(dtype).removeprefix("torch.")]
