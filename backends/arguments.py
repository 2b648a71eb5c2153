"""Checks of tensor arguments before a kernel launch; cheap when everything fits."""

from __future__ import annotations

import torch


def check_same_device(**tensors: torch.Tensor) -> None:
    """Checks that all tensors are on the device of the first one.

    Raises:
        ValueError: a tensor is on another device; the message names the argument.
    """
    device = next(iter(tensors.values())).device
    for name, x in tensors.items():
        if x.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")


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
