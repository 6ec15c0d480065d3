"""`atlas-rl drafter`: train and eval end to end on a tiny policy, and bad input that is named before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from recipes import TEXTS

from atlas_rl.cli import main
from atlas_rl.drafters.checkpoints import load_head

SMALL = ["--completions-per-prompt", "1", "--max-new-tokens", "12"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Half of them text, half conversations."""
    rows = [{"prompt": text} for text in TEXTS[:4]]
    rows += [{"prompt": [{"role": "user", "content": text}], "answer": 12} for text in TEXTS[4:]]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def run(*words: object) -> int:
    return main(["drafter", *map(str, words)])


@pytest.mark.parametrize("kind", ["recurrent", "eagle"])
def test_train_and_eval(kind, tiny_policy, prompts, tmp_path, capsys):
    out, figures = tmp_path / "new" / "head", tmp_path / "figures.json"
    command = [
        "train",
        "--policy",
        tiny_policy,
        "--prompts",
        prompts,
        "--kind",
        kind,
        "--out",
        out,
        "--steps",
        3,
        *SMALL,
    ]
    assert run(*command) == 0
    shown = capsys.readouterr().out
    assert "1 - TV" in shown and str(out) in shown.replace("\n", "")
    head = load_head(out)
    assert head.kind == kind and head.hidden_size == 64
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 3 and report["kind"] == kind and report["versions"]["torch"]
    assert len(report["held_out"]["coupled"]) == 8 and report["held_out"]["num_starts"] > 0
    assert report["command"].startswith("atlas-rl") and report["command"] in (out / "README.md").read_text()

    evaluate = ["eval", out, "--policy", tiny_policy, "--prompts", prompts, "--json", figures, *SMALL]
    assert run(*evaluate) == 0
    assert "arg-max" in capsys.readouterr().out
    measured = json.loads(figures.read_text())
    assert set(measured) == set(report["held_out"])
    assert run(*evaluate) == 0 and json.loads(figures.read_text()) == measured
    assert run(*command) == 0  # over the earlier head


def test_interrupt_keeps_the_best_head(tiny_policy, prompts, tmp_path, monkeypatch, capsys):
    from atlas_rl.adapt.optimizer import HeadOptimizer

    steps = []

    def step(self, loss, learning_rate):
        steps.append(learning_rate)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(HeadOptimizer, "step", step)
    command = ["train", "--policy", tiny_policy, "--prompts", prompts, "--out", tmp_path / "head", "--minutes", 5]
    assert run(*command, *SMALL) == 130
    assert "interrupted" in capsys.readouterr().out
    assert load_head(tmp_path / "head").kind == "recurrent"
    assert json.loads((tmp_path / "head" / "report.json").read_text())["interrupted"]


@pytest.mark.parametrize("action", ["train", "eval"])
def test_help_teaches_with_an_example(action, capsys):
    with pytest.raises(SystemExit) as stop:
        run(action, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text and f"atlas-rl drafter {action}" in text


def fails(capsys: pytest.CaptureFixture, *words: object) -> str:
    assert run(*words) == 2
    return capsys.readouterr().err


@pytest.fixture
def no_model(monkeypatch):
    """Loading a policy would be too late to find the mistake."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)


def test_bad_input_of_train(no_model, tiny_policy, prompts, tmp_path, capsys):
    train = ["train", "--policy", tiny_policy, "--prompts", prompts, "--out", tmp_path / "head"]
    assert "--out" in fails(capsys, "train")
    assert "did you mean 'eagle'" in fails(capsys, *train, "--kind", "eagel")
    assert "--policy: the folder ./missing does not exist" in fails(capsys, *train, "--policy", "./missing")
    assert "nowhere.jsonl cannot be read" in fails(capsys, *train, "--prompts", tmp_path / "nowhere.jsonl")
    assert "not allowed with" in fails(capsys, *train, "--steps", 3, "--minutes", 1)
    for flag in ("--minutes", "--steps", "--num-prompts", "--completions-per-prompt", "--lr"):
        assert f"{flag} must be positive" in fails(capsys, *train, flag, -1)
    assert "--seed" in fails(capsys, *train, "--seed", -1)
    assert "temperature" in fails(capsys, *train, "--temperature", -1)
    assert "max_new_tokens" in fails(capsys, *train, "--max-new-tokens", 0)
    bad = tmp_path / "bad.jsonl"
    for text, said in [
        ('{"prompt": "a"}\n{"question": "b"}', "line 2"),
        ('{"prompt": ""}', "line 1"),
        ('["prompt"]', "line 1"),
        ("prompt", "not JSON"),
        ("\n", "is empty"),
    ]:
        bad.write_text(text)
        assert said in fails(capsys, *train, "--prompts", bad)


def test_out_is_not_overwritten_unless_it_is_a_head(no_model, tiny_policy, prompts, tmp_path, capsys):
    train = ["train", "--policy", tiny_policy, "--prompts", prompts]
    assert "holds something else" in fails(capsys, *train, "--out", tmp_path)
    assert "cannot be written" in fails(capsys, *train, "--out", prompts)
    assert prompts.exists()


def test_bad_input_of_eval(no_model, tiny_policy, prompts, tmp_path, capsys):
    import torch

    from atlas_rl.drafters.checkpoints import save_head
    from atlas_rl.drafters.recurrent_head import RecurrentHead

    assert "holds no draft head" in fails(capsys, "eval", tmp_path / "missing")
    torch.manual_seed(0)
    for name, options in [("wide", {"hidden_size": 32, "layers": (0,)}), ("deep", {"hidden_size": 64, "layers": (5,)})]:
        save_head(RecurrentHead(**options), tmp_path / name)
        evaluate = ["eval", tmp_path / name, "--policy", tiny_policy, "--prompts", prompts]
        assert "made for another policy" in fails(capsys, *evaluate)
        assert "cannot be written" in fails(capsys, *evaluate, "--json", "/dev/null/figures.json")
    (tmp_path / "wide" / "config.json").write_text("{}")
    assert "no draft head" in fails(capsys, *evaluate[:1], tmp_path / "wide", *evaluate[2:])
