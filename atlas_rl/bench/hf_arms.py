"""Peers that run in this process: transformers' ways of generating."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.utils import WorkloadHints

from atlas_rl.bench.arms import Arm
from atlas_rl.bench.workload import Batch, Workload


class ForcedLength(LogitsProcessor):
    """Forbids EOS before a row's length is reached and forces it there."""

    def __init__(self, lens: list[int], prompt_width: int, eos_id: int) -> None:
        self.ends = torch.tensor(lens) + prompt_width
        self.eos_id = eos_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.ends = self.ends.to(input_ids.device)
        ends_now = self.ends == input_ids.shape[1] + 1
        scores[:, self.eos_id] = -torch.inf
        scores[ends_now] = -torch.inf
        scores[ends_now, self.eos_id] = 0.0
        return scores


FULL_DISTRIBUTION = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}


class HFGenerate(Arm):
    """transformers' `generate`: what TRL runs by default. Left-padded, until the longest row ends."""

    options: Mapping[str, Any] = MappingProxyType({})

    def figures(self) -> dict[str, Any]:
        return {"tokens_per_decode_step": 1.0, "peak_bytes": self.num_places * self.bytes_per_token()}

    def run(self, batch: Batch) -> list[int]:
        width = max(map(len, batch.prompts))
        device = self.policy.device
        input_ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in batch.prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch.prompts], device=device)
        torch.manual_seed(batch.seeds[0])
        options = FULL_DISTRIBUTION | {"max_new_tokens": max(batch.lens)} | self.options
        self.num_places = len(batch.lens) * (width + max(batch.lens))
        if len(set(batch.lens)) == 1:
            options |= {"min_new_tokens": options["max_new_tokens"], "pad_token_id": 0}
        else:
            eos_id = self.policy.config.vocab_size - 1
            forced = ForcedLength(batch.lens, width, eos_id)
            options |= {
                "logits_processor": LogitsProcessorList([forced]),
                "eos_token_id": eos_id,
                "pad_token_id": eos_id,
            }
        output = self.policy.generate(input_ids, attention_mask=mask, **options)
        completions = output[:, width:]
        if len(set(batch.lens)) == 1:
            return [completions.shape[1]] * len(completions)
        return ((completions != options["eos_token_id"]).sum(1) + 1).tolist()


class HFPromptLookup(HFGenerate):
    """`generate` with drafts looked up in the sequence itself: the speculation of transformers that needs no second model."""

    options = MappingProxyType({"prompt_lookup_num_tokens": 5})
    """As its documentation of assisted decoding has it."""

    def cannot(self, workload: Workload) -> str | None:
        alone = len(workload.batch(0).lens) == 1
        if not alone:
            return "transformers' prompt lookup takes one sequence at a time"
        return (
            None if workload.batch(0).own is None else "transformers' prompt lookup is measured at given lengths only"
        )

    def run(self, batch: Batch) -> list[int]:
        self.num_forwards = 0
        self.num_tokens = batch.num_tokens
        counter = self.policy.register_forward_pre_hook(self._count)
        try:
            return super().run(batch)
        finally:
            counter.remove()

    def _count(self, policy: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self.num_forwards += 1

    def figures(self) -> dict[str, Any]:
        return super().figures() | {"tokens_per_decode_step": self.num_tokens / self.num_forwards}


class HFContinuousBatching(Arm):
    """transformers' continuous batching, what TRL runs under `use_transformers_continuous_batching`.

    It is `generate_batch`, but for a length per request, which only the requests of its manager take. `num_blocks` holds the
    whole batch: left to itself, the library takes most of the free memory and spends seconds on it.
    """

    MAX_BATCH_TOKENS = 512
    """Of one forward. More saves prefill steps, but the attention mask grows with its square."""
    SAFETY_MARGIN = 0.15
    """The library's own share of blocks below which its scheduler admits nothing."""

    def run(self, batch: Batch) -> list[int]:
        with self.manager(batch) as manager:
            return self.make(manager, batch)

    def figures(self) -> dict[str, Any]:
        return {"tokens_per_decode_step": 1.0, "peak_bytes": self.num_places * self.bytes_per_token()}

    def manager(self, batch: Batch) -> AbstractContextManager[ContinuousBatchingManager]:
        """That takes requests like the batch's."""
        config = ContinuousBatchingConfig()
        config.auto_switch_to_flash = False  # older releases know no such thing
        page_size = getattr(config, "page_size", None) or config.block_size  # its name up to 5.17
        blocks = sum(-(-(len(p) + n) // page_size) for p, n in zip(batch.prompts, batch.lens, strict=True))
        config.num_blocks = math.ceil(blocks / (1 - self.SAFETY_MARGIN)) + 1
        self.num_places = config.num_blocks * page_size
        config.max_batch_tokens = max(self.MAX_BATCH_TOKENS, len(batch.lens))
        hints = WorkloadHints(
            max_prompt_length=max(map(len, batch.prompts)),
            max_generated_length=max(batch.lens),
            num_requests=len(batch.lens),
        )
        generation_config = GenerationConfig(**FULL_DISTRIBUTION, max_new_tokens=max(batch.lens), eos_token_id=-1)
        return self.policy.continuous_batching_context_manager(
            generation_config=generation_config, continuous_batching_config=config, workload_hints=hints
        )

    @staticmethod
    def make(manager: ContinuousBatchingManager, batch: Batch) -> list[int]:
        made = {}
        ids = [
            manager.add_request(list(prompt), max_new_tokens=length, eos_token_id=-1)
            for prompt, length in zip(batch.prompts, batch.lens, strict=True)
        ]
        while len(made) < len(ids):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped before all completions were made")
            if result is not None and result.is_finished():
                made[result.request_id] = len(result.generated_tokens)
        return [made[request_id] for request_id in ids]
