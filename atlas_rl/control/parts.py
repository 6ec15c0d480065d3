"""What each drafter would have been worth alone, from what the controller has measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from atlas_rl.control.arms import PLAIN, Arm

FADE = 0.7
"""What an arm's earlier steps count for as soon as a rollout has new ones, in how far predictions are off."""
MIN_STEPS = 4
"""Of an arm, from which on its own steps say that: a trial has so many."""


@dataclass(slots=True)
class Steps:
    """Of one arm, at batches of about one size."""

    count: int = 0
    rows: int = 0
    cached: int = 0
    tokens_per_row: float = 0.0
    """Sums over the steps, as are the seconds."""
    seconds: float = 0.0


@dataclass(slots=True)
class Shown:
    """Of one arm's steps: seconds that they took, and that the controller predicts for what they emitted."""

    count: float = 0.0
    taken: float = 0.0
    predicted: float = 0.0

    @property
    def factor(self) -> float:
        return self.taken / self.predicted

    def take(self, newer: Shown) -> None:
        self.count = FADE * self.count + newer.count
        self.taken = FADE * self.taken + newer.taken
        self.predicted = FADE * self.predicted + newer.predicted


class Parts:
    """Estimates how long a rollout's decoding would have taken had one drafter been all there is.

    Counted during the rollout: what its steps emitted per row, by arm and size of the batch. After it, each size's tokens are
    made again in thought, by plain decoding and by the drafter alone, at the rates that the controller predicts (acceptance by
    depth, draft and step times, all measured in this run); the faster one counts, as the controller would have chosen it.

    What is assumed: that the drafter alone would be right as often as it was beside the others (of a pair the better draft is
    verified, and rows without a draft count for nothing, which flatters). Where the drafter had steps of its own, predictions are
    scaled by what those took. Trials, which a single drafter would need as well, are left out.
    """

    def __init__(self) -> None:
        self.steps: dict[tuple[Arm, int], Steps] = {}
        self.shown: dict[Arm, Shown] = {}

    def record(self, arm: Arm, num_rows: int, num_cached: int, num_emitted: int, seconds: float) -> None:
        """A step of this arm took `seconds`, drafting included, and emitted so many tokens."""
        key = arm, (num_rows - 1).bit_length()
        steps = self.steps.get(key)
        if steps is None:
            steps = self.steps[key] = Steps()
        steps.count += 1
        steps.rows += num_rows
        steps.cached += num_cached
        steps.tokens_per_row += num_emitted / num_rows
        steps.seconds += seconds

    def close(self, names: list[str], rate_of: Callable[[Arm, int, int], float]) -> dict[str, float]:
        """The rollout is over: decode seconds with each drafter alone, over those of plain decoding.

        Args:
            rate_of: tokens per row and second of an arm, at so many rows with so many cached tokens in all.
        """
        steps_of, self.steps = self.steps, {}
        if not names:
            return {}
        arms = [PLAIN, *((name,) for name in names)]
        seen: dict[Arm, Shown] = {}
        sizes: dict[int, Steps] = {}
        for (arm, size), steps in steps_of.items():
            if arm in arms:
                shown = seen.setdefault(arm, Shown())
                shown.count += steps.count
                shown.taken += steps.seconds
                shown.predicted += steps.tokens_per_row / rate_of(arm, *_means(steps))
            whole = sizes.setdefault(size, Steps())
            for field in ("count", "rows", "cached", "tokens_per_row"):
                setattr(whole, field, getattr(whole, field) + getattr(steps, field))
        for arm, shown in seen.items():
            self.shown.setdefault(arm, Shown()).take(shown)
        factors = {arm: self._factor(arm) for arm in arms}
        seconds = dict.fromkeys(arms, 0.0)
        for steps in sizes.values():
            took = {arm: factors[arm] * steps.tokens_per_row / rate_of(arm, *_means(steps)) for arm in arms}
            for arm in arms:
                seconds[arm] += min(took[PLAIN], took[arm])
        return {name: float(seconds[name,] / seconds[PLAIN]) for name in names if seconds[PLAIN]}

    def _factor(self, arm: Arm) -> float:
        """Seconds per predicted second, over those of plain steps: what slows all arms alike is not this one's fault."""
        factors = [shown.factor for shown in map(self.shown.get, (arm, PLAIN)) if shown and shown.count >= MIN_STEPS]
        return factors[0] / factors[1] if len(factors) == 2 else 1.0


def _means(steps: Steps) -> tuple[int, int]:
    return round(steps.rows / steps.count), round(steps.cached / steps.count)
