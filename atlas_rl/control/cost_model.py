"""Measured seconds of a decode step, by the number of tokens that pass through the policy."""

from __future__ import annotations

import bisect
from collections import deque
from statistics import median

SAMPLES_KEPT = 15
MIN_SAMPLES = 3
"""One slow step is an accident: a bucket that nobody believes in is never measured again."""


def bucket_of(num_tokens: int) -> int:
    """Token counts with about the same step time share a bucket: 1, 2, 3, 4, 6, 8, 12, 16, 24, … (rounded down)."""
    power = 1 << (num_tokens.bit_length() - 1)
    return power + power // 2 if num_tokens >= power + power // 2 and power > 1 else power


class StepCost:
    """Median seconds per decode step of the latest steps in each bucket, interpolated between buckets.

    Beyond the largest measured bucket the estimate stays flat: optimism makes the first step there a measurement, and the next
    choice knows better.
    """

    def __init__(self) -> None:
        self.samples: dict[int, deque[float]] = {}
        self.counts: list[int] = []
        """The buckets that are measured often enough to be believed, sorted."""
        self.medians: dict[int, float] = {}

    def record(self, num_tokens: int, seconds: float) -> None:
        bucket = bucket_of(num_tokens)
        samples = self.samples.setdefault(bucket, deque(maxlen=SAMPLES_KEPT))
        samples.append(seconds)
        if len(samples) >= MIN_SAMPLES:
            self.medians[bucket] = median(samples)
            if bucket not in self.counts:
                bisect.insort(self.counts, bucket)

    def seconds(self, num_tokens: int) -> float | None:
        """Estimated seconds of a step over `num_tokens`, or None before there is a believed measurement."""
        if not self.counts:
            return None
        place = bisect.bisect_right(self.counts, num_tokens)
        if place == 0:
            return self.medians[self.counts[0]]
        low = self.counts[place - 1]
        if place == len(self.counts) or low == num_tokens:
            return self.medians[low]
        high = self.counts[place]
        share = (num_tokens - low) / (high - low)
        return self.medians[low] + share * (self.medians[high] - self.medians[low])


class FixedStepCost:
    """A step cost that never looks at a clock, for deterministic runs: 16 more tokens cost as much as the step itself."""

    def seconds(self, num_tokens: int) -> float:
        return 1.0 + num_tokens / 16
