"""Ranks that are threads of one process, of which one runs at a time: what several ranks do, without starting processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from atlas_rl.ranks import RankFailed, Ranks

T = TypeVar("T")
PATIENCE = 60.0
"""Seconds."""


class Group:
    def __init__(self, size: int) -> None:
        self.size = size
        self.turn = threading.Lock()
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.slots: list[Any] = [None] * size

    @property
    def ranks(self) -> list[ThreadRanks]:
        return [ThreadRanks(rank, self) for rank in range(self.size)]

    def run(self, work: Callable[[int], T]) -> list[T | Exception]:
        """What each rank returns or raises; one that raises while others wait for it breaks all of them."""
        results: list[Any] = [None] * self.size

        def main(rank: int) -> None:
            with self.turn:
                try:
                    results[rank] = work(rank)
                except threading.BrokenBarrierError:
                    results[rank] = AssertionError(f"rank {rank} waited in vain")
                except Exception as error:
                    results[rank] = error
                finally:
                    self.left += 1
                    if self.barrier.n_waiting > 0:
                        self.barrier.abort()

        self.left = 0
        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.barrier.reset()
        return results

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.turn.release()
        try:
            if self.left:
                self.barrier.abort()
            self.barrier.wait()
            told = list(self.slots)
            self.barrier.wait()
        finally:
            self.turn.acquire()
        return told


class ThreadRanks(Ranks):
    def __init__(self, rank: int, group: Group) -> None:
        super().__init__(rank, group.size, torch.device("cpu"))
        self.group = group
        self.num_transfers = 0
        """Meetings are not counted."""

    def meet(self, what: str, value: Any = None, error: Exception | None = None) -> list[Any]:
        told = self.group.gather(self.rank, (what, value, error))
        if error is not None:
            raise error
        for rank, (where, _, failure) in enumerate(told):
            if failure is not None:
                raise RankFailed(f"rank {rank} failed in {where}: {type(failure).__name__}: {failure}")
        assert {where for where, _, _ in told} == {what}, f"ranks have lost step: {told}"
        return [value for _, value, _ in told]

    def from_first(self, value: Any) -> Any:
        return self._transfer("from_first", value)[0]

    def exchange(self, to_each: Sequence[np.ndarray]) -> list[np.ndarray]:
        assert len(to_each) == self.size and all(part.dtype == np.int64 for part in to_each)
        return [parts[self.rank].copy() for parts in self._transfer("exchange", to_each)]

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        told = self._transfer("add_up", [tensor.detach().clone() for tensor in tensors])
        for tensor, *parts in zip(tensors, *told, strict=True):
            tensor.detach().copy_(torch.stack(parts).sum(0))

    def take_from_first(self, tensors: Sequence[torch.Tensor]) -> None:
        (first, *_) = self._transfer("take_from_first", [tensor.detach().clone() for tensor in tensors])
        for tensor, value in zip(tensors, first, strict=True):
            tensor.detach().copy_(value)

    def _transfer(self, what: str, value: Any) -> list[Any]:
        self.num_transfers += 1
        return self.meet(what, value)


def run_ranks(size: int, work: Callable[[ThreadRanks], T]) -> list[T]:
    """What `work` returns on each rank; what it raises on one is raised here."""
    group = Group(size)
    ranks = group.ranks
    results = group.run(lambda rank: work(ranks[rank]))
    errors = [result for result in results if isinstance(result, Exception)]
    for error in sorted(errors, key=lambda e: "waited in vain" in str(e)):
        raise error
    return results
