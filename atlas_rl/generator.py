"""AtlasRolloutGenerator: the drop-in."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback

from atlas_rl.attachment import Attachment
from atlas_rl.config import AtlasConfig
from atlas_rl.integrations.hf_generate import token_ids
from atlas_rl.integrations.trl import CheckpointingFlags, unwrap
from atlas_rl.telemetry.stats import RolloutStats
from atlas_rl.types import Rollout, SamplingParams


class AtlasRolloutGenerator(TrainerCallback):
    """Makes `model.generate` fast, and exact for the policy's current weights.

    As a trainer's callback it is the whole integration:

        trainer = GRPOTrainer(..., callbacks=[AtlasRolloutGenerator()])

    On a bare model:

        with AtlasRolloutGenerator().attach(model) as atlas:
            model.generate(input_ids, max_new_tokens=256, do_sample=True)
            atlas.generate([[1, 2, 3]], SamplingParams(temperature=0.8), num_samples=8)

    Completions are reproducible: each has a seed made of the base seed (the trainer's, or torch's for a bare model), the phase,
    the step, the number of the call within the step, and the row. The tokens do not depend on the drafter, or on whether there is
    one. Whatever Atlas cannot do exactly (beams, custom processors, …) goes to the original `generate`; the log says why, once.
    """

    def __init__(self, config: AtlasConfig | None = None) -> None:
        self.config = config or AtlasConfig()
        self.attachment: Attachment | None = None
        self.trainer: Trainer | None = None
        """The trainer whose callbacks `attach` joined; None for one that was given this callback."""
        self.last_stats = RolloutStats()

    def attach(self, target: Trainer | PreTrainedModel | torch.nn.Module) -> AtlasRolloutGenerator:
        """Serve `generate` of a model, or of a trainer's model; returns self. `detach` undoes it exactly."""
        if not isinstance(target, Trainer):
            self._attach(target, None)
            return self
        self._attach(target.model, target.args)
        self.attachment.state = target.state
        if not any(callback is self for callback in target.callback_handler.callbacks):
            target.add_callback(self)
            self.trainer = target
        return self

    def detach(self) -> None:
        """Give the model its own `generate` back, and `Trainer.log` its own body; forget what belongs to the model."""
        if self.attachment is not None:
            self.last_stats = self.attachment.stats
            self.attachment.close()
            self.attachment = None
        if self.trainer is not None:
            self.trainer.remove_callback(self)
            self.trainer = None

    def __enter__(self) -> AtlasRolloutGenerator:
        self._attached()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.detach()

    @property
    def stats(self) -> RolloutStats:
        """Figures of the last rollout, also of one that was interrupted."""
        return self.attachment.stats if self.attachment else self.last_stats

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams | None = None,
        num_samples: int = 1,
        seed: int | None = None,
    ) -> list[Rollout]:
        """`num_samples` completions of each prompt (lists of token ids), prompt-major.

        Where `sampling` names no EOS token, the model's own ends a completion.

        Raises:
            ValueError: no model is attached, or the engine cannot run it; a prompt is empty, too long, or holds a token unknown
                to the model; KV memory cannot hold one sequence.
            FloatingPointError: the policy's logits are not finite.
        """
        attachment = self._attached()
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        sampling = sampling or SamplingParams()
        if not sampling.eos_token_ids:
            sampling = replace(sampling, eos_token_ids=token_ids(attachment.model.generation_config.eos_token_id))
        rows = [tuple(map(int, prompt)) for prompt in prompts for _ in range(num_samples)]
        return attachment.generate(rows, sampling, seed, attachment.ready_engine())

    def pop_metrics(self, phase: str) -> dict[str, float]:
        """Figures of a phase (`train`, `eval`) since the last call; `Trainer.log` merges them into its own."""
        return self.attachment.pop_metrics(phase) if self.attachment else {}

    def _attached(self) -> Attachment:
        if self.attachment is None:
            raise ValueError("no model is attached: call attach(model) first")
        return self.attachment

    def _attach(self, model: torch.nn.Module, args: Any | None) -> None:
        base = unwrap(model)
        if self.attachment is not None and self.attachment.model is base and self.attachment.hook.is_installed:
            self.attachment.args = args or self.attachment.args
            return
        self.detach()
        self.attachment = Attachment(base, args, self.config)

    # ---- trainer events --------------------------------------------------------------------------------------------------

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        self._attach(model, args)
        self.attachment.state = state

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._attach(model, args)
        self.attachment.state = state
        self.attachment.open_log()

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.attachment.checkpointing = CheckpointingFlags(self.attachment.model)
        self.attachment.step_start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.attachment.end_step()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.attachment.free()
