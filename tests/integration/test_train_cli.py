"""`atlas-rl train` with a user's own model, data and reward: two steps of GRPO on a tiny random model."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from atlas_rl import last_complete_checkpoint
from atlas_rl.cli import main
from atlas_rl.integrations.trl import LogHook

SYMBOLS = "0123456789+-= abcdefghij"

REWARDS = """
calls = 0

def shortness(completions, **_):
    return [-float(len(text)) for text in completions]

def interrupted(completions, **_):
    global calls
    calls += 1
    if calls == 2:
        raise KeyboardInterrupt
    return [0.0] * len(completions)
"""


@pytest.fixture(autouse=True)
def ends_as_a_process_does():
    """The command line leaves its generator attached."""
    yield
    while LogHook.num_users:
        LogHook.release()


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a user may have it: model, data, rewards, config. Tests run inside it."""
    save_model(tmp_path / "model")
    rows = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(4) for b in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "cli_rewards.py").write_text(REWARDS)
    (tmp_path / "run.yaml").write_text(
        "output_dir: out\nuse_cpu: true\nbf16: false\nmax_steps: 2\nnum_generations: 4\nper_device_train_batch_size: 8\n"
        "max_completion_length: 16\nlogging_steps: 1\nsave_strategy: 'no'\nreport_to: none\nlearning_rate: 1e-3\n"
        "model_name_or_path: ./model\ndataset_name: data.jsonl\nreward_funcs: [cli_rewards.shortness]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "cli_rewards", raising=False)
    return tmp_path


def save_model(folder: Path) -> None:
    vocab = {symbol: index for index, symbol in enumerate(["<pad>", "<eos>", "<unk>", *SYMBOLS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": len(vocab)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids)).save_pretrained(folder)


def test_own_model_data_and_reward(run_dir, capsys):
    assert main(["train", "--config", "run.yaml", "--atlas.engine.block_size", "8"]) == 0
    printed = capsys.readouterr().out
    assert "tokens per second" in printed and "reward" in printed and "rollouts.jsonl" in printed
    assert (run_dir / "out" / "model.safetensors").is_file()
    rows = [json.loads(line) for line in (run_dir / "out" / "rollouts.jsonl").read_text().splitlines()]
    rollouts = [row for row in rows if row["kind"] == "rollout"]
    assert [row["num_completions"] for row in rollouts] == [8, 8]
    assert all(row["phase"] == "train" and row["completion_tokens"] > 0 for row in rollouts)
    assert sum(row["kind"] == "step" for row in rows) == 2

    assert main(["report", "out"]) == 0
    assert "out/report/index.html" in capsys.readouterr().out
    page = (run_dir / "out" / "report" / "index.html").read_text()
    assert all(f'<section id="{chart}">' in page for chart in ("speed", "seconds", "timeline", "reward", "lengths"))


def test_latest_goes_on_from_the_newest_complete_checkpoint(run_dir, capsys, caplog):
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--resume_from_checkpoint"]
    assert main(["train", "--config", "run.yaml", *saving, "latest"]) == 0
    assert "No complete checkpoint in out: starting anew" in capsys.readouterr().out
    (run_dir / "out" / "checkpoint-2" / "trainer_state.json").unlink()
    assert main(["train", "--config", "run.yaml", *saving, "true"]) == 0
    assert "Resuming from out/checkpoint-1" in capsys.readouterr().out
    assert sum("checkpoint-2 is incomplete" in record.getMessage() for record in caplog.records) == 1
    rows = [json.loads(line) for line in (run_dir / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 2], "the log goes on too"
    assert last_complete_checkpoint("out").name == "checkpoint-2"
    assert main(["train", "--config", "run.yaml", *saving, "out/checkpoint-9"]) == 2
    assert "resume_from_checkpoint" in capsys.readouterr().err


def test_interrupt_prints_what_was_done(run_dir, capsys):
    assert main(["train", "--config", "run.yaml", "--reward_funcs", "cli_rewards.interrupted"]) == 130
    captured = capsys.readouterr()
    assert "tokens per second" in captured.out and "interrupted" in captured.err


def test_rewards_and_data_are_checked_before_the_model(run_dir, capsys, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("trl.GRPOTrainer.__init__", never)
    cases = {
        ("--reward_funcs", "no_such_module.reward"): "no module no_such_module",
        ("--reward_funcs", "cli_rewards.missing"): "has no 'missing'",
        ("--dataset_train_split", "train", "--dataset_name", "broken.jsonl"): "dataset_name: broken.jsonl",
        ("--dataset_name", "other.csv"): "column `prompt`",
        ("--eval_strategy", "steps"): "dataset_test_split",
    }
    (run_dir / "broken.jsonl").write_text('{"prompt": "a"\n{"x":')
    (run_dir / "other.csv").write_text("question,answer\n1,2\n")
    for argv, said in cases.items():
        assert main(["train", "--config", "run.yaml", *argv]) == 2, argv
        assert said in capsys.readouterr().err


def test_folder_without_weights(run_dir, capsys):
    (run_dir / "model" / "model.safetensors").unlink()
    assert main(["train", "--config", "run.yaml"]) == 2
    assert "model_name_or_path" in capsys.readouterr().err


def test_dataset_saved_to_disk(run_dir):
    """`save_to_disk` folders are what `datasets` users have; `load_dataset` alone does not read them."""
    from datasets import Dataset

    from atlas_rl.cli import trl_run
    from atlas_rl.cli.trl_arguments import Given

    Dataset.from_list([{"prompt": "1 + 1 ="}] * 4).save_to_disk(str(run_dir / "saved"))
    flags = ["--dataset_name", "saved", "--output_dir", "out", "--use_cpu", "--bf16", "false"]
    train_dataset, eval_dataset = trl_run.load_datasets(Given.of("grpo", {}, flags).build([]))
    assert len(train_dataset) == 4 and eval_dataset is None


def test_rollouts_have_the_precision_that_the_launcher_s_config_asks_for(tiny_policy, tmp_path, monkeypatch):
    """accelerate's `mixed_precision: bf16` counts for the trainer, whatever its own `bf16` says."""
    from recipes import make_trainer

    from atlas_rl.integrations.trl import autocast_dtype

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = make_trainer("GRPOTrainer", tiny_policy, tmp_path, max_steps=1)
    trainer.train()
    assert trainer.accelerator.native_amp and not trainer.args.bf16
    assert autocast_dtype(trainer.model, trainer.model, trainer.args) == torch.bfloat16
