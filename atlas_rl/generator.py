"""AtlasRolloutGenerator: the drop-in."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback

from atlas_rl.attachment import Attachment, last_checkpoint
from atlas_rl.checkpoints import check_saving, warn_of_saving
from atlas_rl.config import AtlasConfig
from atlas_rl.engine.twin import UnsupportedModel
from atlas_rl.integrations.hf_generate import Unsupported, sampling_params, token_ids
from atlas_rl.integrations.trl import bypass, unwrap
from atlas_rl.integrations.trl_backend import LogprobBackend, takes_logprobs
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

    Args:
        config: of Atlas; the default needs no change.
    """

    def __init__(self, config: AtlasConfig | None = None) -> None:
        self.config = config or AtlasConfig()
        self.attachment: Attachment | None = None
        self.trainer: Trainer | None = None
        """The trainer whose callbacks `attach` joined; None for one that was given this callback."""
        self.backend: LogprobBackend | None = None
        """What hands log-probs to the trainer, if it was asked for."""
        self.last_stats = RolloutStats()

    def attach(
        self, target: Trainer | PreTrainedModel | torch.nn.Module, *, logprobs: bool = False
    ) -> AtlasRolloutGenerator:
        """Serve `generate` of a model, or of a trainer's model; returns self. `detach` undoes it exactly.

        With `logprobs`, a TRL trainer gets the log-prob of every sampled token along with it, in the way it would get them from
        vLLM: it then logs how far they are from its own, and weighs the loss by the ratio (which is 1, as Atlas samples from the
        weights that are trained, and costs the trainer one more forward).

        Raises:
            ValueError: `target` is neither a trainer nor a transformers model; `logprobs` for one that cannot take them.
        """
        if logprobs:
            _check_logprobs(target)
        if not isinstance(target, Trainer):
            self._attach(target, None)
            return self
        self._attach(target.model, target.args).follow(target.state)
        if not any(callback is self for callback in target.callback_handler.callbacks):
            target.add_callback(self)
            self.trainer = target
        self._restore_backend()
        if logprobs:
            self.backend = LogprobBackend(target, partial(self._complete, target))
        return self

    def detach(self) -> None:
        """Give the model its own `generate` back, and `Trainer.log` its own body; forget what belongs to the model."""
        self._restore_backend()
        self._close_attachment()
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
        """Figures of the last rollout, also of an interrupted one; `stats.to_dict()` is what a row of `rollouts.jsonl` has."""
        return self.attachment.stats if self.attachment else self.last_stats

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams | None = None,
        num_samples: int = 1,
        seed: int | None = None,
    ) -> list[Rollout]:
        """`num_samples` completions of each prompt: `len(prompts) * num_samples` rollouts, prompt after prompt.

        Args:
            prompts: lists of token ids, without padding; none is empty, lengths may differ.
            sampling: the default samples at temperature 1. Where it names no EOS token, the model's own ends a completion.
            num_samples: completions per prompt, each with a seed of its own.
            seed: the same seed gives the same completions. None: torch's seed (or the trainer's) and the number of the call.
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
        return attachment.generate(rows, sampling, seed)

    def rollout_func(self, prompts: list[Any], trainer: Trainer) -> dict[str, Any]:
        """For `GRPOTrainer(..., rollout_func=atlas.rollout_func, callbacks=[atlas])`: the same completions as without it, and
        their log-probs.

        Args:
            prompts: texts or lists of messages, one for each completion (TRL has repeated them); they become tokens as in TRL.
            trainer: the one that calls; Atlas is attached to it if it is not yet.
        Returns:
            `prompt_ids` and `completion_ids` (a list of token ids per completion) and `logprobs` (a float for each token; None
            for a trainer with tools).
        Raises:
            ValueError: the prompts hold images, or Atlas cannot do exactly what the trainer's options ask for.
        """
        if self.attachment is None or self.attachment.model is not unwrap(trainer.model):
            self.attach(trainer)
        prompt_ids, images, _ = trainer._tokenize_prompts(prompts)
        if images is not None:
            raise ValueError("Atlas reads text only: without rollout_func, prompts with images go to transformers")
        rollouts = self._complete(trainer, prompt_ids)
        # later turns with tools are generated without it: unless they have log-probs too, TRL wants none at all
        has_logprobs = trainer.use_vllm or not trainer.tools
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [r.token_ids for r in rollouts],
            "logprobs": [r.logprobs for r in rollouts] if has_logprobs else None,
        }

    def pop_metrics(self, phase: str) -> dict[str, float]:
        """Figures of a phase (`train`, `eval`) since the last call; `Trainer.log` merges them into its own."""
        return self.attachment.pop_metrics(phase) if self.attachment else {}

    def record_metrics(self, phase: str, metrics: dict[str, Any]) -> None:
        """Write the finite numbers of what the trainer logs in a phase (`metrics`) into `rollouts.jsonl`, so that a report needs
        nothing but that; `Trainer.log` calls this."""
        if self.attachment:
            self.attachment.record_metrics(phase, metrics)

    def _attached(self) -> Attachment:
        if self.attachment is None:
            raise ValueError("no model is attached: call attach(model) first")
        return self.attachment

    def _attach(self, model: torch.nn.Module, args: Any | None) -> Attachment:
        base = unwrap(model)
        if self.attachment is not None and self.attachment.model is base:
            if self.attachment.hook.is_installed:
                self.attachment.args = args or self.attachment.args
                return self.attachment
            self._close_attachment()  # something has put its own `generate` on top: go on top of that
        else:
            self.detach()
        self.attachment = Attachment(base, model, args, self.config)
        return self.attachment

    def _close_attachment(self) -> None:
        if self.attachment is not None:
            self.last_stats = self.attachment.stats
            self.attachment.close()
            self.attachment = None

    def _restore_backend(self) -> None:
        if self.backend is not None:
            self.backend.restore()
            self.backend = None

    def _complete(self, trainer: Trainer, prompts: list[list[int]]) -> list[Rollout]:
        """One completion for each prompt, sampled as the trainer would have `model.generate` sample it."""
        attachment = self._attached()
        try:
            sampling = sampling_params(attachment.model, trainer.generation_config)
            return attachment.generate([tuple(prompt) for prompt in prompts], sampling)
        except (Unsupported, UnsupportedModel) as reason:
            raise ValueError(
                f"Atlas cannot make these rollouts exactly: {reason}. Attach without logprobs, and leave rollout_func out: "
                "then they go to transformers"
            ) from None

    # ---- trainer events --------------------------------------------------------------------------------------------------

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        self._attach(model, args).follow(state)

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._attach(model, args).follow(state)
        check_saving(args, self.config.deterministic, state.save_steps)
        if state.is_world_process_zero:
            warn_of_saving(args)
        self._attached().begin_run(last_checkpoint(args, state.global_step) if state.global_step else None)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._attached().begin_step()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._attached().is_first_of_step = False  # whatever generates now is not the trainer

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._attached().end_step()
        self._before_save(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        self._before_save(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        if args.save_strategy == "best":  # the trainer decides later, and tells nobody
            self._attached().before_save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _before_save(self, args, state, control) -> None:
        if control.should_save:
            self._attached().before_save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_save(self, args, state, control, **kwargs) -> None:
        self._attached().save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._attached().free()


def _check_logprobs(target: Any) -> None:
    if not isinstance(target, Trainer):
        raise ValueError("logprobs=True is for trainers: attach(trainer, logprobs=True)")
    if not takes_logprobs(target):
        name = type(target).__name__
        raise ValueError(f"{name} has no use for the log-probs of its rollouts: attach(trainer) without logprobs")
    if option := bypass(target.args):
        raise ValueError(f"{option} sends the rollouts past Atlas: set it to False")
