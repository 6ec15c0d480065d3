"""A GRPO trainer with the callback: rollouts through Atlas, metrics everywhere, the model as it would be without us."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import tiny_qwen3
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer

from atlas_rl import AtlasConfig, AtlasRolloutGenerator
from atlas_rl.engine import engine as engine_module
from atlas_rl.engine.graphs import EagerGraphs

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

attached: list[AtlasRolloutGenerator] = []


@pytest.fixture(autouse=True)
def detach_all():
    """A trainer's callback stays attached after training; the next test starts clean."""
    yield
    while attached:
        attached.pop().detach()


WORDS = [f"w{i}" for i in range(95)]


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {"<pad>": 0, "<eos>": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def count_low_words(completions, **kwargs) -> list[float]:
    return [sum(int(w[1:]) < 48 for w in c.split() if w.startswith("w")) / (1 + len(c.split())) for c in completions]


def make_trainer(tokenizer, output_dir: Path, callbacks, model=None, reward=count_low_words, **options):
    prompts = [{"prompt": " ".join(WORDS[i : i + 1 + i % 4])} for i in range(16)]
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 5,
    }
    attached.extend(callbacks or [])
    return trl.GRPOTrainer(
        model=model or tiny_qwen3(),
        processing_class=tokenizer,
        reward_funcs=reward,
        args=trl.GRPOConfig(**defaults | options),
        train_dataset=datasets.Dataset.from_list(prompts),
        eval_dataset=datasets.Dataset.from_list(prompts[:4]),
        callbacks=callbacks,
    )


def rows_of(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "rollouts.jsonl").read_text().splitlines()]


def completions_of(atlas: AtlasRolloutGenerator) -> list[list]:
    """Record the completions of each generate call of an attached generator."""
    calls: list[list] = []
    ready_engine = atlas.attachment.ready_engine

    def recording_engine(*args):
        engine = ready_engine(*args)
        generate = type(engine).generate

        def recorded(requests, sampling):
            rollouts = generate(engine, requests, sampling)
            calls.append([r.token_ids for r in rollouts])
            return rollouts

        engine.generate = recorded
        return engine

    atlas.attachment.ready_engine = recording_engine
    return calls


def test_a_run_goes_through_atlas_and_logs_it(tokenizer, tmp_path):
    atlas = AtlasRolloutGenerator()
    trainer = make_trainer(tokenizer, tmp_path, [atlas], eval_strategy="steps", eval_steps=1)
    trainer.train()
    rows = rows_of(tmp_path)
    rollouts = [row for row in rows if row["kind"] == "rollout"]
    assert not any("fallback" in row for row in rows)
    train = [row for row in rollouts if row["phase"] == "train"]
    assert [(row["step"], row["call"], row["rank"]) for row in train] == [(0, 0, 0), (1, 0, 0)]
    assert all(row["num_completions"] == 8 and row["num_prompts"] == 2 for row in train)
    assert {row["phase"] for row in rollouts} == {"train", "eval"}
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2]
    for step, rollout in zip(steps, train, strict=True):
        assert step["completion_tokens"] == rollout["completion_tokens"] > 0
        assert step["step_seconds"] > step["seconds"]["total"] > 0
    history = trainer.state.log_history
    logged = [entry for entry in history if "rollout/tokens_per_s" in entry]
    assert len(logged) == 2 and all("reward" in entry for entry in logged), "merged into the trainer's own entries"
    assert any("eval_rollout/tokens_per_s" in entry and "eval_reward" in entry for entry in history)
    logs = [row for row in rows if row["kind"] == "log"]
    rewards = [entry["reward"] for entry in history if "reward" in entry]
    assert [row["reward"] for row in logs if "reward" in row] == rewards, "so that a report needs nothing but this file"
    assert {(row["phase"], row["step"]) for row in logs} == {
        (phase, step) for phase in ("train", "eval") for step in (1, 2)
    }
    assert not any(name.startswith("rollout/") for row in logs for name in row)


def test_training_is_the_same_with_and_without_speculation(tokenizer, tmp_path):
    """Same completions, hence the same weights after three updates. With a drafter that knows what comes next."""
    weights = []
    for speculate in (True, False):
        atlas = AtlasRolloutGenerator(AtlasConfig(speculate=speculate, lookahead=3))
        trainer = make_trainer(tokenizer, tmp_path / str(speculate), [atlas], max_steps=3)
        calls = completions_of(atlas)
        trainer.train()
        weights.append((calls, [p.detach().clone() for p in trainer.model.parameters()]))
    assert weights[0][0] == weights[1][0]
    rows = [row for row in rows_of(tmp_path / "True") if row["kind"] == "rollout"]
    assert sum(row["drafters"]["suffix"]["accepted"] for row in rows if "drafters" in row) > 0
    for a, b in zip(weights[0][1], weights[1][1], strict=True):
        torch.testing.assert_close(a, b)


def test_training_is_the_same_on_captured_steps(tokenizer, tmp_path, monkeypatch):
    """As a GPU decodes, but that steps are called and not replayed: same completions, weights that change in between."""
    runs = []
    for name, graphs in (("called", None), ("captured", EagerGraphs())):
        monkeypatch.setattr(engine_module, "backend_for", lambda device, graphs=graphs: graphs)
        atlas = AtlasRolloutGenerator(AtlasConfig(lookahead=3))
        trainer = make_trainer(tokenizer, tmp_path / name, [atlas], max_steps=3)
        calls = completions_of(atlas)
        trainer.train()
        runs.append((calls, [p.detach().clone() for p in trainer.model.parameters()]))
        timed = [row for row in rows_of(tmp_path / name) if row["kind"] != "log"]
        assert all(("device_seconds" in row) == (graphs is not None) for row in timed)
    assert runs[0][0] == runs[1][0]
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(a, b)


def test_two_generations_in_one_step_and_evaluation_get_other_seeds(tokenizer, tmp_path):
    atlas = AtlasRolloutGenerator()
    trainer = make_trainer(
        tokenizer,
        tmp_path,
        [atlas],
        learning_rate=0.0,
        gradient_accumulation_steps=2,
        steps_per_generation=1,
        max_steps=2,
        shuffle_dataset=False,
    )
    trainer.train_dataset = trainer.train_dataset.select([0] * 8)
    calls = completions_of(atlas)
    trainer.train()
    rows = [row for row in rows_of(tmp_path) if row["kind"] == "rollout"]
    assert [(row["step"], row["call"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    trainer.evaluate(trainer.train_dataset)
    assert len({json.dumps(call) for call in calls}) == len(calls) > 4


def test_callback_and_attach_by_hand_are_the_same(tokenizer, tmp_path):
    outputs = []
    for by_hand in (True, False):
        atlas = AtlasRolloutGenerator()
        trainer = make_trainer(tokenizer, tmp_path / str(by_hand), None if by_hand else [atlas])
        if by_hand:
            assert atlas.attach(trainer) is atlas
            attached.append(atlas)
        outputs.append(completions_of(atlas))
        trainer.train()
        assert any("rollout/tokens_per_s" in entry for entry in trainer.state.log_history)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_an_interrupt_leaves_trainer_model_and_log_intact(tokenizer, tmp_path, checkpointing: bool):
    atlas = AtlasRolloutGenerator()
    trainer = make_trainer(tokenizer, tmp_path, [atlas], gradient_checkpointing=checkpointing)
    model = trainer.model

    def flags() -> tuple:
        return (
            [
                (getattr(m, "gradient_checkpointing", None), vars(m).get("_gradient_checkpointing_func"))
                for m in model.modules()
            ],
            [m.training for m in model.modules()],
            [len(m._forward_hooks) for m in model.modules()],
            model.config._attn_implementation,
        )

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        atlas.on_step_begin(trainer.args, trainer.state, trainer.control)
    model.train()
    expected = flags()
    engine = atlas.attachment.ready_engine()
    logits = engine.view.logits
    calls = []

    def interrupted(hidden):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return logits(hidden)

    engine.view.logits = interrupted
    weights = [p.detach().clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        trainer._generate(["w3 w4", "w5"])
    assert flags() == expected
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    (row,) = rows_of(tmp_path)
    assert row["error"] == "KeyboardInterrupt" and row["completion_tokens"] == 8
    engine.view.logits = logits
    trainer.train()
    assert len(rows_of(tmp_path)) >= 4


def test_detach_leaves_the_trainer_as_it_was(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, None)
    callbacks = list(trainer.callback_handler.callbacks)
    with AtlasRolloutGenerator().attach(trainer):
        assert len(trainer.callback_handler.callbacks) == len(callbacks) + 1
    assert trainer.callback_handler.callbacks == callbacks and "generate" not in vars(trainer.model)
    trainer.train()
    assert not (tmp_path / "rollouts.jsonl").exists()


def test_one_generator_serves_two_trainers_one_after_the_other(tokenizer, tmp_path):
    atlas = AtlasRolloutGenerator()
    for name in ("x", "y"):
        make_trainer(tokenizer, tmp_path / name, [atlas]).train()
        kinds = Counter(row["kind"] for row in rows_of(tmp_path / name))
        assert (kinds["rollout"], kinds["step"]) == (2, 2)


def test_detach_restores_trainer_log(tokenizer, tmp_path):
    log = Trainer.log
    atlas = AtlasRolloutGenerator()
    trainer = make_trainer(tokenizer, tmp_path, [atlas])
    assert Trainer.log is not log
    atlas.detach()
    assert Trainer.log is log
    trainer.train()
    assert Trainer.log is not log, "training attaches again"


def test_a_full_disk_costs_a_warning_not_the_run(tokenizer, tmp_path, caplog, monkeypatch):
    """The first writes fail; later ones carry their rows along."""
    opened = Path.open
    failures = []

    def flaky(self, *args, **kwargs):
        if self.name == "rollouts.jsonl" and len(failures) < 3:
            failures.append(1)
            raise OSError(28, "No space left on device")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", flaky)
    make_trainer(tokenizer, tmp_path, [AtlasRolloutGenerator()]).train()
    kinds = [row["kind"] for row in rows_of(tmp_path)]
    assert kinds == ["rollout", "step", "log"] * 2 + ["log"], "the last one is of the whole run"
    assert sum("No space left" in record.message for record in caplog.records) == 1


def test_an_earlier_log_is_kept_and_a_resumed_run_goes_on_with_its_own(tokenizer, tmp_path):
    for _ in range(2):
        make_trainer(
            tokenizer, tmp_path, [AtlasRolloutGenerator()], max_steps=1, save_strategy="steps", save_steps=1
        ).train()
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == ["rollouts.1.jsonl", "rollouts.jsonl"]
    trainer = make_trainer(tokenizer, tmp_path, [AtlasRolloutGenerator()], max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == ["rollouts.1.jsonl", "rollouts.jsonl"]
    assert [row["step"] for row in rows_of(tmp_path) if row["kind"] == "step"] == [1, 2]
