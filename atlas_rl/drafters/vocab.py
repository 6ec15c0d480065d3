"""Draft vocabulary: the token ids that recent rollouts use. A guess outside it is never made, its score never computed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from atlas_rl.ranks import Ranks

COVERAGE = 0.9999
"""Share of recent tokens that the vocabulary has to hold; a token outside it costs the rest of a draft."""
MIN_TOKENS = 16_000
"""Until so many have been seen, every id is in it."""
HALF_LIFE_TOKENS = 200_000.0
MULTIPLE = 32
"""Ids are rounded up to the width of a packed product."""
GRID = 2.0**16
"""Steps per count at the least, to which counts are rounded where ranks have to agree on them: sums are exact then."""


class DraftVocabulary:
    """Counts emitted tokens between policy updates and chooses the ids at an update.

    Args:
        size: of the policy's vocabulary.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.counts_V = np.zeros(size)
        self.untold_V = np.zeros(size)
        """Of these, what other ranks do not know of."""
        self.ids = np.arange(size)
        """[n] int64, sorted."""

    @property
    def coverage(self) -> float:
        """Share of the counted tokens that is in the vocabulary."""
        total = self.counts_V.sum()
        return float(self.counts_V[self.ids].sum() / total) if total else 1.0

    def count(self, completions: Iterable[list[int]]) -> None:
        tokens = np.concatenate([np.array(ids, np.int64) for ids in completions])
        self.counts_V += np.bincount(tokens, minlength=self.size)
        np.add.at(self.untold_V, tokens, 1.0)

    def add_up(self, ranks: Ranks) -> None:
        """Count what any rank has counted since the last time; collective."""
        if ranks.size > 1:
            total_V = torch.from_numpy(self.untold_V.copy())
            ranks.add_up([total_V])
            self.counts_V += total_V.numpy() - self.untold_V
            self.counts_V = np.floor(self.counts_V * GRID) / GRID
        self.untold_V[:] = 0

    def load(self, counts_V: np.ndarray, ids: np.ndarray) -> None:
        self.counts_V, self.ids = counts_V.copy(), ids.copy()
        self.untold_V[:] = 0

    def choose(self) -> None:
        total = self.counts_V.sum()
        if total < MIN_TOKENS:
            return
        order = np.argsort(-self.counts_V, kind="stable")
        needed = int(np.searchsorted(self.counts_V[order].cumsum(), COVERAGE * total)) + 1
        self.ids = np.sort(order[: min(self.size, -(-needed // MULTIPLE) * MULTIPLE)]).astype(np.int64)
        if total > HALF_LIFE_TOKENS:
            self.counts_V /= 2
