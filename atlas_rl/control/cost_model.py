"""Measured seconds of a decode step, by the tokens that pass through the policy and those that they attend to."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

import numpy as np

SAMPLES_KEPT = 15
MIN_SAMPLES = 3
"""One slow step is an accident: a bucket that nobody believes in is never measured again."""

REFIT_EVERY = 32
FEW_TOKENS = 8
"""Up to about so many, a step takes its time for the weights, not for the tokens."""
MAX_AGE = 256
"""Steps after which a bucket of few samples is forgotten."""


def bucket_of(num_tokens: int) -> int:
    """Token counts with about the same step time share a bucket: 1 to 8, 12, 16, 24, … (rounded down)."""
    if num_tokens <= 8:  # where other kernels take over step times jump
        return num_tokens
    power = 1 << (num_tokens.bit_length() - 1)
    return power + power // 2 if num_tokens >= power + power // 2 else power


class StepCost:
    """Seconds of a decode step over N tokens that attend to C cached ones: the median of the latest steps in N's bucket,
    interpolated between buckets, plus C times what a cached token costs.

    The two are told apart because draft tokens share their row's cache: eight rows with a draft token each cost less than
    sixteen rows. Beyond the largest measured bucket twice the tokens are taken to cost half as much again (and eight more tokens
    than a few): a little optimism, that makes good drafts go there and be measured.
    """

    def __init__(self) -> None:
        self.samples: dict[int, deque[tuple[int, float]]] = {}
        """By bucket: cached tokens and seconds of its latest steps."""
        self.counts: list[int] = []
        """The buckets that are measured often enough to be believed, sorted."""
        self.medians: list[float] = []
        """Their seconds without the cached tokens', in the same order."""
        self.seconds_per_cached = 0.0
        self.num_recorded = 0
        self.is_stale = False
        """Whether the figures above are to be fitted anew before they are asked for again: while plain steps go without saying,
        nobody asks."""
        self.last_recorded: dict[int, int] = {}
        """By bucket, the number of its latest step."""

    def record(self, num_tokens: int, num_cached: int, seconds: float) -> None:
        bucket = bucket_of(num_tokens)
        self.samples.setdefault(bucket, deque(maxlen=SAMPLES_KEPT)).append((num_cached, seconds))
        self.num_recorded += 1
        self.last_recorded[bucket] = self.num_recorded
        self.is_stale |= self.num_recorded % REFIT_EVERY == 0 or len(self.samples[bucket]) == MIN_SAMPLES

    def seconds(self, num_tokens: int | np.ndarray, num_cached: int = 0) -> Any:
        """Estimated seconds of a step over `num_tokens` (each of them), or None before there is a believed measurement."""
        if self.is_stale:
            self._fit()
        if not self.counts:
            return None
        more = np.maximum(0, np.asarray(num_tokens) - self.counts[-1]) / max(self.counts[-1], FEW_TOKENS)
        beyond = more * self.medians[-1] / 2
        return np.interp(num_tokens, self.counts, self.medians) + beyond + self.seconds_per_cached * num_cached

    def _fit(self) -> None:
        """The price of a cached token is the common slope of the buckets: least squares about each one's own mean."""
        self.is_stale = False
        for bucket, samples in list(self.samples.items()):
            if len(samples) < SAMPLES_KEPT and self.num_recorded - self.last_recorded[bucket] > MAX_AGE:
                del self.samples[bucket]  # a few slow steps would keep anyone from going there again
        believed = {bucket: np.array(s) for bucket, s in sorted(self.samples.items()) if len(s) >= MIN_SAMPLES}
        centred = np.concatenate([s - s.mean(0) for s in believed.values()] or [np.zeros((1, 2))])
        variance = float((centred[:, 0] ** 2).sum())
        slope = float(centred.prod(1).sum()) / variance if variance else 0.0
        # no more than explains all of any bucket's time
        highest = min((float((s[:, 1] / np.maximum(s[:, 0], 1)).min()) for s in believed.values()), default=0.0)
        self.seconds_per_cached = min(max(0.0, slope), highest)
        self.counts = list(believed)
        medians = [
            median(seconds - self.seconds_per_cached * cached for cached, seconds in self.samples[bucket])
            for bucket in self.counts
        ]
        # more tokens never take less time: a bucket above a larger one was measured in bad moments
        self.medians = np.minimum.accumulate(medians[::-1])[::-1].tolist()


class DraftCost:
    """Seconds that one drafter takes per step, by batch size and depth of the drafts."""

    def __init__(self) -> None:
        self.by_size: dict[int, StepCost] = {}

    def record(self, num_rows: int, depth: int, seconds: float) -> None:
        self.by_size.setdefault((num_rows - 1).bit_length(), StepCost()).record(depth, 0, seconds)

    def seconds(self, num_rows: int, depths: np.ndarray) -> np.ndarray | None:
        """At the nearest measured size, smaller before larger; None before there is any."""
        size = (num_rows - 1).bit_length()
        for measured in sorted(self.by_size, key=lambda other: (abs(other - size), other)):
            seconds = self.by_size[measured].seconds(depths)
            if seconds is not None:
                return seconds * (2.0 ** max(0, size - measured))
        return None


class FixedStepCost:
    """A step cost that never looks at a clock, for deterministic runs: 16 more tokens cost as much as the step itself."""

    def seconds(self, num_tokens: int | np.ndarray, num_cached: int = 0) -> Any:
        return 1.0 + num_tokens / 16
