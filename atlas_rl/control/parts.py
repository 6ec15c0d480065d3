"""What each drafter would have been worth alone, from what its steps took and what the controller predicts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from statistics import median

from atlas_rl.control.arms import PLAIN, Arm

STEPS_KEPT = 15
MIN_STEPS = 4
"""Of an arm, from which on they are believed: a trial has so many."""
FADE = 0.7
"""What an arm's tokens of earlier rollouts count for as soon as there are new ones."""


@dataclass(slots=True)
class Steps:
    """Of one arm, at batches of about one size."""

    count: float = 0.0
    tokens_per_row: float = 0.0
    """Their sum."""
    slowness: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS_KEPT))
    """Of the latest ones: seconds, drafting included, over those of a plain step for the same rows."""

    @property
    def share(self) -> float:
        """Seconds over those of plain decoding for the same tokens. A median: some steps are interrupted, and take many times as
        long."""
        return median(self.slowness) * self.count / self.tokens_per_row


@dataclass(slots=True)
class Batches:
    """Of about one size, in one rollout: sums over its steps, whoever drafted."""

    count: int = 0
    rows: int = 0
    cached: int = 0
    plain_seconds: float = 0.0
    """What plain decoding would have taken."""

    @property
    def mean(self) -> tuple[int, int]:
        """Rows and cached tokens."""
        return round(self.rows / self.count), round(self.cached / self.count)


class Parts:
    """Estimates how long a rollout's decoding would have taken had one drafter been all there is.

    What the rollout emitted at batches of each size is made again in thought, by plain decoding or by the drafter alone,
    whichever is faster there, as a controller would have found out. How fast the drafter is at a size: as its own latest steps at
    that size were, trials among them, against plain steps; where there were too few, as the controller predicts (from acceptance
    by depth, draft and step times), as far as its predictions for arms with this drafter have come true.

    What is assumed: that a drafter is right as often alone as it is beside others (of a pair's drafts the better ones are
    verified, which flatters). The trials that it would have needed alone are left out.
    """

    def __init__(self) -> None:
        self.batches: dict[int, Batches] = {}
        """Of this rollout."""
        self.steps: dict[tuple[Arm, int], Steps] = {}
        """By arm and size, of this rollout and those before it."""
        self.fresh: set[tuple[Arm, int]] = set()
        """Those that had steps in this one."""
        self.shares: dict[str, float] = {}
        """What `close` came to last."""

    def record(
        self, arm: Arm, num_rows: int, num_cached: int, num_emitted: int, seconds: float, plain_seconds: float
    ) -> None:
        """A step of this arm took `seconds`, drafting included, where a plain one would have taken `plain_seconds`."""
        size, tokens_per_row = (num_rows - 1).bit_length(), num_emitted / num_rows
        batches, steps = self.batches.get(size), self.steps.get((arm, size))
        if batches is None:
            batches = self.batches[size] = Batches()
        if steps is None:
            steps = self.steps[arm, size] = Steps()
        if (arm, size) not in self.fresh:
            self.fresh.add((arm, size))
            steps.count, steps.tokens_per_row = FADE * steps.count, FADE * steps.tokens_per_row
        batches.count += 1
        batches.rows += num_rows
        batches.cached += num_cached
        batches.plain_seconds += tokens_per_row * plain_seconds
        steps.count += 1
        steps.tokens_per_row += tokens_per_row
        steps.slowness.append(seconds / plain_seconds)

    def close(self, names: list[str], rate_of: Callable[[Arm, int, int], float]) -> dict[str, float]:
        """The rollout is over: its decode seconds with each drafter alone, over those of plain decoding.

        Args:
            rate_of: tokens per row and second that an arm is predicted to emit, over so many rows with so many cached tokens.
        """
        batches, self.batches = self.batches, {}
        nothing_new = all(arm == PLAIN for arm, _ in self.fresh)
        self.fresh.clear()
        if batches and nothing_new and self.shares.keys() == set(names):
            return dict(self.shares)  # to work it out takes as long as some steps of a tiny policy

        @cache
        def predicted_share(arm: Arm, size: int) -> float:
            return rate_of(PLAIN, *batches[size].mean) / rate_of(arm, *batches[size].mean)

        self.shares.clear()
        for name in names if batches else ():
            mine = {
                key: steps for key, steps in self.steps.items() if name in key[0] and len(steps.slowness) >= MIN_STEPS
            }
            seen = [(key, steps) for key, steps in mine.items() if key[1] in batches]
            predicted = sum(steps.tokens_per_row * predicted_share(*key) for key, steps in seen)
            come_true = sum(steps.tokens_per_row * steps.share for _, steps in seen) / predicted if predicted else 1.0
            seconds = 0.0
            for size, of_size in batches.items():
                own = mine.get(((name,), size))
                share = own.share if own else come_true * predicted_share((name,), size)
                seconds += of_size.plain_seconds * min(1.0, share)
            self.shares[name] = float(seconds / sum(of_size.plain_seconds for of_size in batches.values()))
        return dict(self.shares)
