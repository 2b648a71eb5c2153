"""Checks of tensor arguments before a kernel launch; cheap when everything fits."""

from __future__ import annotations

import torch


def check_tensor(name: str, x: torch.Tensor, dtype: torch.dtype, *shape: int | None) -> None:
    """Checks the dtype, the shape (None fits any size) and that the last dimension is contiguous.

    Raises:
        ValueError: a constraint is not met; the message names it and the argument.
    """
    if x.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {x.dtype}")
    fits = len(shape) == x.dim() and x.stride(-1) == 1
    if fits and all(s is None or s == n for s, n in zip(shape, x.shape, strict=True)):
        return
    wanted = ", ".join("*" if size is None else str(size) for size in shape)
    raise ValueError(
        f"{name}: expected [{wanted}] with a contiguous last dimension, got {tuple(x.shape)} with "
        f"strides {x.stride()}"
    )
