"""The workload whose policy moves: a GRPO run on the shipped tasks, recorded once and then repeated step by step by every arm.

A repeat is a step: its prompts and lengths, with the weights that made them. Drafters live on through the run and are retrained
in it, which is counted. The last recordings are kept, so that a second bench repeats the same run.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas_rl import __version__
from atlas_rl.bench.recorded_run import RecordedRun, record_run
from atlas_rl.bench.workload import Batch, WorkloadConfig

FOLDER = Path("~/.cache/atlas_rl/recorded-runs")
KEPT = 2
"""Recordings, those used last: each holds the policy once per step."""
FORMAT = 1
"""To be raised where a recording made before would not be what is recorded now."""
DAY = 24 * 3600


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
    with suppress(FileNotFoundError):
        os.utime(path)
        return torch.load(path, weights_only=False)
    dataset = build_dataset(seed=options.get("seed", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's and transformers', about options of theirs
        run = record_run(policy_folder, dataset, reasoning_gym_reward, progress=_Reporting(report), **options)
    try:
        _save(run, path)
        _tidy(path.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's, where the disk is full
        warnings.warn(f"the recorded run is not kept for the next bench: {error}", stacklevel=2)
    return run


def _save(run: RecordedRun, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        torch.save(run, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _tidy(folder: Path) -> None:
    """Other benches may do so at the same time, or be about to finish a file."""
    left_over = [path for path in folder.glob("*.[0-9]*") if _last_used(path) < time.time() - DAY]
    for path in (*sorted(folder.glob("*.pt"), key=_last_used)[:-KEPT], *left_over):
        path.unlink(missing_ok=True)


def _last_used(path: Path) -> float:
    """Zero where it has been removed."""
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _key(options: dict[str, Any], policy_folder: str) -> str:
    """Of all that the recording depends on; the time that training takes is part of it."""
    words = [__version__, FORMAT, torch.get_num_threads(), options]
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
