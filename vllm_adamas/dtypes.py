"""Element types that models compute in and pages hold, and their numbers in native code."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Element:
    """One element type of K and V.

    Args:
        code: its number in native code (``csrc/common/element.h``).
        values: dtype of its values.
        storage: dtype of a KV cache tensor that holds it; fp8 is stored as bytes.
        mantissa: mantissa bits of an fp8 element. With more than two, the largest code is NaN and there
            is no infinity.
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

#: The element of the page for each ``--kv-cache-dtype``; None stands for the model's own.
KV_CACHE_DTYPES = {
    "auto": None,
    "bfloat16": "bfloat16",
    "float16": "float16",
    "fp8": "e4m3",
    "fp8_e4m3": "e4m3",
    "fp8_e5m2": "e5m2",
}

#: Dtypes that models may compute in, by device.
MODEL_DTYPES = {
    "cpu": (torch.bfloat16, torch.float16, torch.float32),
    "cuda": (torch.bfloat16, torch.float16),
}


def fp8_element(kv_cache_dtype: str) -> str | None:
    """``e4m3`` or ``e5m2`` if pages hold fp8 under this ``--kv-cache-dtype``, else None."""
    element = KV_CACHE_DTYPES[kv_cache_dtype]
    return element if element in FP8 else None


def kv_cache_dtype(fp8: str | None) -> str:
    """The ``--kv-cache-dtype`` of pages that hold this fp8 element, or the model's dtype if None."""
    return f"fp8_{fp8}" if fp8 else "auto"


def page_dtype(kv_cache_dtype: str, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a KV cache tensor under this ``--kv-cache-dtype``."""
    element = KV_CACHE_DTYPES[kv_cache_dtype]
    return ELEMENTS[element].storage if element else model_dtype


def element_of(dtype: torch.dtype, fp8: str | None) -> Element:
    """The element of pages with this dtype; with fp8, that of the named fp8 format."""
    return ELEMENTS[fp8 or str(dtype).removeprefix("torch.")]
