"""Two processes over gloo: one run, distinct completions, equal weights, one log, and no rank waits for another to decode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("trl")

from ddp_worker import record
from launching import launch_ranks
from recipes import make_trainer

from atlas_rl import AtlasRolloutGenerator


def launch(policy: Path, output_dir: Path, **options: object) -> list[dict]:
    """What each rank saw."""
    launch_ranks("ddp_worker.py", policy, output_dir, json.dumps(options))
    return [json.loads((output_dir / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def run(tiny_policy, tmp_path_factory) -> tuple[Path, list[dict]]:
    """Output folder, and what each rank saw. The folder holds an earlier run's log."""
    output_dir = tmp_path_factory.mktemp("ddp")
    (output_dir / "rollouts.jsonl").write_text('{"kind": "step"}\n')
    return output_dir, launch(tiny_policy, output_dir)


def test_ranks_end_with_equal_weights(run):
    _, (first, second) = run
    assert first["weights"] == second["weights"]


def test_a_group_that_straddles_ranks_has_distinct_completions(run):
    """Two rows a rank, four samples a prompt."""
    _, (first, second) = run
    for step in (0, 1):
        assert len(set(first["prompts"][step] + second["prompts"][step])) == 1
        completions = first["completions"][step] + second["completions"][step]
        assert len({tuple(ids) for ids in completions}) == 4


def test_two_ranks_make_the_completions_of_one(run, tiny_policy, tmp_path):
    _, (first, second) = run
    atlas = AtlasRolloutGenerator()
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 1}
    trainer = make_trainer("GRPOTrainer", tiny_policy, tmp_path, [atlas], **options)
    prompts, completions = record(trainer)
    trainer.train()
    atlas.detach()
    assert first["prompts"][0] + second["prompts"][0] == prompts[0]
    assert first["completions"][0] + second["completions"][0] == completions[0]


def test_both_ranks_write_one_log_and_an_earlier_one_is_kept(run):
    """Also where rank 0 comes late; and rank 0 generated twice more than rank 1 in the end."""
    output_dir, _ = run
    assert (output_dir / "rollouts.1.jsonl").read_text() == '{"kind": "step"}\n'
    rows = [json.loads(line) for line in (output_dir / "rollouts.jsonl").read_text().splitlines()]
    places = [(row["rank"], row["step"], row["call"]) for row in rows if row["kind"] == "rollout"]
    in_training = [(rank, step, 0) for rank in (0, 1) for step in (0, 1)]
    assert sorted(places) == sorted([*in_training, (0, 2, 0), (0, 2, 1), (0, 2, 2), (1, 2, 0)])
    steps = [(row["rank"], row["step"]) for row in rows if row["kind"] == "step"]
    assert sorted(steps) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert not any("fallback" in row or "error" in row for row in rows)


def test_ranks_learn_together_at_each_update_also_where_an_evaluation_came_before(tiny_policy, tmp_path):
    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "max_steps": 3}
    seen = launch(tiny_policy, tmp_path, **evaluates)
    assert [rank["updates"] for rank in seen] == [2, 2], "after each step but the last"
    assert seen[0]["heads"] == seen[1]["heads"] != []
