"""Evening out work between ranks by moving few units. Knows numbers only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MIN_GAIN = 0.05
"""Nothing moves for less than this share of the busiest rank's work."""
SLACK = 1.02
"""Moving ends where the busiest rank is this near to the mean: forecasts are less exact by far."""


def assign(work: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The rank that each owner's units go to; no rank is to do more than the busiest would have.

    The busiest rank gives a unit to the idlest, or swaps two with it, whichever makes the two most even; again and again, until
    the busiest is near the mean or no such trade helps. Most units stay where they are.
    """
    owners = np.repeat(np.arange(len(work)), [len(of_one) for of_one in work])
    work_U = np.concatenate(work)
    held = [np.flatnonzero(owners == rank).tolist() for rank in range(len(work))]
    loads = np.array([int(of_one.sum()) for of_one in work])
    before = loads.max()
    for _ in range(len(work_U)):
        busiest, idlest = int(loads.argmax()), int(loads.argmin())
        if loads[busiest] <= SLACK * loads.sum() / len(loads):
            break
        given, taken = held[busiest], [None, *held[idlest]]
        # each unit of the busiest against nothing, or against one of the idlest: how much work changes sides
        diffs = work_U[given] - np.append(0, work_U[held[idlest]])[:, None]
        gap = loads[busiest] - loads[idlest]
        best = int(np.abs(2 * diffs - gap).argmin())  # of equals the first, which moves the fewest
        diff = diffs.flat[best]
        if not 0 < diff < gap:
            break
        back, out = taken[best // len(given)], given[best % len(given)]
        _move(out, held[busiest], held[idlest])
        if back is not None:
            _move(back, held[idlest], held[busiest])
        loads[[busiest, idlest]] += [-diff, diff]
    to_U = owners.copy()
    if before - loads.max() >= MIN_GAIN * before:
        for rank, units in enumerate(held):
            to_U[units] = rank
    return np.split(to_U, np.cumsum([len(of_one) for of_one in work])[:-1])


def idle_share(loads: np.ndarray) -> float:
    """Share of the ranks' time in which they wait for the busiest one."""
    return float(1 - loads.mean() / loads.max()) if loads.any() else 0.0


def _move(unit: int, source: list[int], target: list[int]) -> None:
    source.remove(unit)
    target.append(unit)
