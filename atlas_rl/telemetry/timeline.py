"""Timeline: how many rows were alive in a rollout, and who drafted for them, against time."""

from __future__ import annotations

from collections import Counter
from typing import Any

from atlas_rl.control.arms import PLAIN, Arm, arm_name

MAX_ENTRIES = 200


class Timeline:
    """A step function of time, with a bound: where it changes too often, entries that last least are merged with the next.

    Steps are told one after the other; those between which nothing changes make one entry, so that a step costs one comparison.
    What lies between two decode steps (rows that join are prefilled) belongs to the entry before it.
    """

    def __init__(self, origin: float) -> None:
        self.origin = origin
        """When the generate call began, on the clock that steps are timed with."""
        self.begins: list[float] = []
        self.states: list[tuple[int, Arm]] = []
        """Rows alive, and who drafts for them, from the time in `begins` on."""
        self.end = origin

    def record(self, begin: float, end: float, num_rows: int, arm: Arm) -> None:
        """A decode step of this arm over so many rows."""
        state = (num_rows, arm)
        if not self.states or self.states[-1] != state:
            if len(self.states) == MAX_ENTRIES - 1:  # one is kept for the end
                self._thin()
            self.begins.append(begin)
            self.states.append(state)
        self.end = end

    def _thin(self) -> None:
        """Merge neighbours until each lasts a hundredth of the time so far, as the state that lasted longest among them."""
        shortest = (self.end - self.begins[0]) / (MAX_ENTRIES // 2)
        ends = [*self.begins[1:], self.end]
        begins, states, lasted = [], [], Counter()
        first = self.begins[0]
        for end, begin, state in zip(ends, self.begins, self.states):
            lasted[state] += end - begin
            if end - first >= shortest:
                begins.append(first)
                states.append(max(lasted, key=lasted.__getitem__))
                lasted, first = Counter(), end
        if lasted:
            begins.append(first)
            states.append(max(lasted, key=lasted.__getitem__))
        self.begins, self.states = begins, states

    def to_dict(self) -> dict[str, list[Any]]:
        """Seconds since the call began; the last entry is the end, when no row is left."""
        rows, arms = zip(*self.states)
        return {
            "seconds": [round(time - self.origin, 5) for time in (*self.begins, self.end)],
            "rows": [*rows, 0],
            "arms": [*map(arm_name, arms), arm_name(PLAIN)],
        }
