"""Work that ranks do side by side, in stretches that end with a sum over them: what fails on one fails on all, at that sum."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch

from atlas_rl.ranks import Ranks


class Joint:
    """As a context manager it holds back what a stretch of this rank's own work raises, until the next `add_up`:

    with joint:
        part += work_that_may_fail()
    joint.add_up([part])
    """

    def __init__(self, ranks: Ranks, what: str) -> None:
        self.ranks, self.what = ranks, what
        self.error: Exception | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if isinstance(error, Exception):
            self.error = self.error or error  # the first is the cause
        return isinstance(error, Exception)

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over ranks.

        Raises:
            Exception: what was held back on this rank.
            RankFailed: another rank has held something back.
        """
        error, self.error = self.error, None
        if self.ranks.size == 1:
            self.ranks.meet(self.what, error=error)
            return
        failures = torch.full((1,), float(error is not None), device=tensors[0].device)
        self.ranks.add_up([*tensors, failures])
        if failures:
            self.ranks.meet(self.what, error=error)
