"""The protocol between the engine and every drafter.

A drafter is never trusted: the engine accepts a draft token only where the policy itself emits it (law 1), clips drafts to the
lengths it asked for, and benches a drafter that raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class DraftRow(Protocol):
    """What a drafter may know of a running sequence."""

    row_id: int
    """Unique over the life of the engine."""
    prompt_ids: tuple[int, ...]
    output_ids: list[int]
    """The completion so far; the engine appends to it, drafters only read."""
    noise_seed: int | None
    """Seed of the row's noise: the policy's token at a position of the completion is the arg-max of log p / T + noise keyed
    by (seed, position, token); a drafter that draws with it is right more often. None where the policy decodes greedily."""


class Drafts(NamedTuple):
    """Guessed continuations of R rows, K tokens at most."""

    token_ids: np.ndarray
    """[R, K] int64."""
    probs: np.ndarray
    """[R, K] estimated probability that a token and all before it are accepted: non-increasing, 0 after a draft's end. A row's
    sum is its expected gain."""

    @property
    def lens(self) -> np.ndarray:
        """[R] tokens of each draft."""
        return (self.probs > 0).cumprod(axis=1).sum(axis=1)


class Drafter(Protocol):
    name: str

    def admit(self, rows: Sequence[DraftRow]) -> None:
        """Rows start decoding; after a preemption `output_ids` is not empty."""

    def propose(self, rows: Sequence[DraftRow], max_lens: np.ndarray) -> Drafts:
        """One draft per row, of at most `max_lens[i]` tokens (0: none wanted)."""

    def observe(self, rows: Sequence[DraftRow], num_drafted: Sequence[int], num_accepted: Sequence[int]) -> None:
        """`output_ids` of each row has grown since the drafter was last told of it; of the `num_drafted[i]` verified draft tokens
        (a prefix of what was proposed, maybe none of it) the first `num_accepted[i]` were right."""

    def release(self, rows: Sequence[DraftRow], finished: bool) -> None:
        """Rows leave: finished, or else preempted or aborted (a preempted row is admitted again)."""

    def policy_updated(self) -> None:
        """The policy's weights have changed; what was learned from older rollouts is worth less now."""
