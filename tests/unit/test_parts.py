"""What each drafter would have been worth alone, where it can be done by hand."""

import pytest
from helpers import make_engine, make_requests, tiny_llama

from atlas_rl.config import AtlasConfig
from atlas_rl.control.parts import STEPS_KEPT, Parts
from atlas_rl.drafters.suffix import SuffixDrafter
from atlas_rl.telemetry.stats import RolloutStats
from atlas_rl.types import SamplingParams

RATES = {(): 100.0, ("good",): 200.0, ("bad",): 50.0}


def rate_of(arm, num_rows, num_cached):
    """Tokens per row and second: the good drafter pays on small batches alone."""
    return RATES[arm] if num_rows <= 4 else min(100.0, RATES[arm])


def test_a_part_decodes_as_it_would_be_chosen():
    """Half of the time was spent at batches where the good one needs half of it; the bad one is never chosen."""
    parts = Parts()
    for _ in range(100):
        parts.record((), 4, 100, 4, 0.01, 0.01)
        parts.record((), 32, 100, 32, 0.01, 0.01)
    assert parts.close(["good", "bad"], rate_of) == pytest.approx({"good": 0.75, "bad": 1.0})
    assert parts.close(["good"], rate_of) == {}, "a rollout without a step"


def test_plain_steps_alone_tell_nothing_new():
    """What the rollouts before them have shown goes on; it is not worked out again."""
    parts, asked = Parts(), []
    for arm in [("good",), ()] * 4:
        parts.record(arm, 4, 100, 8 if arm else 4, 0.016 if arm else 0.01, 0.01)
    before = parts.close(["good"], rate_of)
    parts.record((), 4, 100, 4, 0.01, 0.01)
    assert parts.close(["good"], lambda *arguments: asked.append(arguments)) == before and not asked
    assert parts.close(["good"], rate_of) == {}, "a rollout without a step"


def test_own_steps_count_for_more_than_predictions():
    """The tables say twice as fast as plain; its own steps emit two tokens in 1.6 times a plain step's time. One hangs."""
    parts = Parts()
    for seconds in [0.016] * 10 + [3.0]:
        parts.record((), 4, 100, 4, 0.01, 0.01)
        parts.record(("good",), 4, 100, 8, seconds, 0.01)
    assert parts.close(["good"], rate_of)["good"] == pytest.approx(0.8)
    parts.record((), 4, 100, 4, 0.01, 0.01)
    assert parts.close(["good"], rate_of)["good"] == pytest.approx(0.8), "which later rollouts remember"


def test_predictions_are_believed_as_far_as_they_come_true():
    """Together with another one it took as long as plain decoding, where the tables promised half of that."""
    parts = Parts()
    for _ in range(10):
        parts.record(("good", "other"), 4, 100, 4, 0.01, 0.01)
        parts.record((), 2, 100, 2, 0.01, 0.01)
    assert parts.close(["good"], lambda arm, rows, cached: 200.0 if arm else 100.0)["good"] == pytest.approx(1.0)


def test_kept_is_bounded():
    parts = Parts()
    for rollout in range(50):
        for rows in range(1, 65):
            parts.record(("good",), rows, 100 * rollout, rows, 0.01, 0.01)
        parts.close(["good"], rate_of)
    assert len(parts.steps) == 7 and not parts.batches
    assert max(len(steps.slowness) for steps in parts.steps.values()) == STEPS_KEPT


def test_speedups_of_a_rollout_and_of_sums():
    engine = make_engine(tiny_llama(), drafter=SuffixDrafter())
    for _ in range(3):
        engine.generate(make_requests(2, 4, max_new_tokens=120), SamplingParams(temperature=0.0))
    stats = engine.stats
    row = stats.to_dict()
    assert 0.9 < row["speedup_by_part"]["suffix"] < 20, "greedy rollouts repeat themselves"
    both = RolloutStats.total([stats, stats])
    assert both.to_dict()["speedup_by_part"] == row["speedup_by_part"]
    other = RolloutStats(plain_seconds_estimate=1.0)
    assert "speedup_by_part" not in RolloutStats.total([stats, other]).to_dict(), "the other one has none"


def test_none_without_drafts_or_a_clock():
    for config in (AtlasConfig(speculate=False), AtlasConfig(deterministic=True)):
        engine = make_engine(tiny_llama(), config, SuffixDrafter() if config.speculate else None)
        engine.generate(make_requests(2, 2), SamplingParams())
        assert "speedup_by_part" not in engine.stats.to_dict()
        assert not engine.controller.parts.batches, "nothing is kept"
