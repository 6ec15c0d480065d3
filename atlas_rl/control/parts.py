"""What each drafter would have been worth alone, from what its steps took and what the controller predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

from atlas_rl.control.arms import PLAIN, Arm

FADE = 0.7
"""What an arm's earlier steps count for as soon as a rollout has new ones."""
MIN_STEPS = 4
"""Of an arm, from which on they are believed: a trial has so many."""


@dataclass(slots=True)
class Steps:
    """Sums over steps of one arm, at batches of about one size."""

    count: float = 0.0
    rows: float = 0.0
    cached: float = 0.0
    plain: float = 0.0
    """Seconds that plain decoding would have taken to emit as much, estimated step by step: a busy machine is nobody's fault."""
    taken: float = 0.0
    """Seconds, drafting included."""
    predicted: float = 0.0
    """What the controller thinks that these are."""

    def add(self, other: Steps, fade: float = 1.0) -> None:
        for field in fields(self):
            setattr(self, field.name, fade * getattr(self, field.name) + getattr(other, field.name))


class Parts:
    """Estimates how long a rollout's decoding would have taken had one drafter been all there is.

    What the rollout emitted at batches of each size is made again in thought, by plain decoding or by the drafter alone,
    whichever is faster there, as a controller would have found out. How fast the drafter is at a size: as its own steps at that
    size were, trials among them; where there were too few, as the controller predicts (from acceptance by depth, draft and step
    times, all measured in this run), as far as predictions for arms with this drafter have come true.

    What is assumed: that a drafter is right as often alone as it is beside others (of a pair's drafts the better ones are
    verified, which flatters). The trials that it would have needed alone are left out.
    """

    def __init__(self) -> None:
        self.steps: dict[tuple[Arm, int], Steps] = {}
        """Of this rollout, by arm and size."""
        self.shown: dict[tuple[Arm, int], Steps] = {}
        """Of this one and those before it, which count for less."""

    def record(self, arm: Arm, num_rows: int, num_cached: int, plain_seconds: float, seconds: float) -> None:
        """A step of this arm took `seconds`, drafting included, where plain decoding would have taken `plain_seconds`."""
        key = arm, (num_rows - 1).bit_length()
        steps = self.steps.get(key)
        if steps is None:
            steps = self.steps[key] = Steps()
        steps.count += 1
        steps.rows += num_rows
        steps.cached += num_cached
        steps.plain += plain_seconds
        steps.taken += seconds

    def close(self, names: list[str], rate_of: Callable[[Arm, int, int], float]) -> dict[str, float]:
        """The rollout is over: its decode seconds with each drafter alone, over those of plain decoding.

        Args:
            rate_of: tokens per row and second that an arm is predicted to emit, over so many rows with so many cached tokens.
        """
        steps_of, self.steps = self.steps, {}
        sizes: dict[int, Steps] = {}
        for (_, size), steps in steps_of.items():
            sizes.setdefault(size, Steps()).add(steps)

        @cache
        def predicted_share(arm: Arm, size: int) -> float:
            """Seconds of an arm over those of plain decoding."""
            of_size = sizes[size]
            batch = round(of_size.rows / of_size.count), round(of_size.cached / of_size.count)
            return rate_of(PLAIN, *batch) / rate_of(arm, *batch)

        for (arm, size), steps in steps_of.items() if names else ():
            steps.predicted = steps.plain * predicted_share(arm, size)
            self.shown.setdefault((arm, size), Steps()).add(steps, fade=FADE)

        seconds = dict.fromkeys(names, 0.0)
        for name in names:
            come_true = self._come_true(name)
            for size, of_size in sizes.items():
                own = self.shown.get(((name,), size))
                is_shown = own is not None and own.count >= MIN_STEPS
                share = own.taken / own.plain if is_shown else come_true * predicted_share((name,), size)
                seconds[name] += of_size.plain * min(1.0, share)
        plain = sum(of_size.plain for of_size in sizes.values())
        return {name: float(total / plain) for name, total in seconds.items() if plain}

    def _come_true(self, name: str) -> float:
        """Seconds taken per second predicted, of arms with this drafter."""
        total = Steps()
        for (arm, _), steps in self.shown.items():
            if name in arm:
                total.add(steps)
        return total.taken / total.predicted if total.count >= MIN_STEPS else 1.0
