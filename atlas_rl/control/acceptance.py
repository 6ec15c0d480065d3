"""How far a drafter's drafts are right, by depth: counts that fade, so that a drafter is judged by what it did lately."""

from __future__ import annotations

from typing import Any

import numpy as np

MAX_DEPTH = 16
PRIOR_TOKENS = 16.0
PRIOR_RATE = 0.6
"""A new drafter is taken to be right with 3 in 5 of its guesses: enough to be tried where it costs little."""
HALF_LIFE_TOKENS = 4000.0
UPDATE_DECAY = 0.7
"""What a count is worth after a policy update."""


class Acceptance:
    """Of the guesses at depth d whose predecessors were right, the share that was right too."""

    def __init__(self) -> None:
        self.right_K = np.full(MAX_DEPTH, PRIOR_RATE * PRIOR_TOKENS)
        self.total_K = np.full(MAX_DEPTH, PRIOR_TOKENS)

    def record(self, num_drafted: np.ndarray, num_accepted: np.ndarray) -> None:
        """[R] draft tokens of each row that were verified, and how many of them, from the first on, were right."""
        drafted = np.minimum(num_drafted, MAX_DEPTH)
        right = np.bincount(np.minimum(num_accepted, drafted), minlength=MAX_DEPTH + 1)[::-1].cumsum()[::-1][1:]
        # a guess counts where it was verified and all before it were right: the right ones, and each row's first wrong one
        wrong = np.bincount(num_accepted[num_accepted < drafted], minlength=MAX_DEPTH)
        self.right_K += right
        self.total_K += right + wrong
        if self.total_K[0] > HALF_LIFE_TOKENS:
            self.fade(0.5)

    def fade(self, factor: float) -> None:
        """Forget a part, down to the weight of the prior; the rates stay."""
        weight = np.maximum(self.total_K * factor, np.minimum(self.total_K, PRIOR_TOKENS))
        self.right_K *= weight / self.total_K
        self.total_K = weight

    @property
    def survival_K(self) -> np.ndarray:
        """[MAX_DEPTH] probability that a draft is right up to and with each depth."""
        return (self.right_K / self.total_K).cumprod()

    def tokens_per_step(self, lookahead: int) -> float:
        """Of a row with so many draft tokens."""
        return 1 + float(self.survival_K[:lookahead].sum())

    def state_dict(self) -> dict[str, Any]:
        return {"right": self.right_K.tolist(), "total": self.total_K.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.right_K, self.total_K = (np.reshape(state[name], MAX_DEPTH).astype(float) for name in ("right", "total"))
