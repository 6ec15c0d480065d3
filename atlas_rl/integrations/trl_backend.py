"""Log-probs for the trainer: Atlas in the place that TRL keeps for vLLM.

`model.generate` returns tokens only. A TRL trainer that has a vLLM mode takes tokens and log-probs from an object with two
methods, `trainer.vllm_generation`, whenever `trainer.use_vllm` is set. vLLM itself is only needed where the trainer builds that
object.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from atlas_rl.types import Rollout


class LogprobBackend:
    """Stands in for a trainer's `vllm_generation`, until `restore` gives the trainer its own attributes back."""

    def __init__(self, trainer: Trainer, complete: Callable[[list[list[int]]], list[Rollout]]) -> None:
        self.trainer = trainer
        self.complete = complete
        """One rollout per prompt, sampled as the trainer's generation config says."""
        self.ours = {"use_vllm": True, "vllm_generation": self, "vllm_mode": "atlas", "_last_loaded_step": -1}
        self.ours |= {"_last_vllm_sync_step": -1, "vllm_sync_frequency": 1}  # GOLD and IW-OPD count by these
        self.theirs = {name: value for name, value in vars(trainer).items() if name in self.ours}
        vars(trainer).update(self.ours)

    def restore(self) -> None:
        for name in self.ours:
            del vars(self.trainer)[name]
        vars(self.trainer).update(self.theirs)

    def sync_weights(self) -> None:
        """Nothing to send: the engine reads the trainer's own tensors, and renews its copies of them after every step."""

    def generate(
        self,
        prompts: list[list[int]],
        images: list[Any] | None,
        num_generations: int,
        profiler: contextlib.AbstractContextManager | None = None,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]:
        """Prompts, completions, and per token the log-probs and ids of its candidates: the sampled token alone.

        `prompts` already holds each prompt `num_generations` times.
        """
        if images is not None:
            raise ValueError(
                "Atlas reads text only: attach without logprobs, and prompts with images go to transformers"
            )
        with profiler or contextlib.nullcontext():
            rollouts = self.complete(prompts)
        completions = [r.token_ids for r in rollouts]
        logprobs = [[[logprob] for logprob in r.logprobs] for r in rollouts]
        return prompts, completions, logprobs, [[[token] for token in ids] for ids in completions]


def takes_logprobs(trainer: Trainer) -> bool:
    """Whether a trainer reads `self.vllm_generation` anywhere."""
    functions = [f for cls in type(trainer).__mro__ for f in vars(cls).values() if inspect.isfunction(f)]
    return any("vllm_generation" in inspect.unwrap(f).__code__.co_names for f in functions)
