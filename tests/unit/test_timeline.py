"""Rows against time: nothing of the time is lost, however often rows and arms change, and the bound holds."""

import json
import random

import pytest
from helpers import make_engine, make_requests, recurrent, tiny_llama

from atlas_rl.drafters.suffix import SuffixDrafter
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.telemetry.stats import RolloutStats
from atlas_rl.telemetry.timeline import MAX_ENTRIES, Timeline
from atlas_rl.types import SamplingParams


def told(steps: list[tuple[float, int, tuple[str, ...]]]) -> Timeline:
    timeline, now = Timeline(100.0), 101.0
    for seconds, rows, arm in steps:
        timeline.record(now, now + seconds, rows, arm)
        now += seconds
    return timeline


def test_steps_between_which_nothing_changes_are_one_entry():
    row = told([(1.0, 4, ()), (1.0, 4, ()), (2.0, 4, ("suffix",)), (1.0, 2, ("static", "suffix"))]).to_dict()
    assert row == {
        "seconds": [1.0, 3.0, 5.0, 6.0],
        "rows": [4, 4, 2, 0],
        "arms": ["plain", "suffix", "static+suffix", "plain"],
    }


def test_bounded_and_true_where_everything_changes_at_every_step():
    rng = random.Random(0)
    steps = [(rng.uniform(0.5, 1.5), 5000 - i, rng.choice([(), ("suffix",)])) for i in range(5000)]
    row = told(steps).to_dict()
    assert MAX_ENTRIES // 4 <= len(row["seconds"]) <= MAX_ENTRIES
    assert row["seconds"][-1] - row["seconds"][0] == pytest.approx(sum(seconds for seconds, _, _ in steps))
    assert row["seconds"] == sorted(row["seconds"]) and row["rows"] == sorted(row["rows"], reverse=True)
    lasted = [b - a for a, b in zip(row["seconds"], row["seconds"][1:])]
    area = sum(rows * seconds for rows, seconds in zip(row["rows"], lasted))
    assert area == pytest.approx(sum(rows * seconds for seconds, rows, _ in steps), rel=0.02)
    assert max(lasted) < 8 * sum(lasted) / MAX_ENTRIES, "early times are not coarser than late ones"


def test_of_a_rollout():
    """Rows only leave, and what they take is what decoding takes."""
    view = PolicyView(tiny_llama())
    engine = make_engine(tiny_llama(), drafter=[SuffixDrafter(), recurrent(view)])
    rollouts = engine.generate(make_requests(3, 4, max_new_tokens=60), SamplingParams(eos_token_ids=(5, 6, 7)))
    row = json.loads(json.dumps(engine.stats.to_dict()))
    timeline, seconds = row["timeline"], row["seconds"]
    assert timeline["rows"][0] == 12 and timeline["rows"][-1] == 0
    assert timeline["rows"] == sorted(timeline["rows"], reverse=True)
    assert set(timeline["arms"]) <= set(row["arms"]) | {"plain"}
    decoding = sum(seconds[name] for name in ("draft", "verify", "sample"))
    assert 0.99 * decoding <= timeline["seconds"][-1] - timeline["seconds"][0]
    assert timeline["seconds"][-1] <= seconds["total"]
    lens = sorted(len(rollout.token_ids) for rollout in rollouts)
    assert (row["lengths"]["min"], row["lengths"]["max"]) == (lens[0], lens[-1])
    assert row["lengths"]["mean"] == pytest.approx(sum(lens) / len(lens), abs=0.01)
    assert row["lengths"]["p10"] <= row["lengths"]["p50"] <= row["lengths"]["p90"]


def test_sums_and_empty_rollouts_have_none():
    engine = make_engine(tiny_llama())
    engine.generate([], SamplingParams())
    assert not {"timeline", "lengths"} & set(engine.stats.to_dict())
    engine.generate(make_requests(1, 1), SamplingParams())
    assert {"timeline", "lengths"} <= set(engine.stats.to_dict())
    assert not {"timeline", "lengths"} & set(RolloutStats.total([engine.stats, engine.stats]).to_dict())
