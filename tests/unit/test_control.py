"""The rule that decides how many draft tokens are worth verifying, and the numbers it rests on."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_rl.control.cost_model import SAMPLES_KEPT, StepCost, bucket_of
from atlas_rl.control.lookahead import MIN_GAIN, choose_draft_lens
from atlas_rl.control.trust import Trust

PROBS = st.lists(st.lists(st.floats(0, 1), max_size=3).map(lambda p: sorted(p, reverse=True)), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(PROBS, st.floats(0, 1))
def test_the_choice_is_the_best_of_all(probs: list[list[float]], slope: float):
    """Against brute force over every combination of lengths."""

    def rate(lens) -> float:
        gain = sum(sum(row[:n]) for row, n in zip(probs, lens, strict=True))
        return (len(probs) + gain) / (1 + slope * (len(probs) + sum(lens)))

    chosen = choose_draft_lens(probs, lambda n: 1 + slope * n)
    best = max(rate(lens) for lens in itertools.product(*(range(len(row) + 1) for row in probs)))
    plain = rate([0] * len(probs))
    if best < MIN_GAIN * plain * (1 - 1e-9):
        assert sum(chosen) == 0
    elif sum(chosen):
        assert rate(chosen) == pytest.approx(best)
    else:
        assert best == pytest.approx(MIN_GAIN * plain)


def test_free_drafts_are_all_taken_and_dear_ones_are_not():
    probs = [[0.9, 0.5], [0.1]]
    assert choose_draft_lens(probs, lambda n: 1.0) == [2, 1]
    assert choose_draft_lens(probs, lambda n: float(n)) == [0, 0]
    assert choose_draft_lens(probs, lambda n: 1.0, draft_seconds=10.0) == [0, 0]


def test_nothing_is_verified_before_plain_decoding_was_timed():
    assert choose_draft_lens([[1.0]], StepCost().seconds) == [0]


def test_step_cost_is_a_median_and_interpolates():
    cost = StepCost()
    for seconds in (1.0, 1.0, 50.0):
        cost.record(4, seconds)
    cost.record(8, 9.0)
    assert cost.seconds(8) == 1.0, "one sample is not believed"
    for _ in range(2):
        cost.record(8, 3.0)
    assert cost.seconds(4) == 1.0
    assert cost.seconds(6) == 2.0
    assert cost.seconds(1) == 1.0 and cost.seconds(100) == 3.0
    for _ in range(SAMPLES_KEPT):
        cost.record(4, 2.0)
    assert cost.seconds(4) == 2.0, "old samples are forgotten"


def test_buckets_round_down_and_grow_geometrically():
    buckets = [bucket_of(n) for n in range(1, 300)]
    assert buckets == sorted(buckets)
    assert all(b <= n < 1.51 * b + 1 for n, b in enumerate(buckets, start=1))
    assert len(set(buckets)) < 20


def test_trust_falls_with_broken_promises_and_recovers():
    trust = Trust()
    assert trust.factor == 1
    for _ in range(50):
        trust.record(num_accepted=0, num_expected=10)
    fallen = trust.factor
    assert fallen < 0.05
    for _ in range(5000):
        trust.idle()
    assert trust.factor > 0.5
    honest = Trust()
    for _ in range(50):
        honest.record(num_accepted=3, num_expected=3)
    assert honest.factor == 1
