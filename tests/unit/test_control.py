"""The rule that decides how many draft tokens are worth verifying, and the numbers it rests on."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_rl.control.acceptance import PRIOR_TOKENS, Acceptance
from atlas_rl.control.budget import FIRST_STEPS, RetrainBudget
from atlas_rl.control.contest import LONGEST_WAIT, TRIAL_STEPS, Contest, Trial
from atlas_rl.control.controller import Controller
from atlas_rl.control.cost_model import MAX_AGE, REFIT_EVERY, SAMPLES_KEPT, FixedStepCost, StepCost, bucket_of
from atlas_rl.control.lookahead import MIN_GAIN, choose_draft_lens
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
    assert cost.seconds(8) == 1.25, "one sample is not believed: half as much again for eight more"
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


def race(gains: dict[str, float], num_steps: int = 3000, num_rows: int = 8, controller: Controller | None = None):
    """Steps of a world where an arm's drafts are worth `gains` times plain decoding: steps by arm, and time over plain time."""
    controller = controller or Controller([(name,) for name in gains], StepCost())
    rng, seconds, tokens, counts = random.Random(0), 0.0, 0.0, Counter()
    for _ in range(num_steps):
        arm = controller.choose(num_rows)
        emitted = rng.choice([1.0, 2.0, 3.0]) if arm else 1.0
        took = emitted / gains[arm[0]] if arm else 1.0
        controller.step_cost.record(num_rows, 0, took)
        controller.record(arm, num_rows, took * rng.uniform(0.9, 1.1), emitted)
        counts[arm] += 1
        seconds, tokens = seconds + took, tokens + emitted
    return counts, seconds / tokens, controller


@pytest.mark.parametrize("gain", [0.5, 0.8, 1.0, 1.3])
def test_a_drafter_is_asked_where_it_pays(gain: float):
    counts, cost, _ = race({"suffix": gain})
    if gain > 1:
        assert counts[("suffix",)] > 2600
    else:
        assert cost < 1.03, "and costs next to nothing where it does not"
        assert gain == 1.0 or counts[("suffix",)] < 400


def test_the_best_of_several_drafters_is_found_and_lost_again():
    counts, cost, controller = race({"suffix": 1.1, "recurrent": 1.5, "eagle": 0.7})
    assert counts[("recurrent",)] > 2400 and cost < 1.07 / 1.5
    counts, cost, _ = race({"suffix": 1.1, "recurrent": 0.8, "eagle": 1.4}, controller=controller)
    assert counts[("eagle",)] > 1500, "the world has changed"


def test_plain_decoding_is_timed_first_and_batches_of_other_sizes_apart():
    controller = Controller([("suffix",)], StepCost())
    assert controller.choose(1) == ()
    race({"suffix": 2.0}, num_rows=8, controller=controller)
    assert controller.choose(8) == ("suffix",) and controller.choose(64) == ()


def test_a_benched_drafter_is_in_no_arm():
    _, _, controller = race({"suffix": 1.1, "recurrent": 1.5})
    controller.benched.add("recurrent")
    counts, _, _ = race({"suffix": 1.1, "recurrent": 1.5}, controller=controller)
    assert ("recurrent",) not in counts and counts[("suffix",)] > 2000


def test_a_trial_ends_when_its_drafter_is_benched():
    controller = Controller([("suffix",), ("recurrent",)], StepCost())
    race({"suffix": 1.5, "recurrent": 1.2}, num_steps=100, controller=controller)
    contest = controller._contest(8)
    contest.trial = Trial(("recurrent",))
    controller.benched.add("recurrent")
    assert all(controller.choose(8) != ("recurrent",) for _ in range(3))
    assert contest.best == ("suffix",) and (contest.trial is None or contest.trial.arm != ("recurrent",))


def test_without_plain_decoding_another_drafter_takes_a_benched_ones_place():
    controller = Controller([("suffix",), ("recurrent",)], StepCost(), may_decode_plainly=False)
    race({"suffix": 2.0, "recurrent": 1.2}, num_steps=100, controller=controller)
    controller.benched.add("suffix")
    assert [controller.choose(n) for n in (1, 8, 64)] == [("recurrent",)] * 3
    controller.benched.add("recurrent")
    assert controller.choose(8) == ()


def test_with_three_arms_and_no_plain_decoding_the_first_may_be_benched():
    controller = Controller([("a",), ("b",), ("c",)], StepCost(), may_decode_plainly=False)
    controller.benched.add("a")
    counts, _, _ = race({"a": 3.0, "b": 1.2, "c": 2.0}, num_steps=500, controller=controller)
    assert counts.keys() <= {("b",), ("c",)}, "some draft in every step"


def test_one_long_step_decides_nothing():
    _, _, controller = race({"suffix": 2.0}, num_steps=100)
    for step in range(2 * TRIAL_STEPS):
        arm = controller.choose(8)
        controller.record(arm, 8, 100.0 if step < 2 else 1.0, 2.0 if arm else 1.0)
    assert controller.contests[3].best == ("suffix",)


def test_a_drafter_that_lost_in_a_bad_moment_is_soon_tried_again():
    """Its acceptance and its seconds say that it should have won: one trial on a busy machine does not shut it out for good."""
    controller = Controller([("suffix",)], StepCost())
    for step in range(300):
        arm = controller.choose(8)
        controller.step_cost.record(8, 0, 1.0)
        if arm:
            controller.record_drafts("suffix", np.full(8, 4), np.full(8, 3))
        disturbance = 9.0 if arm and step < 50 else 1.0
        controller.record(arm, 8, disturbance, 3.0 if arm else 1.0)
    assert controller.contests[3].best == ("suffix",)


def test_deterministic_choices_look_at_no_clock():
    controller = Controller([("suffix",)], FixedStepCost(), deterministic=True)
    before = [controller.choose(n) for n in (1, 8, 64)]
    for _ in range(50):
        controller.record(("suffix",), 1, 1e9, 1.0)
    assert [controller.choose(n) for n in (1, 8, 64)] == before and before[0] == ("suffix",)
    controller.acceptance["suffix"].record(np.full(5000, 4), np.zeros(5000, np.int64))
    assert controller.choose(1) == (), "but at what was accepted"


def test_acceptance_by_depth():
    acceptance = Acceptance()
    for _ in range(400):
        acceptance.record(np.array([3, 3, 1, 0]), np.array([3, 1, 0, 0]))
    # depth 1: right, right, wrong; depth 2: right, wrong; depth 3: right
    assert np.allclose(acceptance.survival_K[:3], [2 / 3, 1 / 3, 1 / 3], atol=0.02)
    total = acceptance.total_K.copy()
    acceptance.fade(0.5)
    assert np.allclose(acceptance.survival_K[:3], [2 / 3, 1 / 3, 1 / 3], atol=0.02)
    assert (acceptance.total_K < total).any() and (acceptance.total_K >= PRIOR_TOKENS - 1e-9).all()
    restored = Acceptance()
    restored.load_state_dict(acceptance.state_dict())
    assert (restored.survival_K == acceptance.survival_K).all()


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


def test_retraining_is_taken_up_again_where_drafts_get_worse():
    budget = RetrainBudget(max_share=0.05)
    for _ in range(12):
        budget.notice("shown", 2.4)
        steps = budget.choose(interval_seconds=60, remaining_updates=50, drafted_seconds=30)
        budget.record(max(1, steps), 0.02, 0.1, gain=0.0, drafted_seconds=30, remaining=50)
    budget.notice("judged", 1.3)
    budget.notice("shown", 2.2)
    assert not budget.is_near and budget.choose(60, 50, 30) == 0, "it brought nothing, and little has changed"
    budget.notice("shown", 1.3)
    assert budget.is_near and budget.choose(60, 50, 30) == FIRST_STEPS
    for _ in range(3):
        budget.record(2, 0.02, 0.1, gain=0.1, drafted_seconds=30, remaining=50)
    assert budget.choose(60, 50, 30) == 8 * FIRST_STEPS, "as long as it pays, twice as much the next time"


def test_an_arm_that_keeps_half_of_its_promises_is_hardly_tried():
    """Most rows get no draft, so that the few that are verified promise more than steps emit."""
    controller, num_trials = Controller([("suffix",)], StepCost()), 0
    for _ in range(3000):
        arm = controller.choose(8)
        num_trials += arm != ()
        controller.step_cost.record(8, 0, 1.0)
        if arm:
            controller.record_drafts("suffix", np.array([4] + [0] * 7), np.array([3] + [0] * 7))
        controller.record(arm, 8, 1.3 if arm else 1.0, 1.0)
    assert controller.predicted_rate(("suffix",), 8) > 1.1 * controller.predicted_rate((), 8)
    assert TRIAL_STEPS < num_trials <= 5 * TRIAL_STEPS


def test_a_win_over_plain_decoding_is_confirmed():
    contest = Contest(best=())
    contest.begin(Trial(("suffix",), promised=1.5))
    for step in range(2 * TRIAL_STEPS):
        contest.record(("suffix",), 1.5 if step < TRIAL_STEPS else 0.6)
        contest.record((), 1.0)
        assert contest.best == () and (contest.trial is None) == (step + 1 == 2 * TRIAL_STEPS)
    contest.begin(Trial(("suffix",), promised=1.5))
    for _ in range(2 * TRIAL_STEPS):
        contest.record(("suffix",), 1.5)
        contest.record((), 1.0)
    assert contest.best == ("suffix",)


def test_rest_lasts_to_the_step_before_a_trial_may_begin():
    _, _, controller = race({"suffix": 0.5})
    while (rest := controller.rest(8)) is None:
        controller.record(controller.choose(8), 8, 1.0, 1.0)
    num_rested = 0
    while rest.lasts(8):
        assert not rest.lasts(4), "a size that it knows nothing of"
        rest.record()
        num_rested += 1
    contest = controller.contests[3]
    assert num_rested and contest.step == contest.next_trial - 1
    assert Controller([("suffix",)], FixedStepCost(), deterministic=True).rest(8) is None


def bad_then_good(num_bad: int, num_good: int, controller: Controller, retrained: bool = False) -> int:
    """Of a drafter that is never right for some steps, and mostly right after them: how many of the latter it was asked in."""
    num_asked = 0
    for step in range(num_bad + num_good):
        is_good = step >= num_bad
        if step == num_bad and retrained:
            controller.improved("recurrent", 3.0, 4)
        arm = controller.choose(1)
        controller.step_cost.record(1, 0, 1.0)
        if arm:
            controller.record_drafts("recurrent", np.array([4]), np.array([3 * is_good]))
        controller.record(arm, 1, 1.3 if arm else 1.0, 4.0 if arm and is_good else 1.0)
        num_asked += bool(arm) and is_good
    return num_asked


def test_a_drafter_that_was_bad_is_not_shut_out():
    assert bad_then_good(800, 3 * LONGEST_WAIT, Controller([("recurrent",)], StepCost())) > LONGEST_WAIT


def test_a_drafter_that_retraining_has_mended_is_tried_at_once():
    assert bad_then_good(800, 200, Controller([("recurrent",)], StepCost())) == 0
    assert bad_then_good(800, 200, Controller([("recurrent",)], StepCost()), retrained=True) > 120


def test_retraining_that_brings_what_drafts_show_already_asks_for_no_trial():
    controller = Controller([("recurrent",)], StepCost())
    controller.improved("recurrent", 4.0, 4)
    controller.record_drafts("recurrent", np.full(64, 4), np.full(64, 3))
    shown = controller.acceptance["recurrent"]
    controller.improved("recurrent", 1.05 * shown.tokens_per_step(4), 4)
    assert controller.acceptance["recurrent"] is shown
