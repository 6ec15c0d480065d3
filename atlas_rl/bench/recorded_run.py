"""A GRPO run, recorded: the policy and the rollouts of every step, so that ways of drafting can be compared on the same ones."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from atlas_rl.attachment import PHASES, mix_seed
from atlas_rl.cli.progress import PlainLines
from atlas_rl.config import AtlasConfig
from atlas_rl.generator import AtlasRolloutGenerator
from atlas_rl.integrations.hf_generate import sampling_params
from atlas_rl.types import RolloutRequest, SamplingParams

FORCED_SHARE = 0.5
SHORTEST = 64
"""Characters: what is shorter is paid less, or else the policy would soon say nothing at all."""


@dataclass(slots=True, kw_only=True)
class RecordedStep:
    weights: dict[str, torch.Tensor]
    """Of the policy that made the rollouts."""
    requests: list[RolloutRequest]
    completions: list[list[int]]
    seconds: float = 0.0
    """From this step's rollouts to the next one's: rollouts, log-probs, the optimizer's step."""
    rollout_seconds: float = 0.0
    """Of these, the rollouts'."""


@dataclass(slots=True, kw_only=True)
class RecordedRun:
    sampling: SamplingParams
    steps: list[RecordedStep] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The different ones."""
        return list(dict.fromkeys(request.prompt_ids for step in self.steps for request in step.requests))


def record_run(
    policy: str | PreTrainedModel,
    dataset: Any,
    reward: Callable[..., list[float]],
    atlas: AtlasConfig | None = None,
    progress: TrainerCallback | None = None,
    **options: Any,
) -> RecordedRun:
    """Train with TRL, rollouts by Atlas, one rollout per optimizer step; `options` are GRPOConfig's.

    Args:
        progress: in place of the trainer's progress bar.
    """
    with tempfile.TemporaryDirectory() as scratch:
        arguments = GRPOConfig(**{"output_dir": scratch, "report_to": "none", "save_strategy": "no"} | options)
        recorder = _Recorder(AtlasRolloutGenerator(atlas))
        trainer = GRPOTrainer(
            model=policy,
            reward_funcs=reward,
            args=arguments,
            train_dataset=dataset,
            rollout_func=recorder,
            callbacks=[recorder.atlas],
        )
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(progress or PlainLines)
        try:
            trainer.train()
        finally:
            recorder.atlas.detach()
    recorder.end_step()
    recorder.run.rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    return recorder.run


class _Recorder:
    """A trainer's `rollout_func` that keeps what went in and what came out."""

    def __init__(self, atlas: AtlasRolloutGenerator) -> None:
        self.atlas = atlas
        self.run: RecordedRun | None = None
        self.step_start = 0.0

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        self.end_step()
        weights = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
        self.step_start = time.perf_counter()
        made = self.atlas.rollout_func(prompts, trainer)
        if self.run is None:
            self.run = RecordedRun(sampling=sampling_params(trainer.model, trainer.generation_config))
        words = (trainer.args.seed, PHASES.index("train"), trainer.state.global_step, 0)
        requests = [
            RolloutRequest(
                prompt_ids=tuple(ids), seed=mix_seed(*words, i), max_new_tokens=trainer.args.max_completion_length
            )
            for i, ids in enumerate(made["prompt_ids"])
        ]
        self.run.steps.append(
            RecordedStep(
                weights=weights,
                requests=requests,
                completions=made["completion_ids"],
                rollout_seconds=time.perf_counter() - self.step_start,
            )
        )
        return made | {"logprobs": None}  # it samples from the weights that are trained: there is no ratio to weigh by

    def end_step(self) -> None:
        if self.run is not None:
            self.run.steps[-1].seconds = time.perf_counter() - self.step_start


def forced_reward(completions: list[str], **columns: Any) -> list[float]:
    """Moves any policy of text far away: half of the characters are to be punctuation."""
    return [-abs(_punctuation(t) - FORCED_SHARE) - max(0.0, 1 - len(t) / SHORTEST) for t in completions]


def _punctuation(text: str) -> float:
    return sum(not (c.isalnum() or c.isspace()) for c in text) / max(1, len(text))
