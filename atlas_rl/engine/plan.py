"""What a decode step is launched for, and who is told of it."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from atlas_rl.control.arms import PLAIN, Arm
from atlas_rl.control.contest import Rest
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.sequence import Sequence
from atlas_rl.types import SamplingParams

NO_DRAFTS = np.zeros(0, np.int64)
NO_PROMISE = np.zeros(1)


@dataclass(slots=True)
class Plan:
    """Who drafts in a step, and what comes of it if drafts are as right as their drafters say."""

    arm: Arm = PLAIN
    asked: Arm = PLAIN
    """The arm that was chosen: it leaves the plan where it has nothing to propose."""
    sources: np.ndarray = field(default_factory=lambda: NO_DRAFTS)
    """[R] which of the arm's drafters each row's draft is from."""
    expected: np.ndarray = field(default_factory=lambda: NO_PROMISE)
    """Accepted tokens that the drafts promise, by drafter of the arm."""
    rest: Rest | None = None
    """Of which the step is one: drafters are not told of it."""


class Listener(Protocol):
    """Told of every decode step and of rows that leave, whoever drafts: what collects material for retraining."""

    def wake(self, sampling: SamplingParams) -> None: ...

    def verified(self, rows: Rows[Sequence], batch: ForwardBatch, num_right: np.ndarray) -> None: ...

    def release(self, rows: Rows[Sequence], finished: bool) -> None: ...
