"""What whole runs side by side amount to: the bound, the share of it that is reached, and whether rewards agree."""

from __future__ import annotations

import math
import random

import pytest

from atlas_rl.bench.whole_run_figures import bound, compare_rewards, compare_speed, fifths, paired, parts_of


def step(rollout: float, rest: float, tokens: int = 100, longest: int = 20) -> dict:
    parts = {"rollout": rollout, "forward": rest / 2}
    seconds = rollout + rest
    return {"seconds": seconds, "cpu_seconds": 2.0, "parts": parts, "tokens": tokens, "longest": longest}


def test_bound_is_amdahls():
    assert bound(0.5, 2.0) == pytest.approx(4 / 3)
    assert bound(1.0, 5.0) == pytest.approx(5.0) and bound(0.0, 5.0) == 1.0


def test_a_step_whose_rest_stays_the_same_reaches_the_bound():
    pairs = [(step(6.0, 4.0), step(2.0, 4.0))] * 8
    found = compare_speed(pairs)
    assert found["rollout_share"] == 0.6 and found["rollout_ratio"]["median"] == pytest.approx(3.0)
    assert found["bound"] == pytest.approx(10 / 6)
    for way in ("per_step", "per_token", "per_position"):
        assert found[way]["speedup"]["median"] == pytest.approx(10 / 6) and found[way]["verdict"] == "passed"
        assert found[way]["of_bound"]["median"] == pytest.approx(1.0)
    assert found["seconds_per_step"] == [10.0, 6.0] and found["speedup_of_sums"] == pytest.approx(10 / 6)


def test_what_is_added_beside_the_rollout_is_missing_from_the_bound():
    slowed = compare_speed([(step(6.0, 4.0), step(2.0, 6.0))] * 8)
    assert slowed["bound"] == pytest.approx(10 / 6), "it knows rollouts only"
    assert slowed["per_step"]["of_bound"]["median"] == pytest.approx(6 / 8)
    assert slowed["per_step"]["verdict"] == "missed"
    noisy = [(step(6.0, 4.0), step(2.0, rest)) for rest in (1.0, 2.0, 4.0, 4.0, 9.0)]
    assert compare_speed(noisy)["per_step"]["verdict"] == "undecided", "five pairs have no interval"


def test_completions_of_other_lengths_are_reckoned_with():
    """A step with half the tokens that takes half the time, its longest completion two thirds as long."""
    found = compare_speed([(step(6.0, 4.0, longest=30), step(1.0, 2.0, tokens=50))] * 8)
    assert found["rollout_ratio"]["median"] == pytest.approx(3.0)
    assert found["per_step"]["of_bound"]["median"] == pytest.approx(2.0)
    assert found["per_token"]["of_bound"]["median"] == pytest.approx(1.0)
    assert found["per_position"]["of_bound"]["median"] == pytest.approx(4 / 3)


def test_pairs_end_with_the_shorter_run_and_leave_out_steps_without_rollouts():
    runs = [
        {"a": [step(1, 1), step(1, 1), step(1, 1)], "b": [step(2, 1), step(2, 1)]},
        {"a": [step(3, 1), step(0, 1, tokens=0)], "b": [step(4, 1), step(0, 1, tokens=0)]},
    ]
    assert [(a["seconds"], b["seconds"]) for a, b in paired(runs, "a", "b")] == [(2, 3), (2, 3), (4, 5)]


def test_parts_name_what_is_left():
    parts = parts_of([step(3.0, 2.0), step(5.0, 4.0), step(3.0, 2.0)])
    assert parts == {"rollout": 3.0, "forward": 1.0, "other": 1.0, "whole step": 5.0, "processor time": 2.0}


def test_fifths():
    assert fifths([float(n) for n in range(10)]) == (0.5, 8.5)
    assert fifths([1.0, 2.0, 4.0]) == (1.0, 4.0)


def curve(last: float) -> list[float]:
    return [0.2, 0.4, 0.6, 0.7, last]


def test_rewards_are_judged_by_the_spread_between_seeds():
    reference = [curve(0.78), curve(0.80), curve(0.82)]
    found = compare_rewards(reference, [curve(0.77), curve(0.80), curve(0.81)])
    assert found["verdict"] == "passed" and found["difference"] == pytest.approx(-0.02 / 3)
    error = math.sqrt((0.02**2 + 0.02082**2) / 3)
    assert found["half_width"] == pytest.approx(2.776 * error, rel=1e-3)
    assert compare_rewards(reference, [curve(0.68), curve(0.70), curve(0.72)])["verdict"] == "missed"


def test_rewards_that_scatter_widely_decide_nothing():
    scattered = [curve(0.4), curve(0.8), curve(1.2)]
    assert compare_rewards(scattered, scattered)["verdict"] == "undecided"
    one_seed = compare_rewards([curve(0.8)], [curve(0.8)])
    assert one_seed["verdict"] == "undecided" and one_seed["half_width"] is None


def test_equal_arms_are_seldom_told_apart():
    """The interval holds the true difference, none, as often as it says, whatever the number of seeds."""
    rng = random.Random(0)
    for num_seeds in (2, 3, 5):
        missed = 0
        for _ in range(1000):
            one, other = ([curve(rng.gauss(0.8, 0.03)) for _ in range(num_seeds)] for _ in range(2))
            missed += compare_rewards(one, other)["verdict"] == "missed"
        assert 0.03 <= missed / 1000 <= 0.07
