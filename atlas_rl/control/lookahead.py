"""How many of the proposed draft tokens are worth verifying."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

MIN_GAIN = 1.1
"""Drafts are verified only if they promise this much more than plain decoding: estimates are noisy, plain decoding is safe."""


def choose_draft_lens(
    probs: Sequence[Sequence[float]], step_seconds: Callable[[int], float | None], draft_seconds: float = 0.0
) -> list[int]:
    """Draft tokens to verify per row, by the highest expected number of emitted tokens per second.

    Every row emits one token anyway; its i-th draft token adds probs[row][i], the probability that it and all before it are
    accepted. The best S draft tokens over all rows are the S most probable ones (each row's are non-increasing), so that
    argmax_S (R + sum of the S largest) / seconds(R + S) is all there is to decide.

    Args:
        probs: per row, non-increasing. step_seconds: seconds of a forward over that many tokens; None if never measured.
        draft_seconds: what proposing has cost per step; paid already, but it counts for the choice to be worth it.
    """
    num_rows = len(probs)
    flat = np.fromiter((p for row in probs for p in row), float)
    plain_seconds = step_seconds(num_rows)
    if not len(flat) or plain_seconds is None:
        return [0] * num_rows
    order = np.argsort(-flat, kind="stable")
    tokens = num_rows + np.cumsum(flat[order])
    seconds = np.array([step_seconds(num_rows + size) for size in range(1, len(flat) + 1)]) + draft_seconds
    rates = tokens / seconds
    best = int(rates.argmax())
    if rates[best] < MIN_GAIN * num_rows / plain_seconds:
        return [0] * num_rows
    rows = np.repeat(np.arange(num_rows), [len(row) for row in probs])
    return np.bincount(rows[order[: best + 1]], minlength=num_rows).tolist()
