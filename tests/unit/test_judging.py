"""What a bench calls decided, passed and missed."""

from __future__ import annotations

import random

import pytest

from atlas_rl.bench.judging import interval, judge, summarize


def test_interval_of_the_median():
    assert interval([1.0] * 5) is None  # 2 / 2^5 is more than 5 %
    assert interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0)
    assert interval([float(i) for i in range(1, 10)]) == (2.0, 8.0)  # 2 (1 + 9) / 2^9 is 3.9 %


def test_interval_holds_the_median_as_often_as_it_says():
    """Under noise with a heavy tail, as a shared machine has it."""
    rng = random.Random(0)
    held = 0
    for _ in range(2000):
        bounds = interval([rng.lognormvariate(0.0, 0.1) * (3 if rng.random() < 0.1 else 1) for _ in range(12)])
        held += bounds[0] <= TRUE_MEDIAN <= bounds[1]
    assert 0.95 <= held / 2000 < 0.985  # 96.1 % for n = 12


TRUE_MEDIAN = 1.0141  # where 0.9 Phi(ln x / 0.1) is 1/2


@pytest.mark.parametrize(
    ("samples", "target", "at_least", "verdict"),
    [
        ([1.50, 1.51, 1.52, 1.51, 1.50, 1.51], 1.4, True, "passed"),
        ([1.50, 1.51, 1.52, 1.51, 1.50, 1.51], 1.6, True, "missed"),
        ([1.50, 1.51, 1.52, 1.51, 1.50, 1.51], 1.51, True, "passed"),  # decided: the median counts
        ([1.3, 1.9, 1.5, 1.7, 1.4, 1.6], 1.5, True, "undecided"),
        ([1.3, 1.9, 1.5, 1.7, 1.4, 1.6], 1.2, True, "passed"),  # undecided, yet all of the interval lies above
        ([1.3, 1.9, 1.5, 1.7, 1.4, 1.6], 2.0, True, "missed"),
        ([1.3, 1.9, 1.5, 1.7, 1.4], 1.2, True, "undecided"),
        ([1.3, 1.9, 1.5, 1.7, 1.4, 1.6], 2.0, False, "passed"),
        ([1.3, 1.9, 1.5, 1.7, 1.4, 1.6], 1.2, False, "missed"),
        ([1.3, 1.9, 1.5, 1.7, 1.4], 1.2, False, "undecided"),
    ],
)
def test_verdicts(samples, target, at_least, verdict):
    judged = judge(summarize(samples), target, at_least)
    assert judged["verdict"] == verdict
    assert ("missed_by" in judged) == (verdict == "missed")


def test_missed_by_is_relative_to_the_target():
    assert judge(summarize([0.9] * 6), 1.0)["missed_by"] == pytest.approx(0.1)
    assert judge(summarize([1.2] * 6), 1.0, at_least=False)["missed_by"] == pytest.approx(0.2)
    assert judge(None, 1.0) == {"target": 1.0, "verdict": "not measured"}
