"""How many optimizer steps an update takes: more where they have paid, rarely where not, never more than the cap."""

from __future__ import annotations

import json

import pytest

from atlas_rl.control.budget import LONGEST_PAUSE, RetrainBudget

STEP, FIXED = 0.01, 0.02


def run(
    budget: RetrainBudget,
    gain: float,
    num_updates: int = 60,
    interval: float = 10.0,
    step: float = STEP,
    fixed: float = FIXED,
):
    """Updates of a world where each one gains so much: the steps of each, and the share of time that they took."""
    steps, seconds = [], 0.0
    for _ in range(num_updates):
        steps.append(budget.choose(interval, remaining_updates=50.0, drafted_seconds=interval / 2))
        if steps[-1]:
            budget.record(steps[-1], step, fixed, gain, drafted_seconds=interval / 2, remaining=50.0)
            seconds += steps[-1] * step + fixed
    return steps, seconds / (num_updates * interval)


def test_it_grows_to_the_cap_where_it_pays():
    steps, share = run(RetrainBudget(0.05), gain=0.3)
    assert steps[0] <= 4 and steps == sorted(steps)
    assert steps[-1] == int((0.05 * 10 - FIXED) / STEP) and 0.03 < share <= 0.05


def test_it_becomes_rare_where_it_does_not_pay_and_is_tried_again():
    budget = RetrainBudget(0.05)
    run(budget, gain=0.0)
    steps, share = run(budget, gain=0.0, num_updates=4 * LONGEST_PAUSE)
    assert set(steps) == {0, 1} and 3 <= sum(steps) <= 5 and share < 0.001
    steps, _ = run(budget, gain=0.5, num_updates=6 * LONGEST_PAUSE)
    assert steps[-1] > 10, "the policy has begun to move"


@pytest.mark.parametrize(
    ("step", "fixed", "interval"), [(0.5, 0.1, 2.0), (0.02, 0.5, 1.0), (0.1, 0.1, 1.0), (3.0, 0.0, 4.0)]
)
def test_the_cap_is_kept_by_updates_that_are_rarer(step, fixed, interval):
    """Dear steps, or a dear validation; the first update is made before anything is known."""
    budget = RetrainBudget(0.05)
    run(budget, gain=1.0, num_updates=1, step=step, fixed=fixed, interval=interval)
    steps, share = run(budget, gain=1.0, num_updates=320, step=step, fixed=fixed, interval=interval)
    assert 0 < share <= 0.066, "up to the rounding of pauses"


def test_what_is_gained_must_be_more_than_what_it_costs():
    """The same gain, in rollouts of other lengths."""
    assert run(RetrainBudget(0.5), gain=0.02, interval=100.0)[0][-1] > 4
    assert run(RetrainBudget(0.5), gain=0.02, interval=0.1)[0][-1] <= 1


def test_no_update_is_made_for_a_run_that_is_over():
    assert RetrainBudget(0.05).choose(10.0, remaining_updates=0.0, drafted_seconds=5.0) == 0
    budget = RetrainBudget(0.05)
    for _ in range(10):
        budget.record(4, STEP, FIXED, 0.5, drafted_seconds=5.0, remaining=0.0)
    assert budget.choose(10.0, 5.0, 5.0) <= 1, "a gain that nobody profits from"


def test_deterministic_steps_look_at_no_clock():
    budget = RetrainBudget(0.05, deterministic_steps=3)
    for gain, step in ((1.0, 1e-9), (-1.0 + 1e-9, 1e9), (0.0, 1.0)):
        budget.record(3, step, step, gain, drafted_seconds=step, remaining=1.0)
        assert budget.choose(step, 0.0, step) == budget.choose(1.0, 50.0, 1.0) == 3


def test_what_it_knows_is_saved_but_not_its_settings():
    budget = RetrainBudget(0.05)
    run(budget, gain=0.3)
    other = RetrainBudget(0.2, deterministic_steps=None)
    other.load_state_dict(json.loads(json.dumps(budget.state_dict())))
    assert vars(other) == vars(budget) | {"max_share": 0.2}
    with pytest.raises(KeyError):
        other.load_state_dict({})


def test_where_little_is_drafted_little_is_learned():
    """At least a sixteenth of the updates is made: drafts may come to pay."""
    budget = RetrainBudget(0.05)
    assert [budget.choose(10.0, 50.0, drafted_seconds=0.001) for _ in range(32)].count(1) == 2
    assert RetrainBudget(0.05).choose(10.0, 50.0, drafted_seconds=2.0) >= 1
