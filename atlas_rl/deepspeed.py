"""Atlas as the rollout engine of a DeepSpeed RL loop without TRL (`deepspeed.runtime.rollout.RolloutEngine`).

    rollout = AtlasRollout(engine, tokenizer)                  # engine: of deepspeed.initialize, any ZeRO stage
    batch = rollout.generate(RolloutRequest(prompt_ids, prompt_attention_mask), SamplingConfig(max_new_tokens=256))
    ...                                                        # loss, engine.backward(loss), engine.step()
    rollout.sync_weights(step)

All ranks call `generate` equally often, as with every rollout engine of DeepSpeed; a rank may have no prompts.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.rollout import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig
from transformers import PreTrainedTokenizerBase

from atlas_rl.attachment import Attachment
from atlas_rl.config import AtlasConfig
from atlas_rl.integrations.hf_generate import Unsupported, token_ids
from atlas_rl.integrations.trl import unwrap
from atlas_rl.telemetry.stats import RolloutStats
from atlas_rl.types import Rollout, SamplingParams


@dataclass(slots=True, kw_only=True)
class LoopArguments:
    """What Atlas reads of a trainer's arguments, for a loop that has none."""

    seed: int
    output_dir: str | None
    resume_from_checkpoint: str | None = None


@dataclass(slots=True)
class LoopState:
    """A trainer's state, as far as Atlas follows it: DeepSpeed's own count of optimizer steps."""

    engine: Any
    max_steps: int

    @property
    def global_step(self) -> int:
        return self.engine.global_steps


class AtlasRollout(RolloutEngine):
    """Rollouts of the policy that a DeepSpeed engine trains, by Atlas: exact, with drafters that are retrained at each update.

    Args:
        engine: of `deepspeed.initialize`; its module is a transformers model (with or without adapters).
        tokenizer: its EOS ends a completion, its padding fills the batch.
        config: of Atlas; the default needs no change.
        seed: of the completions, with the step and the row.
        max_steps: optimizer steps of the loop, from which Atlas tells what retraining can still bring.
        output_dir: where `rollouts.jsonl` goes; None: nowhere, unless `config.log_path` says so.
    Raises:
        ValueError: the module is no transformers model; the tokenizer has neither padding nor EOS.
    """

    name = "atlas"

    def __init__(
        self,
        engine: Any,
        tokenizer: PreTrainedTokenizerBase,
        config: AtlasConfig | None = None,
        *,
        seed: int = 0,
        max_steps: int = 1000,
        output_dir: str | Path | None = None,
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if self.pad_id is None:
            raise ValueError("the tokenizer has neither pad_token_id nor eos_token_id: set one of them")
        arguments = LoopArguments(seed=seed, output_dir=None if output_dir is None else str(output_dir))
        self.attachment = Attachment(unwrap(engine), engine, arguments, config or AtlasConfig())
        self.attachment.follow(LoopState(engine, max_steps))
        self.has_begun = False

    @property
    def stats(self) -> RolloutStats:
        """Figures of this rank's last rollout."""
        return self.attachment.stats

    @torch.no_grad()
    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """`n_samples_per_prompt` completions of each prompt, prompt after prompt; a completion keeps its EOS.

        `continuous_batch_size` is ignored: rows leave the batch as they finish anyway.

        Raises:
            ValueError: a prompt is empty or too long, or the policy is not one that Atlas can run exactly.
            RankFailed: another rank has failed.
        """
        if not self.has_begun:
            self.attachment.begin_run()
            self.has_begun = True
        self.attachment.begin_step()
        prompts, mask = request.prompt_ids, request.prompt_attention_mask.bool()
        copies = sampling.n_samples_per_prompt
        rows = [tuple(ids[kept].tolist()) for ids, kept in zip(prompts, mask) for _ in range(copies)]
        with self._autocast():
            try:
                rollouts = self.attachment.generate(rows, self._sampling_params(sampling))
            except Unsupported as reason:
                raise ValueError(f"Atlas cannot make these rollouts exactly: {reason}") from None
        return self._to_batch(request, rollouts, copies)

    def sync_weights(self, step: int) -> None:
        """After an optimizer step: logs its figures. The next `generate` takes over the weights, on all ranks together."""
        self.attachment.end_step()

    def save(self, checkpoint: str | Path) -> None:
        """Write what the drafters have learned into a checkpoint's folder, beside DeepSpeed's own; all ranks call this."""
        self.attachment.save(Path(checkpoint))

    def resume(self, checkpoint: str | Path) -> None:
        """Have the next `generate` take up what `save` wrote, after `engine.load_checkpoint`; all ranks call this."""
        self.attachment.policy.resume_from = Path(checkpoint)

    def shutdown(self) -> None:
        """Give the model its own `generate` back, and all memory."""
        self.attachment.free()
        self.attachment.close()

    def _autocast(self) -> contextlib.AbstractContextManager:
        if not self.engine.torch_autocast_enabled():
            return contextlib.nullcontext()
        return torch.autocast(self.engine.device.type, dtype=self.engine.torch_autocast_dtype())

    def _sampling_params(self, sampling: SamplingConfig) -> SamplingParams:
        return SamplingParams(
            temperature=max(0.0, sampling.temperature),
            top_p=sampling.top_p,
            top_k=max(0, sampling.top_k),
            max_new_tokens=sampling.max_new_tokens,
            eos_token_ids=token_ids(self.tokenizer.eos_token_id),
        )

    def _to_batch(self, request: RolloutRequest, rollouts: list[Rollout], copies: int) -> RolloutBatch:
        prompt_ids = request.prompt_ids.repeat_interleave(copies, dim=0)
        longest = max((len(rollout.token_ids) for rollout in rollouts), default=0)
        response_ids = prompt_ids.new_full((len(rollouts), longest), self.pad_id)
        response_mask = torch.zeros_like(response_ids)
        for i, rollout in enumerate(rollouts):
            response_ids[i, : len(rollout.token_ids)] = response_ids.new_tensor(rollout.token_ids)
            response_mask[i, : len(rollout.token_ids)] = 1
        prompt_mask = request.prompt_attention_mask.repeat_interleave(copies, dim=0).to(response_mask.dtype)
        return RolloutBatch(
            input_ids=torch.cat([prompt_ids, response_ids], dim=1),
            attention_mask=torch.cat([prompt_mask, response_mask], dim=1),
            response_start_idx=prompt_ids.new_full((len(rollouts),), prompt_ids.shape[1]),
        )
