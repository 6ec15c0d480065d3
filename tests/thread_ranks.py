"""Ranks that are threads of one process: fast, and of any number."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from atlas_rl.ranks import Ranks


class ThreadRanks(Ranks):
    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(slots))
        self.slots, self.barrier = slots, barrier
        self.num_transfers = 0
        """Meetings are not counted."""

    def gather(self, value: Any) -> list[Any]:
        self.slots[self.rank] = value
        self.barrier.wait(timeout=60)
        told = list(self.slots)
        self.barrier.wait(timeout=60)  # nobody may write again before all have read
        return told

    def _all_gather(self, value: Any) -> list[Any]:
        return self.gather(value)

    def from_first(self, value: Any) -> Any:
        self.num_transfers += 1
        return copy.deepcopy(self.gather(value)[0])

    def exchange(self, to_each: Sequence[np.ndarray]) -> list[np.ndarray]:
        assert len(to_each) == self.size and all(part.dtype == np.int64 for part in to_each)
        self.num_transfers += 1
        return [parts[self.rank].copy() for parts in self.gather(to_each)]

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        self.num_transfers += 1
        told = self.gather([tensor.detach().clone() for tensor in tensors])
        for tensor, parts in zip(tensors, zip(*told)):
            tensor.detach().copy_(sum(part.float() for part in parts))

    def take_from_first(self, tensors: Sequence[torch.Tensor]) -> None:
        self.num_transfers += 1
        for tensor, first in zip(tensors, self.gather([tensor.detach().clone() for tensor in tensors])[0]):
            tensor.detach().copy_(first)


def run_ranks(size: int, function: Callable[[ThreadRanks], Any]) -> list[Any]:
    """What `function` returns on each rank; a rank that raises breaks the others' wait, and its error is raised here."""
    slots, barrier = [None] * size, threading.Barrier(size)

    def run(rank: int) -> Any:
        try:
            return function(ThreadRanks(rank, slots, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
