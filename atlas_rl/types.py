"""What goes into a rollout and what comes out. Needs nothing but the standard library."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a completion is sampled. The filters run in transformers' order: penalty, temperature, top-k, top-p, min-p.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less probable than this fraction of the most probable one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive (multiplies negative) logits of tokens that the prompt or the completion holds; 1 is off."""
    max_new_tokens: int | tuple[int, ...] = 256
    """One length for all completions, or one per completion (prompt-major)."""
    min_new_tokens: int = 0
    """EOS and stop tokens cannot be drawn before this many tokens."""
    ignore_eos: bool = False
    """Treat EOS as an ordinary token; stop tokens still end a completion."""
    eos_token_ids: tuple[int, ...] = ()
    """Empty: `AtlasRolloutGenerator.generate` takes the model's own."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion besides EOS."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "eos_token_ids", "stop_token_ids"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        lengths = self.max_new_tokens if isinstance(self.max_new_tokens, tuple) else (self.max_new_tokens,)
        if not lengths or any(n < 1 for n in lengths):
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.min_new_tokens < 0:
            raise ValueError(f"min_new_tokens must not be negative, got {self.min_new_tokens}")
        if self.min_new_tokens > min(lengths):
            raise ValueError(f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={min(lengths)}: lower it")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number >= 0 (0 is greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1] (1 keeps every token), got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1] (0 is off), got {self.min_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be positive (1 is off), got {self.repetition_penalty}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken: temperature 0."""
        return self.temperature == 0

    @property
    def has_filters(self) -> bool:
        """Whether tokens compete with anything but their scaled logits."""
        truncates = not self.is_greedy and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)
        return truncates or self.repetition_penalty != 1

    @property
    def stopping_ids(self) -> frozenset[int]:
        """The tokens that end a completion (they are its last token)."""
        return frozenset(self.stop_token_ids if self.ignore_eos else self.eos_token_ids + self.stop_token_ids)

    def max_lens(self, num_completions: int) -> tuple[int, ...]:
        """The length limit of each of `num_completions` completions.

        Raises:
            ValueError: `max_new_tokens` holds another number of lengths.
        """
        if isinstance(self.max_new_tokens, int):
            return (self.max_new_tokens,) * num_completions
        if len(self.max_new_tokens) != num_completions:
            raise ValueError(
                f"max_new_tokens holds {len(self.max_new_tokens)} lengths for {num_completions} completions: "
                "give one number, or one per completion (prompt-major)"
            )
        return self.max_new_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """One completion to make: a prompt, the seed of its noise and its length limit."""

    prompt_ids: tuple[int, ...]
    seed: int
    """A signed 64-bit integer; two completions with one seed and one prompt are the same."""
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One finished completion."""

    prompt_ids: list[int]
    """The prompt, as it was given."""
    token_ids: list[int]
    """The completion, its EOS or stop token included."""
    logprobs: list[float]
    """Of each token of `token_ids`: log softmax(logits / T) over the full vocabulary, before any filter (T = 1 for greedy)."""
    finish_reason: str
    """`stop` (EOS or a stop token) or `length`."""
