"""Drafters in checkpoints: a resumed run repeats an uninterrupted one, and no damage or full disk ends a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer

pytest.importorskip("trl")

from recipes import make_trainer, rollout_rows

from atlas_rl import AtlasConfig, AtlasRolloutGenerator, SamplingParams, last_complete_checkpoint
from atlas_rl.adapt import state as module
from atlas_rl.adapt.state import FOLDER, STATE, TENSORS, load_state, save_state
from atlas_rl.config import AdaptConfig

ADAPT = AdaptConfig(deterministic_steps=3, learning_rate=3e-3, tokens_per_update=400)
OPTIONS = {
    "per_device_train_batch_size": 8,
    "num_generations": 8,
    "max_completion_length": 24,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 3,
    "per_device_eval_batch_size": 8,
    "learning_rate": 1e-2,
}


@pytest.fixture(autouse=True)
def quick_head(monkeypatch):
    """A head is made within three updates, the last of them after the first checkpoint."""
    monkeypatch.setattr("atlas_rl.adapt.adaptation.DISTILL_STEPS", 9)


def config(**options) -> AtlasConfig:
    return AtlasConfig(**{"deterministic": True, "adapt": ADAPT, "lookahead": 3} | options)


def train(policy: Path, folder: Path, resume: bool | str | None = None, **options):
    """The generator after the run, its completions, and the weights of its drafters."""
    atlas = AtlasRolloutGenerator(config(**options))
    trainer = make_trainer("GRPOTrainer", policy, folder, [atlas], **OPTIONS)
    completions, generate = [], trainer._generate

    def recording(batch):
        outputs = generate(batch)
        completions.append(outputs[1])
        return outputs

    trainer._generate = recording
    try:
        trainer.train(resume_from_checkpoint=resume)
        adaptation = atlas.attachment.adaptation
    finally:
        atlas.detach()
    weights = {d.name: d.head.state_dict() for d in adaptation.drafters.all if d.name != "suffix"}
    return adaptation, completions, weights


def figures(row: dict) -> dict:
    """What of a row must not depend on clocks or on an interruption."""
    names = ("step", "completion_tokens", "decode_steps", "acceptance_by_depth", "drafters", "arms", "draft_vocabulary")
    retrain = {k: v for k, v in row.get("retrain", {}).items() if k != "seconds"}
    return {name: row.get(name) for name in names} | {"retrain": retrain}


@pytest.mark.parametrize("checkpoint", [3, 6])
def test_a_resumed_run_repeats_an_uninterrupted_one(tiny_policy, tmp_path, checkpoint):
    one, completions, weights = train(tiny_policy, tmp_path / "one")
    shutil.copytree(tmp_path / "one" / f"checkpoint-{checkpoint}", tmp_path / "two" / f"checkpoint-{checkpoint}")
    two, again, other_weights = train(tiny_policy, tmp_path / "two", resume=True)
    assert again == completions[checkpoint:]
    rows, other_rows = rollout_rows(tmp_path / "one")[checkpoint:], rollout_rows(tmp_path / "two")
    assert [figures(row) for row in other_rows] == [figures(row) for row in rows]
    assert sum(row.get("retrain", {}).get("steps", 0) for row in rows) > 0, "it was retrained"
    asked = {name for row in rollout_rows(tmp_path / "one") for name in row.get("drafters", {})}
    assert asked & {"recurrent", "static"}, "and asked"
    assert weights.keys() == other_weights.keys() == {"recurrent", "static"}
    for name, tensors in weights.items():
        assert all(torch.equal(tensor, other_weights[name][key]) for key, tensor in tensors.items()), name
    assert two.retrainer.budget.state_dict().keys() == one.retrainer.budget.state_dict().keys()
    assert torch.equal(one.retrainer.generator.get_state(), two.retrainer.generator.get_state())


def test_drafters_are_resumed_also_after_an_evaluation(tiny_policy, tmp_path):
    train(tiny_policy, tmp_path)
    atlas = AtlasRolloutGenerator(config())
    trainer = make_trainer("GRPOTrainer", tiny_policy, tmp_path, [atlas], **OPTIONS | {"max_steps": 9})
    trainer.evaluate(trainer.train_dataset)
    assert atlas.attachment.adaptation.distill_steps_left > 0
    trainer.train(resume_from_checkpoint=True)
    assert atlas.attachment.adaptation.distill_steps_left == 0
    atlas.detach()


@pytest.mark.parametrize("fault", ["disk", "safetensors", "rename"])
def test_a_disk_that_is_full_at_a_checkpoint_costs_one_warning(tiny_policy, tmp_path, monkeypatch, caplog, fault):
    error = OSError(28, "No space left on device")
    calls = []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise (
                SafetensorError("Error while serializing: No space left on device") if fault == "safetensors" else error
            )
        return original(*args, **kwargs)

    name = {"disk": "save_head", "safetensors": "save_file", "rename": "replace_folder"}[fault]
    original = getattr(module, name)
    monkeypatch.setattr(module, name, full)
    _, completions, _ = train(tiny_policy, tmp_path)
    assert len(completions) == 8
    assert sum("is not saved" in record.message for record in caplog.records) == 1
    assert not (tmp_path / "checkpoint-3" / FOLDER).exists() and (tmp_path / "checkpoint-6" / FOLDER / STATE).exists()
    assert not list(tmp_path.glob("checkpoint-*/.*")), "nothing half-written is left"


def test_a_run_killed_while_it_saves_over_an_earlier_checkpoint_is_resumed_from_the_one_before(
    tiny_policy, tmp_path, monkeypatch
):
    train(tiny_policy, tmp_path)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    shutil.rmtree(tmp_path / "checkpoint-8")
    save_weights, saved = Trainer.save_model, []

    def killed_in_the_second(self, output_dir, **options):
        saved.append(output_dir)
        if len(saved) == 2:
            raise KeyboardInterrupt
        return save_weights(self, output_dir, **options)

    monkeypatch.setattr(Trainer, "save_model", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_policy, tmp_path)
    assert [Path(path).name for path in saved] == ["checkpoint-3", "checkpoint-6"]
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    monkeypatch.undo()
    train(tiny_policy, tmp_path, resume=last_complete_checkpoint(tmp_path))  # a Path does
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-8"


def test_checkpoints_of_a_run_whose_rollouts_go_past_atlas_are_complete_too(tiny_policy, tmp_path):
    atlas = AtlasRolloutGenerator(config())
    options = OPTIONS | {"max_steps": 3, "generation_kwargs": {"num_beams": 8}}
    trainer = make_trainer("GRPOTrainer", tiny_policy, tmp_path, [atlas], **options)
    trainer.train()
    assert atlas.attachment.adaptation is None and last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    atlas.detach()


def test_a_deterministic_run_that_saves_inside_a_generation_does_not_start(tiny_policy, tmp_path):
    atlas = AtlasRolloutGenerator(config())
    trainer = make_trainer("GRPOTrainer", tiny_policy, tmp_path, [atlas], **OPTIONS | {"num_iterations": 2})
    with pytest.raises(ValueError, match="set save_steps: 4"):
        trainer.train()
    atlas.detach()


# ---- damage, on a bare model ------------------------------------------------------------------------------------------------


def learned(policy, **options) -> AtlasRolloutGenerator:
    atlas = AtlasRolloutGenerator(config(**options)).attach(policy)
    for seed in range(5):
        generate(atlas, seed)
    return atlas


def generate(atlas: AtlasRolloutGenerator, seed: int) -> list[list[int]]:
    prompts = [[3, 4, 5], [6], [7, 8]]
    return [r.token_ids for r in atlas.generate(prompts, SamplingParams(max_new_tokens=24), 8, seed=seed)]


def save(atlas: AtlasRolloutGenerator, checkpoint: Path) -> Path:
    save_state(checkpoint, atlas.attachment.adaptation, atlas.attachment.engine)
    return checkpoint / FOLDER


def state_of(atlas: AtlasRolloutGenerator):
    saved = module.Saved.of(atlas.attachment.adaptation, atlas.attachment.engine)
    heads = {name: head.state_dict() for name, head in saved.heads.items()}
    return (
        json.dumps(saved.numbers),
        {k: v.tolist() for k, v in saved.tensors.items()},
        {(name, key): tensor.tolist() for name, tensors in heads.items() for key, tensor in tensors.items()},
    )


def load(atlas: AtlasRolloutGenerator, checkpoint: Path) -> bool:
    return load_state(checkpoint, atlas.attachment.adaptation, atlas.attachment.engine)


def test_what_is_loaded_is_what_was_saved(tmp_path):
    policy = tiny_llama()
    with learned(policy) as atlas:
        assert not atlas.attachment.adaptation.distill_steps_left
        save(atlas, tmp_path)
        expected = state_of(atlas)
        assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == sorted([STATE, TENSORS, "recurrent", "static"])
        save(atlas, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == [FOLDER], "saved over"
    with AtlasRolloutGenerator(config()).attach(policy) as other:
        generate(other, 9)
        assert state_of(other) != expected and "recurrent" in other.attachment.engine.controller.benched
        assert load(other, tmp_path)
        assert state_of(other) == expected and not other.attachment.engine.controller.benched
        generate(other, 10)
        assert "recurrent" in "".join(other.stats.arms)
        assert not load(other, tmp_path / "nowhere")


def truncated(folder: Path) -> None:
    (folder / STATE).write_text((folder / STATE).read_text()[:-20])


def no_state(folder: Path) -> None:
    (folder / STATE).unlink()


def no_tensors(folder: Path) -> None:
    (folder / TENSORS).unlink()


def cut_tensors(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:100])


def no_head(folder: Path) -> None:
    shutil.rmtree(folder / "static")


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / TENSORS)
    edit(tensors)
    save_file(tensors, folder / TENSORS)


def missing_moments(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.pop("optimizer.3.exp_avg"))


def misshapen_moments(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"optimizer.3.exp_avg": torch.zeros(3, 3)}))


def foreign_ids(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"vocabulary.recurrent.ids": torch.arange(200)}))


def foreign_counts(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"vocabulary.static.counts": torch.zeros(50, dtype=torch.float64)}))


def edit_numbers(folder: Path, edit) -> None:
    numbers = json.loads((folder / STATE).read_text())
    edit(numbers)
    (folder / STATE).write_text(json.dumps(numbers))


def other_version(folder: Path) -> None:
    edit_numbers(folder, lambda n: n.update(version=99))


def short_acceptance(folder: Path) -> None:
    edit_numbers(folder, lambda n: n["controller"]["acceptance"]["recurrent"].update(right=[1.0, 2.0]))


def no_budget(folder: Path) -> None:
    edit_numbers(folder, lambda n: n["retrainer"].update(budget={}))


def a_list(folder: Path) -> None:
    (folder / STATE).write_text("[]")


def nan_head(folder: Path) -> None:
    path = folder / "recurrent" / "model.safetensors"
    tensors = load_file(path)
    tensors["fc.weight"] = torch.full_like(tensors["fc.weight"], torch.nan)
    save_file(tensors, path)


DAMAGES = [
    *(truncated, no_state, no_tensors, cut_tensors, no_head, missing_moments, misshapen_moments, foreign_ids),
    *(foreign_counts, other_version, short_acceptance, no_budget, a_list, nan_head),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_costs_one_warning_and_leaves_nothing_of_it(tmp_path, caplog, damage):
    policy = tiny_llama()
    with learned(policy) as atlas:
        damage(save(atlas, tmp_path))
    with AtlasRolloutGenerator(config()).attach(policy) as other:
        generate(other, 9)
        before = state_of(other)
        assert not load(other, tmp_path)
        assert sum("start anew" in record.message for record in caplog.records) == len(caplog.records) == 1
        assert state_of(other) == before and other.attachment.engine.controller.benched == {"recurrent", "static"}
        for seed in range(10, 15):
            generate(other, seed)
        assert len(caplog.records) == 1 and not other.attachment.adaptation.distill_steps_left


@pytest.mark.parametrize("overrides", [{"hidden_size": 32}, {"vocab_size": 61}, {"vocab_size": 131}])
def test_a_checkpoint_of_another_policy_is_not_taken(tmp_path, caplog, overrides):
    with learned(tiny_llama(**overrides)) as atlas:
        save(atlas, tmp_path)
    policy = tiny_llama()
    with AtlasRolloutGenerator(AtlasConfig(speculate=False)).attach(policy) as plain:
        expected = [generate(plain, seed) for seed in range(4)]
    with AtlasRolloutGenerator(config()).attach(policy) as other:
        found = [generate(other, 0)]
        assert not load(other, tmp_path)
        found += [generate(other, seed) for seed in range(1, 4)]
    assert found == expected
    assert len(caplog.records) == 1 and ("another policy" in caplog.text or "another vocabulary" in caplog.text)
