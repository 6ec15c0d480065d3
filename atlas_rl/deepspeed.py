"""Atlas as the rollout engine of a DeepSpeed RL loop without TRL (`deepspeed.runtime.rollout.RolloutEngine`).

    rollout = AtlasRollout(engine, tokenizer)                  # engine: of deepspeed.initialize, any ZeRO stage
    batch = rollout.generate(RolloutRequest(prompt_ids, prompt_attention_mask), SamplingConfig(max_new_tokens=256))
    ...                                                        # loss, engine.backward(loss), engine.step()
    rollout.sync_weights(step)

It answers as `HybridEngineRollout` does. All ranks call `generate` equally often; a rank may have no prompts.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from atlas_rl.attachment import Attachment
from atlas_rl.config import AtlasConfig
from atlas_rl.engine.twin import UnsupportedModel
from atlas_rl.integrations.hf_generate import Unsupported, sampling_params, token_ids, unpadded
from atlas_rl.integrations.trl import unwrap
from atlas_rl.telemetry.stats import RolloutStats
from atlas_rl.together import agree
from atlas_rl.types import Rollout, SamplingParams

try:
    from deepspeed.runtime.rollout import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig
except ImportError as error:
    raise ImportError(
        "atlas_rl.deepspeed needs deepspeed>=0.19.3, which has deepspeed.runtime.rollout: "
        f"pip install 'atlas-rl[deepspeed]' ({error})"
    ) from error


@dataclass(slots=True, kw_only=True)
class LoopArguments:
    """What Atlas reads of a trainer's arguments, for a loop that has none."""

    seed: int
    output_dir: str
    resume_from_checkpoint: None = None


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

    Options that `SamplingConfig` does not have are the model's own (`generation_config`), as with DeepSpeed's engine.

    Args:
        engine: of `deepspeed.initialize`; its module is a transformers model (with or without adapters).
        tokenizer: its EOS ends a completion, as do the model's own; its padding (or EOS) fills the batch.
        config: of Atlas; the default needs no change.
        seed: of the completions, with the step, the number of the call within the step, and the row.
        max_steps: optimizer steps of the loop, from which Atlas tells what retraining can still bring.
        output_dir: where `rollouts.jsonl` goes; None: nowhere, unless `config.log_path` says so.
    Raises:
        ValueError: the module is no transformers model; neither padding nor EOS is known.
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
        self.engine, self.model = engine, unwrap(engine)
        eos_ids = token_ids(tokenizer.eos_token_id) + token_ids(self.model.generation_config.eos_token_id)
        self.eos_ids = list(dict.fromkeys(eos_ids))
        if tokenizer.pad_token_id is None and not self.eos_ids:
            raise ValueError("the tokenizer has neither pad_token_id nor eos_token_id: set one of them")
        self.pad_id = self.eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        arguments = LoopArguments(seed=seed, output_dir=str(output_dir or ""))
        self.attachment = Attachment(self.model, engine, arguments, config or AtlasConfig())
        self.attachment.follow(LoopState(engine, max_steps))
        self.has_begun = False

    @property
    def stats(self) -> RolloutStats:
        """Figures of this rank's last rollout."""
        return self.attachment.stats

    @torch.no_grad()
    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """`n_samples_per_prompt` completions of each prompt, prompt after prompt; a completion keeps its EOS.

        Args:
            request: `prompt_ids` and `prompt_attention_mask`, both [prompts, longest prompt], padded on the left.
            sampling: of DeepSpeed. `continuous_batch_size` is ignored: rows leave the batch as they finish anyway.
        Returns:
            `input_ids` and `attention_mask`, both [prompts x samples, longest prompt + longest completion], and
            `response_start_idx` [prompts x samples], where each completion starts.
        Raises:
            ValueError: a prompt is empty, too long or not padded on the left, or Atlas cannot do exactly what is asked for.
            RankFailed: another rank has failed.
        """
        attachment, policy = self.attachment, self.attachment.policy
        if not self.has_begun:
            attachment.begin_run(policy.resume_from)
            self.has_begun = True
        if not attachment.in_step:
            attachment.begin_step()
        attachment.is_first_of_step = True  # all ranks make this call, also the second one within a step
        call = attachment.begin_call()
        try:
            rows, params = agree(call.ranks, "planning a rollout", lambda: self._plan(request, sampling))
            if any(call.ranks.meet("taking over weights", policy.taken_step is None)):
                policy.taken_step = None
            with self._autocast():
                rollouts = attachment.generate(rows, params, call=call)
        except (Unsupported, UnsupportedModel) as reason:
            raise ValueError(
                f"Atlas cannot make these rollouts exactly: {reason}. HybridEngineRollout of DeepSpeed uses the model itself"
            ) from None
        return self._to_batch(request, rollouts, sampling.n_samples_per_prompt)

    def sync_weights(self, step: int) -> None:
        """Weights have changed: the next `generate` takes them over, on all ranks together. Logs the step that has ended.

        Args:
            step: ignored, as DeepSpeed's own count is followed.
        """
        self.attachment.policy.taken_step = None
        if self.attachment.in_step:
            self.attachment.end_step()

    def save(self, checkpoint: str | Path) -> None:
        """Write what the drafters have learned into a folder `atlas` of a checkpoint; all ranks call this.

        After `engine.save_checkpoint(folder, tag)`, with `folder/tag` as `checkpoint`: where `atlas` is, every rank has written
        its part.
        """
        self.attachment.save(Path(checkpoint))

    def resume(self, checkpoint: str | Path) -> None:
        """Go on from what `save` wrote into this `checkpoint`, after `engine.load_checkpoint`; all ranks call this."""
        policy = self.attachment.policy
        policy.free()  # what this process has learned itself is not what the checkpoint's run had
        policy.adaptation, policy.resume_from = None, Path(checkpoint)
        self.attachment.met_step = None
        self.attachment.calls.clear()

    def shutdown(self) -> None:
        """Give the model its own `generate` back, and all memory."""
        if self.attachment.hook.serve is not None:
            self.attachment.free()
            self.attachment.close()

    def _plan(self, request: RolloutRequest, sampling: SamplingConfig) -> tuple[list[tuple[int, ...]], SamplingParams]:
        copies = sampling.n_samples_per_prompt
        if copies < 1:
            raise ValueError(f"n_samples_per_prompt must be at least 1, got {copies}")
        options = {"max_new_tokens": sampling.max_new_tokens, "eos_token_id": self.eos_ids or None, "do_sample": False}
        if sampling.temperature > 0:
            options |= {"do_sample": True, "temperature": sampling.temperature}
            options |= {"top_p": sampling.top_p, "top_k": max(0, sampling.top_k)}
        prompts = unpadded(request.prompt_ids, request.prompt_attention_mask, None, ())
        params = sampling_params(self.model, GenerationConfig(**options))
        return [prompt for prompt in prompts for _ in range(copies)], params

    def _autocast(self) -> contextlib.AbstractContextManager:
        if not self.engine.torch_autocast_enabled():
            return contextlib.nullcontext()
        return torch.autocast(self.engine.device.type, dtype=self.engine.torch_autocast_dtype())

    def _to_batch(self, request: RolloutRequest, rollouts: list[Rollout], copies: int) -> RolloutBatch:
        prompt_ids = request.prompt_ids.repeat_interleave(copies, dim=0)
        prompt_mask = request.prompt_attention_mask.repeat_interleave(copies, dim=0).long()
        longest = max((len(rollout.token_ids) for rollout in rollouts), default=0)
        padded = [r.token_ids + [self.pad_id] * (longest - len(r.token_ids)) for r in rollouts]
        response_ids = prompt_ids.new_tensor(padded).view(len(rollouts), longest)
        lengths = prompt_mask.new_tensor([len(rollout.token_ids) for rollout in rollouts])
        response_mask = (torch.arange(longest, device=lengths.device) < lengths[:, None]).long()
        return RolloutBatch(
            input_ids=torch.cat([prompt_ids, response_ids], dim=1),
            attention_mask=torch.cat([prompt_mask, response_mask], dim=1),
            response_start_idx=torch.full_like(lengths, prompt_ids.shape[1]),
        )
