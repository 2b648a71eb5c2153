"""The compiled kernels of ``csrc/sm90`` and ``csrc/sm80``, and their limits."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from vllm_adamas.backends.base import HOPPER
from vllm_adamas.errors import AdamasError

FOR_HOPPER, FOR_OTHERS = "sm90", "sm80"  #: names of libraries, those of their folders in csrc
LIBRARIES = {
    name: Path(__file__).with_name(f"libadamas_{name}.so") for name in (FOR_HOPPER, FOR_OTHERS)
}


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


def library_of(capability: tuple[int, int]) -> str:
    """The name of the library for GPUs of a compute capability."""
    return FOR_HOPPER if capability == HOPPER else FOR_OTHERS


@cache
def load(library: str = FOR_HOPPER):
    """Loads a library, which needs no GPU.

    Raises:
        AdamasError: the library is not built.
    """
    path = LIBRARIES[library]
    if not path.exists():
        archs = "" if library == FOR_HOPPER else " and ADAMAS_CUDA_ARCHS=all"
        raise AdamasError(
            f"the CUDA kernels are not built ({path.name} is missing): reinstall the package with "
            f"ADAMAS_BUILD_CUDA=1{archs} on a host with nvcc 12.4 or newer, or choose kernels=triton."
        )
    import tvm_ffi

    return tvm_ffi.load_module(str(path))


@cache
def limits(library: str = FOR_HOPPER) -> Limits:
    """Those of the kernels of a library.

    Raises:
        AdamasError: the library is not built.
    """
    return Limits(**{str(name): int(value) for name, value in load(library).limits().items()})
