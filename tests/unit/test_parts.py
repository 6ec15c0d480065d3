"""What each drafter would have been worth alone, where it can be done by hand."""

import pytest
from helpers import make_engine, make_requests, tiny_llama

from atlas_rl.config import AtlasConfig
from atlas_rl.control.parts import Parts
from atlas_rl.drafters.suffix import SuffixDrafter
from atlas_rl.telemetry.stats import RolloutStats
from atlas_rl.types import SamplingParams

RATES = {(): 100.0, ("good",): 200.0, ("bad",): 50.0}


def rate_of(arm, num_rows, num_cached):
    """Tokens per row and second: the good drafter pays on small batches alone."""
    return RATES[arm] if num_rows <= 4 else min(100.0, RATES[arm])


def test_a_part_decodes_as_it_would_be_chosen():
    """Half of the work at batches where the good one halves the time; the bad one is never chosen."""
    parts = Parts()
    for _ in range(100):
        parts.record((), 4, 100, 4, 0.01)
        parts.record((), 32, 100, 32, 0.01)
    assert parts.close(["good", "bad"], rate_of) == pytest.approx({"good": 0.75, "bad": 1.0})
    assert parts.close(["good"], rate_of) == {}, "a rollout without a step"


def test_own_steps_correct_what_is_predicted():
    """The tables say twice as fast as plain; in fact its steps emit a token in a plain step's time."""
    parts = Parts()
    for _ in range(10):
        parts.record((), 4, 100, 4, 0.01)
        parts.record(("good",), 4, 100, 4, 0.01)
    assert parts.close(["good"], rate_of)["good"] == pytest.approx(1.0)
    parts.record((), 4, 100, 4, 0.01)
    assert parts.close(["good"], rate_of)["good"] == pytest.approx(1.0), "which later rollouts remember"


def test_a_slow_machine_is_no_drafter_s_fault():
    parts = Parts()
    for _ in range(10):
        parts.record((), 4, 100, 4, 0.03)
        parts.record(("good",), 4, 100, 8, 0.03)
    assert parts.close(["good"], rate_of)["good"] == pytest.approx(0.5)


def test_speedups_of_a_rollout_and_of_sums():
    engine = make_engine(tiny_llama(), drafter=SuffixDrafter())
    rollout = [(make_requests(2, 4, max_new_tokens=120), SamplingParams(temperature=0.0)) for _ in range(3)]
    for requests, sampling in rollout:
        engine.generate(requests, sampling)
    stats = engine.stats
    row = stats.to_dict()
    assert 0.9 < row["speedup_by_part"]["suffix"] < 20, "greedy rollouts repeat themselves"
    both = RolloutStats.total([stats, stats])
    assert both.to_dict()["speedup_by_part"] == row["speedup_by_part"]
    other = RolloutStats(plain_seconds_estimate=1.0)
    assert "speedup_by_part" not in RolloutStats.total([stats, other]).to_dict(), "the other one has none"


def test_none_without_drafts_or_a_clock():
    for config in (AtlasConfig(speculate=False), AtlasConfig(deterministic=True)):
        drafters = None if not config.speculate else SuffixDrafter()
        engine = make_engine(tiny_llama(), config, drafters)
        engine.generate(make_requests(2, 2), SamplingParams())
        assert "speedup_by_part" not in engine.stats.to_dict()
        assert not engine.controller.parts.steps, "nothing is kept"
