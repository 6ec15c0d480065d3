"""The workload whose policy moves: a GRPO run on the shipped tasks, recorded once and then repeated step by step by every arm.

A repeat is a step: its prompts and lengths, with the weights that made them. Drafters live on through the run and are retrained
in it, which is counted. The last recordings are kept, so that a second bench repeats the same run.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas_rl import __version__
from atlas_rl.bench.recorded_run import RecordedRun, record_run
from atlas_rl.bench.workload import Batch, WorkloadConfig

FOLDER = Path("~/.cache/atlas_rl/recorded-runs")
KEPT = 2
"""Recordings: each holds the policy once per step."""


def moving_batches(config: WorkloadConfig, policy_folder: str, report: Callable[[str], None]) -> list[Batch]:
    """One per optimizer step."""
    run = recording(config, policy_folder, report)
    trained = [0.0, *(step.seconds - step.rollout_seconds for step in run.steps)]
    return [
        Batch(
            prompts=[request.prompt_ids for request in step.requests],
            seeds=[request.seed for request in step.requests],
            lens=[len(completion) for completion in step.completions],
            own=run.sampling,
            weights=step.weights,
            training_seconds=seconds,
        )
        for step, seconds in zip(run.steps, trained)
    ]


def recording(config: WorkloadConfig, policy_folder: str, report: Callable[[str], None]) -> RecordedRun:
    """The run, made now if it has not been made before."""
    from atlas_rl.tasks import build_dataset, reasoning_gym_reward

    options: dict[str, Any] = config.training | {
        "per_device_train_batch_size": config.num_prompts * config.num_samples,
        "num_generations": config.num_samples,
    }
    path = FOLDER.expanduser() / f"{_key(options, policy_folder)}.pt"
    if path.exists():
        return torch.load(path, weights_only=False)
    dataset = build_dataset(seed=options.get("seed", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's and transformers', about options of theirs
        run = record_run(policy_folder, dataset, reasoning_gym_reward, progress=_Reporting(report), **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    torch.save(run, unfinished)
    unfinished.replace(path)
    for older in sorted(path.parent.glob("*.pt"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
        older.unlink()
    return run


def _key(options: dict[str, Any], policy_folder: str) -> str:
    """Of all that the recording depends on; the time that training takes is part of it."""
    words = [__version__, torch.get_num_threads(), options]
    key = hashlib.sha256(json.dumps(words, sort_keys=True).encode())
    for path in sorted(Path(policy_folder).rglob("*.safetensors")):
        key.update(path.read_bytes())
    return key.hexdigest()[:16]


class _Reporting(TrainerCallback):
    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.report(f"recording a GRPO run: step {state.global_step + 1} of {state.max_steps}")
