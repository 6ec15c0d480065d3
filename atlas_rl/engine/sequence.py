"""What the engine knows of one completion, and of the completions that share a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from atlas_rl.types import Rollout, RolloutRequest


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion in the making.

    Token ranges: KV of [0, num_computed) is in `block_table`; [num_computed, num_tokens) still has to pass through the
    model. While the sequence decodes exactly one token, the last one, is uncomputed.
    """

    request: RolloutRequest
    row_id: int
    """Unique in this process; what drafters, which outlive an engine, know the sequence by."""
    index: int
    """Place in the caller's order."""
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    finish_reason: str | None = None
    noise_seed: int | None = None
    """The request's seed; None under greedy decoding, which draws no noise."""
    seen_V: torch.Tensor | None = None
    """Tokens of prompt and completion as a mask; kept only under a repetition penalty."""

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.request.prompt_ids

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def max_tokens(self) -> int:
        """Of prompt and completion."""
        return len(self.request.prompt_ids) + self.request.max_new_tokens

    @property
    def last_token(self) -> int:
        return self.output_ids[-1] if self.output_ids else self.request.prompt_ids[-1]

    @property
    def num_remaining(self) -> int:
        """Tokens that may still be emitted."""
        return self.request.max_new_tokens - len(self.output_ids)

    def append(self, token_ids: list[int], logprobs: list[float], stopping_ids: frozenset[int]) -> int:
        """Take emitted tokens up to the first one that ends the completion; returns how many were taken."""
        taken = 0
        for token in token_ids:
            taken += 1
            if token in stopping_ids:
                self.finish_reason = "stop"
                break
            if taken == self.num_remaining:
                self.finish_reason = "length"
                break
        self.output_ids += token_ids[:taken]
        self.logprobs += logprobs[:taken]
        self.num_computed += taken
        if self.seen_V is not None:
            self.seen_V[token_ids[:taken]] = True
        return taken

    def append_one(self, token: int, logprob: float, stopping_ids: frozenset[int]) -> None:
        """Take one emitted token."""
        self.output_ids.append(token)
        self.logprobs.append(logprob)
        self.num_computed += 1
        if token in stopping_ids:
            self.finish_reason = "stop"
        elif len(self.output_ids) == self.request.max_new_tokens:
            self.finish_reason = "length"
        if self.seen_V is not None:
            self.seen_V[token] = True

    def to_rollout(self) -> Rollout:
        assert self.finish_reason is not None
        return Rollout(
            prompt_ids=list(self.prompt_ids),
            token_ids=self.output_ids,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
        )


@dataclass(slots=True, eq=False)
class PromptGroup:
    """Sequences that wait for the KV of one common prefix: the samples of a prompt, or one preempted sequence.

    The prefix is everything but the last token, which each sequence decodes itself: that is how the prompt is prefilled once
    and every sample still gets logits of its own row.
    """

    sequences: list[Sequence]
    prefix_ids: list[int]
    block_table: list[int] = field(default_factory=list)
    """Blocks of the prefix, owned by the group until `fork` hands them to the sequences."""
    num_computed: int = 0

    @classmethod
    def of(cls, sequences: list[Sequence]) -> PromptGroup:
        first = sequences[0]
        assert all(s.prompt_ids == first.prompt_ids and s.output_ids == first.output_ids for s in sequences[1:])
        return cls(sequences, [*first.prompt_ids, *first.output_ids][:-1])

    def token_after(self, num_tokens: int) -> int:
        """The token that follows so many of the prefix."""
        return self.prefix_ids[num_tokens] if num_tokens < len(self.prefix_ids) else self.sequences[0].last_token

    @property
    def is_prefilled(self) -> bool:
        return self.num_computed == len(self.prefix_ids)
