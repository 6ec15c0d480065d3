"""Whole runs side by side on a tiny random policy: two processes that take their steps in turn."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
import yaml
from recipes import PROMPTS
from transformers import Trainer

from atlas_rl import AtlasRolloutGenerator
from atlas_rl.bench import whole_run
from atlas_rl.bench.whole_run_worker import Clock, build
from atlas_rl.integrations.trl import LogHook

REWARDS = """
def even(completions, **_):
    return [float(len(text) % 2) for text in completions]
"""


@pytest.fixture
def config(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (tmp_path / "whole_run_rewards.py").write_text(REWARDS)
    fields = {
        "model_name_or_path": str(tiny_policy),
        "dataset_name": str(tmp_path / "data.jsonl"),
        "reward_funcs": ["whole_run_rewards.even"],
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 6,
        "max_steps": 3,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run.yaml"


def test_two_runs_side_by_side(config: Path, capsys):
    out, png = config.parent / "out.json", config.parent / "out.png"
    words = ["--config", "run.yaml", "--seeds", "3", "--json", str(out), "--png", str(png)]
    assert whole_run.main(words) == 0
    shown = capsys.readouterr().out
    assert "bound on a step's speed-up" in shown and "within noise: undecided" in shown
    result = json.loads(out.read_text())
    assert result["config"] == "run.yaml"
    per_token = result["summary"]["atlas"]["overall"]["per_token"]
    speedup, of_bound = (per_token[name]["median"] for name in ("speedup", "of_bound"))
    assert f"seconds per token: {speedup:.2f} times as fast, {of_bound:.3f} of the bound" in shown
    assert png.stat().st_size > 0 and {"machine", "versions"} <= set(result)
    (run,) = result["runs"]
    assert run["seed"] == 3 and list(run["arms"]) == ["trl_generate", "atlas"]
    for steps in run["arms"].values():
        assert len(steps) == 3
        for step in steps:
            assert 0 < step["tokens"] <= 24 and step["longest"] <= 6 and 0 <= step["reward"] <= 1
            assert {"rollout", "reward", "forward", "backward", "optimizer"} <= set(step["parts"])
            assert sum(step["parts"].values()) <= step["seconds"] and step["cpu_seconds"] > 0
    theirs, ours = run["arms"].values()
    assert not any(step["atlas"] for step in theirs)
    assert all(0 < step["atlas"]["total"] <= step["parts"]["rollout"] for step in ours)
    overall = result["summary"]["atlas"]["overall"]
    assert overall["pairs"] == 3 and overall["bound"] > 0


@pytest.mark.parametrize(("arm", "speculates"), [("trl_generate", None), ("atlas", True), ("atlas_plain", False)])
def test_an_arm_is_what_it_is_called(config: Path, monkeypatch, arm: str, speculates: bool | None):
    monkeypatch.syspath_prepend(".")
    num_users, original_log = LogHook.num_users, Trainer.log
    trainer = build(arm, str(config), ["--output_dir", "out", "--report_to", "none"])
    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, AtlasRolloutGenerator)]
    assert [one.config.speculate for one in found] == ([] if speculates is None else [speculates])
    assert ("generate" in vars(trainer.model)) == bool(found)
    for one in found:
        one.detach()
    assert LogHook.num_users == num_users and Trainer.log is original_log


def test_a_process_that_fails_says_why(config: Path, capsys):
    Path("whole_run_rewards.py").write_text("def even(completions, **_):\n    raise RuntimeError('no rewards today')\n")
    assert whole_run.main(["--config", str(config), "--seeds", "0"]) == 1
    assert "no rewards today" in capsys.readouterr().err


class Arms:
    """Stand in for processes: the second seed is interrupted at its second step."""

    taken: list[tuple[int, str]] = []

    def __init__(self, name: str, config: str, seed: int, max_steps: int | None) -> None:
        self.name, self.seed, self.max_steps = name, seed, max_steps

    def answer(self) -> dict:
        return {"max_steps": self.max_steps}

    def take_step(self) -> dict:
        if self.taken.count((1, self.name)):
            raise KeyboardInterrupt
        self.taken.append((self.seed, self.name))
        return {"seconds": 2.0, "cpu_seconds": 2.0, "parts": {"rollout": 1.0}, "tokens": 8, "longest": 4, "reward": 0.5}

    def close(self) -> None:
        self.taken.append((self.seed, "closed"))


def test_interrupted_runs_keep_what_they_have_and_take_turns(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(whole_run, "ArmProcess", Arms)
    monkeypatch.setattr(Arms, "taken", [])
    out = tmp_path / "out.json"
    assert whole_run.main(["--seeds", "0,1,2", "--max_steps", "2", "--json", str(out)]) == 1
    assert "interrupted" in capsys.readouterr().err
    assert Arms.taken == [
        *[(0, "atlas"), (0, "trl_generate"), (0, "trl_generate"), (0, "atlas"), (0, "closed"), (0, "closed")],
        *[(1, "atlas"), (1, "trl_generate"), (1, "closed"), (1, "closed")],
    ]
    result = json.loads(out.read_text())
    assert result["config"] == "quickstart"
    assert [len(run["arms"]["atlas"]) for run in result["runs"]] == [2, 1]
    assert [row["pairs"] for row in result["summary"]["atlas"]["by_seed"]] == [2, 1]


def test_a_waiting_arms_clock_stands_still():
    class Slow(io.StringIO):
        def readline(self) -> str:
            time.sleep(0.2)
            return super().readline()

    clock = Clock()
    start = clock()
    clock.wait(Slow("step\n"))
    assert clock() - start < 0.1
    with pytest.raises(SystemExit):
        clock.wait(io.StringIO(""))


def test_a_full_disk_leaves_the_earlier_figures(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(whole_run, "ArmProcess", Arms)
    monkeypatch.setattr(Arms, "taken", [])
    out, calls = tmp_path / "out.json", []
    write = Path.write_text

    def full(path, text):
        write(path, text[:9])
        calls.append(path)
        if len(calls) > 1:
            raise OSError("No space left on device")
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", full)
    words = ["--seeds", "0,2", "--max_steps", "2", "--json", str(out)]
    assert whole_run.main(words) == 0 and len(calls) == 3
    assert [run["seed"] for run in json.loads(out.read_text())["runs"]] == [0]
    printed = capsys.readouterr()
    assert "No space left" in printed.err + printed.out and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    "words", [["--arms", "vllm"], ["--arms", "trl_generate"], ["--seeds", "one"], ["--config", "nowhere.yaml"]]
)
def test_what_cannot_be_run_is_refused(words: list[str], capsys):
    with pytest.raises(SystemExit):
        whole_run.parse(words)
    assert words[0] in capsys.readouterr().err
