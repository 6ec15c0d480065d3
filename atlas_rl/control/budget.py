"""How much retraining pays for itself: the gain that recent updates have measured, against what they cost."""

from __future__ import annotations

from typing import Any

HORIZON = 8.0
"""Rollouts over which what a drafter has learned lasts, where the policy goes on moving."""
DECAY = 0.6
"""Per update, of what earlier ones have measured."""
LONGEST_PAUSE = 16
FIRST_STEPS = 2.0
LIKELY_STEP_SECONDS, LIKELY_FIXED_SECONDS = 0.02, 0.08
"""Of an update, before there was one."""
BEST_SAVING = 0.5
"""Of drafted seconds, what the best of updates might save."""
FALL = 0.12
"""Of drafts' tokens per step, relative to the most they have been: there is something to learn again."""


class RetrainBudget:
    """Decides the optimizer steps of the next update. Numbers only: seconds in, steps out.

    Args:
        max_share: of an RL step that retraining may take at most. deterministic_steps: if given, the answer is always this.
    """

    def __init__(self, max_share: float, deterministic_steps: int | None = None) -> None:
        self.max_share = max_share
        self.deterministic_steps = deterministic_steps
        self.steps = FIRST_STEPS
        """Of the next update; below one, updates are skipped: a half is every second one."""
        self.owed = 0.0
        """Share of an optimizer step that waits to be done; at one it is."""
        self.increment = 0.0
        """What the last choice added to it."""
        self.step_seconds: float | None = None
        self.fixed_seconds = 0.0
        """Of an update beside its steps: validation, taking the weights over."""
        self.return_on_cost: float | None = None
        """Seconds that updates save over what they cost, decayed."""
        self.best_tokens: dict[str, float] = {}
        """Per step, the most that drafts have brought since they last fell, by where that is known from."""

    @property
    def is_near(self) -> bool:
        """Whether an update may be due the next time."""
        return self.deterministic_steps is not None or self.owed + self.increment >= 1

    def notice(self, source: str, tokens_per_step: float) -> None:
        """What drafts bring now. Where that has fallen, what updates have brought lately says nothing of the next ones."""
        best = self.best_tokens[source] = max(self.best_tokens.get(source, 0.0), tokens_per_step)
        if tokens_per_step < best * (1 - FALL):
            self.steps, self.owed = max(self.steps, FIRST_STEPS), max(self.owed, 1.0)
            self.return_on_cost, self.best_tokens[source] = None, tokens_per_step

    def choose(self, interval_seconds: float, remaining_updates: float, drafted_seconds: float) -> int:
        """Steps for an update, where updates are so far apart and so many more will come.

        Args:
            drafted_seconds: since the last one, of steps that neural drafters drafted: a better head saves no more than a part.
        """
        if self.deterministic_steps is not None:
            return self.deterministic_steps
        if remaining_updates < 1:
            return 0
        allowed = self.steps
        cost = (self.step_seconds or LIKELY_STEP_SECONDS) + (self.fixed_seconds or LIKELY_FIXED_SECONDS)
        room = self.max_share * interval_seconds - (self.fixed_seconds or LIKELY_FIXED_SECONDS)
        allowed = min(allowed, max(room / (self.step_seconds or LIKELY_STEP_SECONDS), 0.25 / LONGEST_PAUSE))
        most_saved = BEST_SAVING * drafted_seconds * min(HORIZON, remaining_updates)
        if most_saved < 2 * cost:
            allowed = min(allowed, 1 / LONGEST_PAUSE)
        if allowed >= 1:
            self.increment = 1.0
            return int(allowed)
        # rarely enough for an update, all of it, to stay within its share
        self.increment = min(max(allowed, 1 / LONGEST_PAUSE), self.max_share * interval_seconds / cost)
        self.owed += self.increment
        if self.owed < 1:
            return 0
        self.owed -= 1
        return 1

    def record(
        self,
        steps: int,
        step_seconds: float,
        fixed_seconds: float,
        gain: float,
        drafted_seconds: float,
        remaining: float,
    ) -> None:
        """An update of so many steps made drafts' tokens per step better by this relative gain, of which that much of a
        rollout's time profits, and of those after it."""
        self.step_seconds = blend(self.step_seconds, step_seconds)
        self.fixed_seconds = blend(self.fixed_seconds or None, fixed_seconds)
        saved = gain / (1 + gain) * drafted_seconds * min(HORIZON, remaining)
        returned = saved / (steps * step_seconds + fixed_seconds)
        self.return_on_cost = blend(self.return_on_cost, returned)
        if self.return_on_cost > 1.5:
            self.steps *= 2
        elif self.return_on_cost < 1.0:
            self.steps /= 2 if self.return_on_cost > 0.25 else 4
        self.steps = min(max(self.steps, 1 / LONGEST_PAUSE), 4096.0)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = vars(self).keys() - {"max_share", "deterministic_steps"}
        vars(self).update({name: state[name] for name in names})


def blend(old: float | None, new: float) -> float:
    """A decayed mean, with a new value."""
    return new if old is None else DECAY * old + (1 - DECAY) * new
