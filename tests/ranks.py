"""Ranks of decode context parallelism in one process: threads of which one runs at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

from vllm_adamas.serving.dcp import ContextShare

PATIENCE = 300.0  #: seconds that a rank waits for the others


class Group:
    """What a share uses of vLLM's group."""

    def __init__(self, ranks: Ranks, rank: int):
        self.world_size, self.rank_in_group, self._ranks = ranks.size, rank, ranks
        self.device_communicator = SimpleNamespace(pynccl_comm=SimpleNamespace(disabled=False))

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat(self._ranks.exchange(self.rank_in_group, x), dim)

    def reduce_scatter(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        found = self._ranks.exchange(self.rank_in_group, x)
        return sum(found[1:], found[0]).chunk(self.world_size, dim)[self.rank_in_group].contiguous()


class Ranks:
    def __init__(self, size: int, interleave: int = 1):
        self.size, self.interleave = size, interleave
        self._turn, self._barrier = threading.Lock(), threading.Barrier(size)
        self._given: list[torch.Tensor | None] = [None] * size

    def share(self, rank: int) -> ContextShare:
        return ContextShare(self.size, rank, self.interleave, Group(self, rank))

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        """What every rank gives; the others run meanwhile."""
        self._given[rank] = x.clone()
        self._turn.release()
        try:
            self._barrier.wait(PATIENCE)
            found = list(self._given)
            self._barrier.wait(PATIENCE)
        finally:
            self._turn.acquire()
        return found

    def run(self, call: Callable[[ContextShare], torch.Tensor]) -> list[torch.Tensor]:
        """What the call returns on each rank."""

        def on(rank: int):
            with self._turn:
                try:
                    return call(self.share(rank))
                except BaseException:
                    self._barrier.abort()
                    raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(on, range(self.size)))

    def tokens(self, length: int, rank: int) -> torch.Tensor:
        """The tokens of a context that a rank keeps, in order."""
        token = torch.arange(length)
        return token[token // self.interleave % self.size == rank]
