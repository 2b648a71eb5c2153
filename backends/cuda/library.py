"""The compiled kernels of ``csrc/sm90`` and their limits."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from vllm_adamas.errors import AdamasError

LIBRARY = Path(__file__).with_name("libadamas_sm90.so")


class Limits(NamedTuple):
    """Limits of the kernels (``csrc/sm90/params.h``).

    Args:
        max_context, max_block: tokens of a context and of a block.
        max_rows: rows of a step.
        max_step: rows * KV heads * tokens of the longest context.
        max_group: query heads per KV head.
        max_cluster: blocks per (row, KV head) of the fused kernel.
        most_wanted: tokens per set that the fused kernel selects in one pass over the signatures.
        max_groups: rows * KV heads of the fused kernel.
    """

    max_context: int
    max_block: int
    max_rows: int
    max_step: int
    max_group: int
    max_cluster: int
    most_wanted: int
    max_groups: int


@cache
def load():
    """Loads the library, which needs no GPU.

    Raises:
        AdamasError: the library is not built.
    """
    if not LIBRARY.exists():
        raise AdamasError(
            f"the CUDA kernels are not built ({LIBRARY.name} is missing): reinstall the package with "
            "ADAMAS_BUILD_CUDA=1 on a host with nvcc 12.4 or newer, or choose kernels=triton."
        )
    import tvm_ffi

    return tvm_ffi.load_module(str(LIBRARY))


@cache
def limits() -> Limits:
    """
    Raises:
        AdamasError: the library is not built.
    """
    return Limits(**{str(name): int(value) for name, value in load().limits().items()})
