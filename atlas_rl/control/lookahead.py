"""How many of the proposed draft tokens are worth verifying."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MIN_GAIN = 1.03
"""Drafts are verified only if they promise this much more than plain decoding: estimates are noisy, plain decoding is safe."""


def choose_draft_lens(
    probs_RK: np.ndarray, step_seconds: Callable[[np.ndarray], np.ndarray | None], draft_seconds: float = 0.0
) -> np.ndarray:
    """Draft tokens to verify per row, by the highest expected number of emitted tokens per second.

    Every row emits one token anyway; its i-th draft token adds probs[row, i], the probability that it and all before it are
    accepted. The best S draft tokens over all rows are the S most probable ones (each row's are non-increasing), so that
    argmax_S (R + sum of the S largest) / seconds(R + S) is all there is to decide.

    Args:
        probs_RK: non-increasing along K, 0 after a draft's end. step_seconds: of forwards over so many tokens; None if none
            was ever measured. draft_seconds: what proposing has cost per step; paid already, but it counts for the choice to be
            worth it.
    Returns:
        [R] int64.
    """
    num_rows = len(probs_RK)
    rows, depths = np.nonzero(probs_RK)
    seconds = step_seconds(num_rows + np.arange(len(rows) + 1))
    if not len(rows) or seconds is None:
        return np.zeros(num_rows, np.int64)
    probs = probs_RK[rows, depths]
    order = np.argsort(-probs, kind="stable")
    rates = (num_rows + np.cumsum(probs[order])) / (seconds[1:] + draft_seconds)
    best = int(rates.argmax())
    if rates[best] < MIN_GAIN * num_rows / seconds[0]:
        return np.zeros(num_rows, np.int64)
    return np.bincount(rows[order[: best + 1]], minlength=num_rows)
