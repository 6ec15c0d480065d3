"""Every trainer of the installed TRL that generates in its own process: two steps through Atlas, and a model left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import trl
from recipes import (
    CANNOT_EVALUATE,
    EARLIER,
    ELSEWHERE,
    EVALUATES_WITHOUT_GENERATING,
    RECIPES,
    SAMPLES_FOR_THE_LOG,
    make_trainer,
    marks,
    online_trainers,
    rollout_rows,
)
from transformers import Trainer

from atlas_rl import AtlasConfig, AtlasRolloutGenerator

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def test_every_trainer_that_generates_is_known_here():
    known = {*RECIPES, *SAMPLES_FOR_THE_LOG, *ELSEWHERE}
    found = set(online_trainers())
    assert found - known - EARLIER == set(), "TRL has trainers that generate and have no recipe in tests/recipes.py"
    if f"trl=={trl.__version__}" in CONSTRAINTS.read_text().splitlines():
        assert found == known - EARLIER, (
            "tests/recipes.py names trainers that TRL does not have, or that do not generate"
        )


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_through_atlas(name: str, atlas, tiny_policy, tmp_path):
    stock = make_trainer(name, tiny_policy, tmp_path / "stock")
    stock.train()
    trainer = make_trainer(name, tiny_policy, tmp_path, [atlas])
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    rows = rollout_rows(tmp_path)
    assert {(row["phase"], row["step"]) for row in rows} == {("train", 0), ("train", 1)}
    assert all(row["completion_tokens"] > 0 for row in rows)
    assert not any("fallback" in row or "error" in row for row in rows)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)), "it trained"
    atlas.detach()
    assert marks(trainer.model) == marks(stock.model)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in CANNOT_EVALUATE])
def test_evaluation_goes_through_atlas(name: str, atlas, tiny_policy, tmp_path):
    trainer = make_trainer(name, tiny_policy, tmp_path, [atlas])
    if name == "SDFTTrainer" and type(trainer).prediction_step is Trainer.prediction_step:
        pytest.skip("its evaluation fails without Atlas too in this TRL")
    trainer.evaluate()
    if name in EVALUATES_WITHOUT_GENERATING:
        assert not (tmp_path / "rollouts.jsonl").exists() or not rollout_rows(tmp_path)
        return
    rows = rollout_rows(tmp_path)
    assert rows and all(row["phase"] == "eval" and row["completion_tokens"] > 0 for row in rows)
    assert not any("fallback" in row or "error" in row for row in rows)


@pytest.mark.parametrize("name", SAMPLES_FOR_THE_LOG)
def test_samples_shown_during_evaluation_go_through_atlas(name: str, atlas, tiny_policy, tmp_path):
    trainer = make_trainer(name, tiny_policy, tmp_path, [atlas], max_length=24)
    trainer.model.eval()
    batch = next(iter(trainer.get_eval_dataloader()))
    assert len(trainer.generate_from_model(trainer.model, batch)) == 2
    (row,) = rollout_rows(tmp_path)
    assert row["phase"] == "eval" and row["completion_tokens"] > 0 and "fallback" not in row


def test_the_value_stage_of_a2po_is_served_where_its_reference_model_is_attached(atlas, tiny_policy, tmp_path):
    """It samples from a copy of the policy that no callback sees, several completions of each prompt."""
    trainer = make_trainer("A2POTrainer", tiny_policy, tmp_path, [atlas])
    log = tmp_path / "reference" / "rollouts.jsonl"
    with AtlasRolloutGenerator(AtlasConfig(log_path=str(log))).attach(trainer.ref_model):
        trainer.train()
    rows = rollout_rows(log.parent)
    assert len(rows) == 5, "eight training and two evaluation prompts, two at a time"
    assert all(row["num_prompts"] == 2 and row["num_completions"] == 4 for row in rows)
    assert not any("fallback" in row for row in rows)


def test_an_interrupted_evaluation_before_the_first_step_leaves_checkpointing_on(atlas, tiny_policy, tmp_path):
    trainer = make_trainer(
        "GRPOTrainer", tiny_policy, tmp_path, [atlas], eval_on_start=True, gradient_checkpointing=True
    )

    def interrupted(*args, **kwargs):
        assert not trainer.model.model.gradient_checkpointing, "TRL has it off around generate"
        raise KeyboardInterrupt

    atlas.attachment.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.model.model.gradient_checkpointing
