"""What callbacks generate between the rollouts, and runs that are started again: no rank waits in vain, none is stale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("deepspeed")

import torch
from grpo_ranks_worker import LEARNING, share_of_low_ids
from launching import launch_ranks
from recipes import make_trainer, rollout_rows, save_tiny_policy

from atlas_rl import AtlasRolloutGenerator

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def launch(policy: Path, folder: Path, mode: str, case: str) -> list[list[list[int]]]:
    launch_ranks("stray_calls_worker.py", policy, folder, mode, case, timeout=200)
    first, second = (json.loads((folder / f"rank{rank}.json").read_text())["completions"] for rank in (0, 1))
    return [a + b for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
@pytest.mark.parametrize("case", ["before", "after"])
def test_a_callback_that_samples_on_rank_0_changes_nothing(policy, tmp_path, mode, case):
    (completions,) = launch(policy, tmp_path, mode, case)
    rows = [row for row in rollout_rows(tmp_path) if row["num_completions"] > 1]
    assert len(completions) == 8 and len(rows) == 2, "one rollout serves four steps"
    assert all("rank_idle_s" in row and "fallback" not in row for row in rows)


def test_a_second_run_samples_from_the_weights_of_then(policy, tmp_path):
    """Under FSDP2: a trainer cannot train twice with DeepSpeed."""
    completions = launch(policy, tmp_path, "fsdp2", "twice")
    atlas = AtlasRolloutGenerator()
    options = LEARNING | {"max_steps": 1, "per_device_train_batch_size": 4}
    parts = {"reward_funcs": share_of_low_ids}
    trainer = make_trainer("GRPOTrainer", policy, tmp_path / "alone", [atlas], parts, **options)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(0.5)
    expected, generate = [], trainer._generate
    trainer._generate = lambda prompts: expected.append(generate(prompts)) or expected[-1]
    trainer.train()
    atlas.detach()
    assert completions[0] == [list(ids) for ids in expected[0][1]]
