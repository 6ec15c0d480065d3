"""The rule that decides how many draft tokens are worth verifying, and the numbers it rests on."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_rl.control.cost_model import MAX_AGE, REFIT_EVERY, SAMPLES_KEPT, StepCost, bucket_of
from atlas_rl.control.lookahead import MIN_GAIN, choose_draft_lens
from atlas_rl.control.payoff import Payoff
from atlas_rl.control.trust import Trust


def padded(probs: list[list[float]]) -> np.ndarray:
    return np.array([row + [0.0] * (3 - len(row)) for row in probs])


PROBS = st.lists(
    st.lists(st.floats(0.01, 1), max_size=3).map(lambda p: sorted(p, reverse=True)), min_size=1, max_size=3
)


@settings(max_examples=200, deadline=None)
@given(PROBS, st.floats(0, 1))
def test_the_choice_is_the_best_of_all(probs: list[list[float]], slope: float):
    """Against brute force over every combination of lengths."""

    def rate(lens) -> float:
        gain = sum(sum(row[:n]) for row, n in zip(probs, lens, strict=True))
        return (len(probs) + gain) / (1 + slope * (len(probs) + sum(lens)))

    chosen = choose_draft_lens(padded(probs), lambda n: 1 + slope * n)
    best = max(rate(lens) for lens in itertools.product(*(range(len(row) + 1) for row in probs)))
    plain = rate([0] * len(probs))
    if best < MIN_GAIN * plain * (1 - 1e-9):
        assert sum(chosen) == 0
    elif sum(chosen):
        assert rate(chosen) == pytest.approx(best)
    else:
        assert best == pytest.approx(MIN_GAIN * plain)


def test_free_drafts_are_all_taken_and_dear_ones_are_not():
    probs = padded([[0.9, 0.5], [0.1]])
    assert choose_draft_lens(probs, lambda n: 0.0 * n + 1).tolist() == [2, 1]
    assert choose_draft_lens(probs, lambda n: 1.0 * n).tolist() == [0, 0]
    assert choose_draft_lens(probs, lambda n: 0.0 * n + 1, draft_seconds=10.0).tolist() == [0, 0]


def test_nothing_is_verified_before_plain_decoding_was_timed():
    assert choose_draft_lens(np.ones((1, 1)), StepCost().seconds).tolist() == [0]


def test_step_cost_is_a_median_and_interpolates():
    cost = StepCost()
    for seconds in (1.0, 1.0, 50.0):
        cost.record(4, 0, seconds)
    cost.record(8, 0, 9.0)
    assert cost.seconds(8) == 1.5, "one sample is not believed: half as much again for twice the tokens"
    for _ in range(2):
        cost.record(8, 0, 3.0)
    assert cost.seconds(4) == 1.0
    assert cost.seconds(6) == 2.0
    assert cost.seconds(1) == 1.0 and cost.seconds(16) == 4.5
    assert cost.seconds(np.array([4, 6])).tolist() == [1.0, 2.0]
    for _ in range(SAMPLES_KEPT + REFIT_EVERY):
        cost.record(4, 0, 2.0)
    assert cost.seconds(4) == 2.0, "old samples are forgotten"


def test_step_cost_tells_tokens_from_what_they_attend_to():
    """0.1 s per token, 1 ms per cached one: two batches of equal tokens and different rows have different times."""
    cost = StepCost()
    rng = random.Random(0)
    for _ in range(100):
        num_tokens, num_cached = rng.choice([4, 8, 16]), rng.randrange(1000)
        cost.record(num_tokens, num_cached, 0.1 * num_tokens + 0.001 * num_cached)
    for num_tokens in (4, 6, 16):
        for num_cached in (0, 900):
            assert cost.seconds(num_tokens, num_cached) == pytest.approx(
                0.1 * num_tokens + 0.001 * num_cached, rel=0.02
            )


def test_a_bad_moment_is_not_believed_for_ever():
    cost = StepCost()
    for num_tokens, seconds in ((4, 1.0), (6, 90.0), (16, 2.0)):
        for _ in range(3):
            cost.record(num_tokens, 0, seconds)
    assert cost.seconds(6) == 2.0, "fewer tokens never take longer"
    for _ in range(3):
        cost.record(64, 0, 90.0)
    assert cost.seconds(64) == 90.0
    for _ in range(MAX_AGE + 2 * REFIT_EVERY):
        cost.record(4, 0, 1.0)
    assert cost.seconds(64) < 10, "so few and so old: it is worth another look"


@pytest.mark.parametrize("gain", [0.8, 1.0, 1.3])
def test_a_drafter_that_does_not_pay_is_asked_ever_less(gain: float):
    payoff, num_asked, seconds, plain_seconds = Payoff(), 0, 0.0, 0.0
    rng = random.Random(0)
    for _ in range(3000):
        asked = payoff.should_ask(8)
        tokens = rng.choice([1.0, 2.0, 3.0]) if asked else 1.0
        took = tokens / gain if asked else 1.0
        payoff.record(8, asked, took * rng.uniform(0.9, 1.1), tokens)
        num_asked += asked
        seconds, plain_seconds = seconds + took, plain_seconds + tokens
    if gain > 1:
        assert num_asked > 2900
    else:
        assert num_asked < 400 and seconds < 1.03 * plain_seconds
    assert not Payoff().should_ask(1), "plain decoding is timed first"


def test_one_long_step_decides_nothing():
    payoff = Payoff()
    for step in range(40):
        asked = payoff.should_ask(8)
        payoff.record(8, asked, 100.0 if step == 20 else 1.0, 2.0 if asked else 1.0)
    assert payoff.should_ask(8)


def test_buckets_round_down_and_grow_geometrically():
    buckets = [bucket_of(n) for n in range(1, 300)]
    assert buckets == sorted(buckets)
    assert buckets[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
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
