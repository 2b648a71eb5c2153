"""Device memory shared by the steps of an engine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_adamas.errors import AdamasError


def capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Workspace:
    """One buffer per device, grown to the largest step; the steps of a device run on one stream.

    A captured graph keeps the addresses that it was captured with. A buffer that a graph may use is
    therefore kept after it is replaced, as long as the workspace lives.

    Args:
        release: called before a buffer is replaced, to drop every view of it.
    """

    def __init__(self, release: Callable[[], None] = lambda: None):
        self.buffers: dict[torch.device, torch.Tensor] = {}
        self._captured: set[torch.device] = set()
        self._kept: list[torch.Tensor] = []
        self._release = release

    def at_least(self, device: torch.device, size: int) -> torch.Tensor:
        """A uint8 tensor of at least ``size`` bytes, zero until a kernel writes to it.

        Raises:
            AdamasError: the buffer would have to grow while a CUDA graph is captured.
        """
        found, recording = self.buffers.get(device), capturing(device)
        if found is None or found.numel() < size:
            if recording:
                raise AdamasError(
                    f"the decode workspace would have to grow to {size} bytes while a CUDA graph is "
                    "captured: call reserve() with the largest batch first."
                )
            if device in self._captured:
                self._kept.append(found)
                self._captured.remove(device)
            self._release()
            self.buffers.pop(device, None)
            del found  # free it before the larger one is allocated
            found = self.buffers[device] = torch.zeros(size, dtype=torch.uint8, device=device)
        if recording:
            self._captured.add(device)
        return found
