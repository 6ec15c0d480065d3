"""How sure a measured ratio is, and whether it is what was expected.

A ratio is taken pair by pair within a round, and the median of the pairs is stated with a 95 % confidence interval that assumes
nothing about the noise. Each pair lies above the true median with probability 1/2, so the interval from the k-th smallest to
the k-th largest of n pairs misses it with probability 2 P(Binomial(n, 1/2) < k); k is the largest for which that is at most 5 %.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

MAX_HALF_WIDTH = 0.015
"""Half the interval, relative to the ratio, at which a ratio counts as decided."""
PEER_HALF_WIDTH = 0.05
"""The same, for a ratio to a peer: those are far from 1, and some peers take most of the time."""

STEP = "step_over_linears"
"""The one expectation that is no ratio of two arms: `atlas_plain`'s decode step over its own linears, at most."""


def interval(samples: list[float]) -> tuple[float, float] | None:
    """Of the median; None where there are too few samples (fewer than six)."""
    num_samples, k, chance = len(samples), 0, 0.0
    while True:
        chance += 2 * math.comb(num_samples, k) / 2**num_samples
        if chance > 0.05:
            break
        k += 1
    ordered = sorted(samples)
    return (ordered[k - 1], ordered[-k]) if k else None


def summarize(samples: list[float], max_half_width: float = MAX_HALF_WIDTH) -> dict[str, Any]:
    """A ratio's line in the JSON; `half_width` is relative to the ratio."""
    bounds = interval(samples)
    half_width = math.log(bounds[1] / bounds[0]) / 2 if bounds else None
    return {
        "median": median(samples),
        "min": min(samples),
        "max": max(samples),
        "interval": bounds,
        "half_width": half_width,
        "decided": half_width is not None and half_width <= max_half_width,
    }


def judge(ratio: dict[str, Any] | None, target: float, at_least: bool = True) -> dict[str, Any]:
    """`passed` or `missed` where the whole interval lies on one side of the target, or else by the median of a ratio that is
    known to within `MAX_HALF_WIDTH`."""
    if ratio is None:
        return {"target": target, "verdict": "not measured"}
    low, high = ratio["interval"] or (0.0, math.inf)
    if ratio["half_width"] is not None and ratio["half_width"] <= MAX_HALF_WIDTH:
        low = high = ratio["median"]
    if at_least:
        passed, missed = low >= target, high < target
    else:
        passed, missed = high <= target, low > target
    verdict = {"target": target, "verdict": "passed" if passed else "missed" if missed else "undecided"}
    return verdict | ({"missed_by": abs(ratio["median"] / target - 1)} if missed else {})
