"""Log-probs for the trainer, by TRL's seam for vLLM and by `rollout_func`: the same completions, and importance ratios of 1."""

from __future__ import annotations

import copy
from functools import partial

import pytest

pytest.importorskip("trl")

import datasets
from helpers import tiny_qwen3
from recipes import CHATS, RECIPES, make_trainer, rollout_rows

from atlas_rl import AtlasRolloutGenerator

TAKE_NO_LOGPROBS = {"OnlineDPOTrainer", "GKDTrainer", "A2POTrainer"}


def recorded_completions(trainer) -> list[list[list[int]]]:
    """The completions of each generation of a GRPO trainer, once it has trained."""
    calls = []
    generate = trainer._generate

    def recording(prompts):
        outputs = generate(prompts)
        calls.append(copy.deepcopy(outputs[1]))
        return outputs

    trainer._generate = recording
    return calls


def attributes(trainer) -> dict:
    names = (
        "use_vllm",
        "vllm_mode",
        "vllm_generation",
        "_last_loaded_step",
        "_last_vllm_sync_step",
        "vllm_sync_frequency",
    )
    return {name: vars(trainer)[name] for name in names if name in vars(trainer)}


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in TAKE_NO_LOGPROBS])
def test_trainers_with_a_vllm_mode_train_on_atlas_logprobs(name: str, atlas, tiny_policy, tmp_path):
    trainer = make_trainer(name, tiny_policy, tmp_path, [atlas])
    if not hasattr(trainer, "use_vllm"):
        pytest.skip("without a vLLM mode in this TRL")
    before = attributes(trainer)
    assert atlas.attach(trainer, logprobs=True) is atlas
    served = []
    complete = atlas.backend.complete
    atlas.backend.complete = lambda prompts: served.append(prompts) or complete(prompts)
    trainer.train()
    rows = rollout_rows(tmp_path)
    assert len(served) == len(rows), "none by the hook"
    assert {row["step"] for row in rows} == {0, 1} and not any("fallback" in row for row in rows)
    atlas.detach()
    assert attributes(trainer) == before


@pytest.mark.parametrize("by_rollout_func", [False, True])
def test_importance_ratios_are_one_and_completions_those_of_the_hook(
    by_rollout_func: bool, atlas, tiny_policy, tmp_path
):
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "num_generations": 4, "per_device_train_batch_size": 8}
    plain = AtlasRolloutGenerator()
    expected_trainer = make_trainer("GRPOTrainer", tiny_policy, tmp_path / "hook", [plain], **options)
    expected = recorded_completions(expected_trainer)
    expected_trainer.train()
    plain.detach()
    parts = {"rollout_func": atlas.rollout_func} if by_rollout_func else {}
    trainer = make_trainer("GRPOTrainer", tiny_policy, tmp_path, [atlas], parts, **options)
    atlas.attach(trainer, logprobs=True)
    completions = recorded_completions(trainer)
    trainer.train()
    # not the second one: the trainer's own importance weighting rounds otherwise, and so do the weights it steps to
    assert completions[0] == expected[0] and len(completions) == len(expected) == 2
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2
    for entry in history:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
        assert entry["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=1e-3)
        assert entry["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("is_callback", [True, False])
@pytest.mark.parametrize("rows", [None, [{"prompt": row["messages"][:1]} for row in CHATS]])
def test_rollout_func_makes_the_completions_of_the_hook(is_callback: bool, rows, atlas, tiny_policy, tmp_path):
    """With texts and with messages, and also where the generator meets the trainer in it for the first time."""
    data = {"train_dataset": datasets.Dataset.from_list(rows)} if rows else {}
    plain = AtlasRolloutGenerator()
    hooked = make_trainer("GRPOTrainer", tiny_policy, tmp_path / "hook", [plain], data)
    expected = recorded_completions(hooked)
    hooked.train()
    plain.detach()
    callbacks = [atlas] if is_callback else None
    trainer = make_trainer("GRPOTrainer", tiny_policy, tmp_path, callbacks, {"rollout_func": atlas.rollout_func} | data)
    completions = recorded_completions(trainer)
    trainer.train()
    assert completions == expected and len(completions) == 2
    assert not any("fallback" in row for row in rollout_rows(tmp_path))


def test_logprobs_survive_a_second_attach_and_go_with_a_plain_one(atlas, tiny_policy, tmp_path):
    trainer = make_trainer("GRPOTrainer", tiny_policy, tmp_path)
    before = attributes(trainer)
    for _ in range(2):
        atlas.attach(trainer, logprobs=True)
        assert trainer.use_vllm and trainer.vllm_generation is atlas.backend
    atlas.attach(trainer)
    assert attributes(trainer) == before and "generate" in vars(trainer.model)


def test_another_generate_on_top_changes_nothing_for_the_trainer(atlas, tiny_policy, tmp_path):
    """FSDP, for one, puts its own around ours between attaching and training."""
    trainer = make_trainer("GRPOTrainer", tiny_policy, tmp_path)
    atlas.attach(trainer, logprobs=True)
    trainer.model.generate = partial(trainer.model.generate)
    trainer.train()
    assert trainer.vllm_generation is atlas.backend and atlas in trainer.callback_handler.callbacks
    assert len(rollout_rows(tmp_path)) == 2


@pytest.mark.parametrize("name", sorted(TAKE_NO_LOGPROBS))
def test_a_trainer_that_takes_no_logprobs_is_told(name: str, atlas, tiny_policy, tmp_path):
    trainer = make_trainer(name, tiny_policy, tmp_path)
    with pytest.raises(ValueError, match=rf"{name} has no use .* without logprobs"):
        atlas.attach(trainer, logprobs=True)
    assert "generate" not in vars(trainer.model)


def test_a_model_has_no_use_for_logprobs(atlas):
    with pytest.raises(ValueError, match="for trainers"):
        atlas.attach(tiny_qwen3(), logprobs=True)


def test_what_atlas_cannot_do_has_no_fallback_here(atlas, tiny_policy, tmp_path):
    trainer = make_trainer("GRPOTrainer", tiny_policy, tmp_path, generation_kwargs={"num_beams": 2})
    atlas.attach(trainer, logprobs=True)
    with pytest.raises(ValueError, match=r"num_beams\. Attach without logprobs"):
        trainer.train()
    with pytest.raises(ValueError, match="text only"):
        trainer.vllm_generation.generate([[5, 6]], images=[["a picture"]], num_generations=1)


@pytest.mark.parametrize("option", ["use_vllm", "use_transformers_continuous_batching"])
def test_options_that_bypass_generate_are_named(option: str, atlas, tiny_policy, tmp_path, caplog):
    trainer = make_trainer("GRPOTrainer", tiny_policy, tmp_path)
    setattr(trainer.args, option, True)  # with use_vllm, TRL builds no trainer on a machine without vLLM
    atlas.attach(trainer)
    (record,) = [r for r in caplog.records if "not in use" in r.message]
    assert option in record.message and "False" in record.message
    with pytest.raises(ValueError, match=f"{option} sends the rollouts past Atlas"):
        atlas.attach(trainer, logprobs=True)
