"""Ranks: what the processes of one run tell each other, at the places where all of them provably arrive.

Every phase that communicates begins with `meet`. A rank that fails outside such a phase makes one last call of `meet`, with its
error, and so the others learn of it wherever they arrive next, instead of waiting for it: between two meetings nothing may raise
on one rank alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


class RankFailed(RuntimeError):
    """Another rank of this run has failed; the message says which one, where and why."""


class Ranks:
    """The processes of a run; `Ranks.alone()` is a run of one, to which every method is free.

    All methods are collective: each rank calls them, in the same order.
    """

    def __init__(self, rank: int, size: int, devices: Sequence[torch.device] = (torch.device("cpu"),)) -> None:
        self.rank, self.size = rank, size
        self.devices = devices
        """That the group's backends move tensors between; what lies elsewhere goes by the first."""

    @classmethod
    def alone(cls) -> Ranks:
        return cls(0, 1)

    @classmethod
    def of_run(cls) -> Ranks:
        """Of torch's default process group, if there is one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls.alone()
        types = [pair.partition(":")[0] for pair in dist.get_backend_config().split(",")]  # as in cpu:gloo,cuda:nccl
        devices = [_current(kind) for kind in sorted(types, key=lambda kind: kind != "cpu") if _is_here(kind)]
        return cls(dist.get_rank(), dist.get_world_size(), devices)

    def meet(self, what: str, value: Any = None, error: Exception | None = None) -> list[Any]:
        """Each rank's value (small: it is pickled), by rank.

        Args:
            what: the phase, for the message. error: why this rank cannot go on; one that the others know of already is raised
                without telling them again.
        Raises:
            Exception: `error` itself, on the rank that gave it.
            RankFailed: another rank gave one.
        """
        if error is not None and (self.size == 1 or self.know(error)):
            raise error
        if self.size == 1:
            return [value]
        mine = (None if error is None else f"{type(error).__name__}: {error}", what, value)
        told = self._all_gather(mine)
        if error is not None:
            error.is_told = True
            raise error
        for rank, (failure, where, _) in enumerate(told):
            if failure is not None:
                raise RankFailed(f"rank {rank} failed in {where}: {failure}")
        assert {where for _, where, _ in told} == {what}, f"ranks have lost step: {told}"
        return [value for _, _, value in told]

    def _all_gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @staticmethod
    def know(error: Exception) -> bool:
        """Whether all ranks have heard of this error."""
        return isinstance(error, RankFailed) or hasattr(error, "is_told")

    def from_first(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def exchange(self, to_each: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Send each rank an int64 vector of any length (also oneself); returns what each rank has sent here."""
        assert len(to_each) == self.size
        if self.size == 1:
            return list(to_each)
        device = self.devices[0]
        lens = torch.tensor([len(part) for part in to_each], device=device)
        lens_here = torch.empty_like(lens)
        dist.all_to_all_single(lens_here, lens)
        sent = torch.from_numpy(np.concatenate(to_each).astype(np.int64)).to(device)
        received = torch.empty(int(lens_here.sum()), dtype=torch.int64, device=device)
        dist.all_to_all_single(received, sent, lens_here.tolist(), lens.tolist())
        return np.split(received.cpu().numpy(), np.cumsum(lens_here.tolist())[:-1])

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over ranks (the same bits on all of them), in one transfer in float32 or wider."""
        if self.size == 1 or not tensors:
            return
        dtype = torch.promote_types(torch.float32, tensors[0].dtype)
        flat = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])
        flat = flat.to(self._near(flat))
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.detach().copy_(total.view(tensor.shape))

    def take_from_first(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by rank 0's."""
        for tensor in tensors if self.size > 1 else ():
            there = tensor.detach().to(self._near(tensor)).contiguous()
            dist.broadcast(there, src=0)
            tensor.detach().copy_(there)

    def _near(self, tensor: torch.Tensor) -> torch.device:
        """Where the backends take a tensor: if they can, where it is."""
        return tensor.device if tensor.device.type in {device.type for device in self.devices} else self.devices[0]


def _is_here(kind: str) -> bool:
    accelerator = torch.accelerator.current_accelerator()
    return kind == "cpu" or (accelerator is not None and accelerator.type == kind)


def _current(kind: str) -> torch.device:
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
