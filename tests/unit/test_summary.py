"""The table at the end of a run, from rows whose sums can be done by hand."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from atlas_rl.telemetry.summary import RunSummary, summarize_run


def rollout(**figures: object) -> dict:
    base = {"kind": "rollout", "phase": "train", "call": 0, "step": 0, "rank": 0, "num_completions": 4}
    return {**base, **figures}


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(summary: RunSummary) -> str:
    screen = io.StringIO()
    Console(width=140, file=screen).print(summary.to_table())
    return screen.getvalue()


def test_figures_are_weighted(tmp_path):
    drafts = {"suffix": {"steps": 10, "proposed": 60, "accepted": 30}}
    fast = rollout(
        completion_tokens=300,
        seconds={"total": 1.0},
        speedup_estimate=2.0,
        tokens_per_decode_step=2.0,
        drafters=drafts,
    )
    slow = rollout(completion_tokens=100, seconds={"total": 3.0}, speedup_estimate=1.0, tokens_per_decode_step=1.0)
    step = {"kind": "step", "step": 1, "rank": 0, "seconds": {"total": 4.0}, "step_seconds": 8.0}
    history = [{"reward": value} for value in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)] + [
        {"train_runtime": 1.0}
    ]
    summary = summarize_run(write(tmp_path / "rollouts.jsonl", fast, slow, step), history)

    assert summary.tokens_per_s == pytest.approx(100)
    assert summary.speedup == pytest.approx((2.0 * 1 + 1.0 * 3) / 4)
    assert summary.acceptance == pytest.approx(0.5)
    assert summary.tokens_per_decode_step == pytest.approx(400 / (150 + 100))
    assert summary.rollout_share == pytest.approx(0.5)
    assert (summary.reward_first, summary.reward_last) == pytest.approx((0.15, 0.95))
    assert all(figure in text(summary) for figure in ("100", "1.25x", "50%", "1.60", "0.150 → 0.950"))


def test_ranks_run_side_by_side(tmp_path):
    rows = [rollout(rank=rank, completion_tokens=100, seconds={"total": 1.0 + rank}) for rank in range(2)]
    assert summarize_run(write(tmp_path / "log", *rows), []).tokens_per_s == pytest.approx(100)


def test_ranks_that_meet_wait_for_the_slowest_and_retrain_as_one(tmp_path):
    retrain = {"updates": 1, "steps": 2, "seconds": 0.5, "acceptance_before": 2.0, "acceptance_after": 2.5, "kept": 1}
    rows = [
        rollout(
            rank=rank,
            completion_tokens=100,
            seconds={"total": 1.0 + rank, "retrain": 0.5},
            rank_idle_s=1.0 - rank,
            retrain=retrain,
        )
        for rank in range(2)
    ]
    summary = summarize_run(write(tmp_path / "log", *rows), [])
    assert (summary.tokens_per_s, summary.idle_share) == pytest.approx((100, 0.25))
    assert (summary.retrain_updates, summary.retrain_steps, summary.retrain_seconds) == (1, 2, 0.5)
    assert "ranks idle" in text(summary) and "25%" in text(summary)


def test_figures_without_meaning_are_left_out(tmp_path):
    summary = summarize_run(
        write(tmp_path / "log", rollout(completion_tokens=10, seconds={"total": 1.0})), [{"reward": 1.0}]
    )
    table = text(summary)
    assert "tokens per second" in table
    assert not any(word in table for word in ("speed-up", "acceptance", "decode step", "share", "reward"))


def test_run_without_a_rollout(tmp_path):
    assert "Atlas made no rollout" in text(summarize_run(tmp_path / "missing.jsonl", []))


def test_calls_that_went_to_transformers_are_named_and_not_counted(tmp_path):
    served = rollout(completion_tokens=100, seconds={"total": 1.0})
    passed_on = rollout(completion_tokens=0, seconds={"total": 9.0}, fallback="it uses beams", num_completions=0)
    summary = summarize_run(write(tmp_path / "log", served, passed_on), [])
    assert (summary.num_rollouts, summary.tokens_per_s) == (1, pytest.approx(100))
    assert "it uses beams" in text(summary)
