"""What reporters are told of the rollouts is what rollouts.jsonl holds; wandb, TensorBoard and trackio keep all of it."""

from __future__ import annotations

import json
import math
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import reporters
from command_line_run import command, environment, prepare
from recipes import make_trainer
from transformers import TrainerCallback

STEPS = 5
"""Logged after 2 and 4 of them, evaluated after 4."""


class Listener(TrainerCallback):
    """A reporter: keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.told.append((state.global_step, dict(logs)))


def run(tiny_policy: Path, output_dir: Path, atlas, **options: Any) -> list[tuple[int, dict[str, float]]]:
    """Our figures, as they were told: (step, figures)."""
    listener = Listener()
    trainer = make_trainer(
        "GRPOTrainer",
        tiny_policy,
        output_dir,
        [atlas, listener],
        max_steps=STEPS,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        max_completion_length=48,
        **options,
    )
    trainer.train()
    if hasattr(trainer, "end"):
        trainer.end()
    ours = [(step, {n: v for n, v in logs.items() if "rollout/" in n}) for step, logs in listener.told]
    return [(step, figures) for step, figures in ours if figures]


def expected(rows: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """The figures of some rollouts, from their rows alone."""
    seconds: Counter[str] = sum((Counter(row["seconds"]) for row in rows), Counter())
    tokens = sum(row["completion_tokens"] for row in rows)
    plain = sum(row["completion_tokens"] / row["plain_tokens_per_s_estimate"] for row in rows)
    arms: Counter[str] = sum((Counter(row["arms"]) for row in rows), Counter())
    figures = {
        "tokens_per_s": tokens / seconds["total"],
        "tokens_per_decode_step": tokens / sum(row["row_steps"] for row in rows),
        "speedup_estimate": plain / seconds["total"],
        "seconds": seconds["total"],
        "kv_peak_bytes": max(row["kv_peak_bytes"] for row in rows),
    }
    for name in {name for row in rows for name in row["seconds"]} - {"total"}:
        figures[f"seconds_{name}"] = seconds[name]
    for name, steps in arms.items():
        figures[f"arm_{name.replace('+', '_and_')}"] = steps / arms.total()
    for name in {name for row in rows for name in row.get("drafters", {})}:
        counts = [row["drafters"][name] for row in rows if name in row.get("drafters", {})]
        if proposed := sum(count["proposed"] for count in counts):
            figures[f"{name}_acceptance"] = sum(count["accepted"] for count in counts) / proposed
    retrains = [row["retrain"] for row in rows if "retrain" in row]
    for name in ("updates", "steps", "seconds", "kept") if retrains else ():
        figures[f"retrain_{name}"] = sum(retrain[name] for retrain in retrains)
    for name in ("acceptance_before", "acceptance_after") if retrains else ():
        figures[f"retrain_{name}"] = retrains[-1][name]
    for name, value in rows[-1].get("draft_vocabulary", {}).items():
        figures[f"draft_vocabulary_{name}"] = value
    return {prefix + name: value for name, value in figures.items()}


def test_a_reporter_is_told_the_sums_of_rollouts_jsonl(tiny_policy, tmp_path, atlas):
    told = run(tiny_policy, tmp_path, atlas)
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    calls = [row for row in rows if row["kind"] == "rollout"]
    seconds = {row["step"]: row["step_seconds"] for row in rows if row["kind"] == "step"}
    train = [(step, figures) for step, figures in told if "rollout/seconds" in figures]
    assert [step for step, _ in train][:2] == [2, 4]
    for step, figures in train[:2]:
        mine = [row for row in calls if row["phase"] == "train" and step - 2 <= row["step"] < step]
        wanted = expected(mine, "rollout/") | {"rollout/step_seconds": seconds[step - 1] + seconds[step]}
        assert figures == pytest.approx(wanted, rel=1e-4, abs=1e-5), step
    (evaluated,) = (figures for step, figures in told if step == 4 and "eval_rollout/seconds" in figures)
    mine = [row for row in calls if row["phase"] == "eval" and row["step"] == 4]
    assert evaluated == pytest.approx(expected(mine, "eval_rollout/"), rel=1e-4, abs=1e-5)
    assert any("rollout/retrain_kept" in figures for _, figures in told), "retraining is among them"
    values = {name: value for _, figures in told for name, value in figures.items()}
    assert not [n for n, v in values.items() if not isinstance(v, (int, float)) or not math.isfinite(v)]


def test_reporters_keep_every_figure(tiny_policy, tmp_path):
    """All three at once, from the command line; what the trainer logged stands in its checkpoint."""
    for name in ("tensorboard", "wandb", "trackio"):
        pytest.importorskip(name, reason=f"{name} is not installed: what it keeps cannot be read back")
    fields = {"report_to": ["tensorboard", "wandb", "trackio"], "project": "figures", "save_strategy": "steps"}
    prepare(tmp_path, tiny_policy, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=4, **fields)
    folders = {"WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "tracked")}
    env = environment(WANDB_MODE="offline", HF_HUB_OFFLINE="1", **folders)
    done = subprocess.run(command("--save_steps", "4"), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = {
        "tensorboard": reporters.from_tensorboard(tmp_path / "out"),
        "wandb": reporters.from_wandb(tmp_path),
        "trackio": reporters.from_trackio(tmp_path / "tracked", "figures"),
    }
    state = json.loads((tmp_path / "out/checkpoint-4/trainer_state.json").read_text())
    told = [(logs["step"], n, value) for logs in state["log_history"] for n, value in logs.items() if "rollout/" in n]
    assert len(told) > 40
    for step, name, value in told:
        tag = "eval/" + name.removeprefix("eval_") if name.startswith("eval_") else "train/" + name
        for reporter, series in kept.items():
            assert series[tag][step] == pytest.approx(value, rel=1e-6), (reporter, tag, step)
