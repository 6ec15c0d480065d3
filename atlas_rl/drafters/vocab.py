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
        self.uncounted: list[list[int]] = []
        """Completions that have yet to be counted: together, they take a tenth of the time."""
        self._counts_V = np.zeros(size)
        self.untold_V = np.zeros(size)
        """Of these, what other ranks do not know of."""
        self.ids = np.arange(size)
        """[n] int64, sorted."""

    @property
    def counts_V(self) -> np.ndarray:
        """Of tokens [V]."""
        if self.uncounted:
            tokens = np.concatenate([np.array(ids, np.int64) for ids in self.uncounted])
            self.uncounted = []
            counts_V = np.bincount(tokens, minlength=self.size)
            self._counts_V += counts_V
            self.untold_V += counts_V
        return self._counts_V

    @counts_V.setter
    def counts_V(self, counts_V: np.ndarray) -> None:
        self._counts_V = counts_V

    @property
    def coverage(self) -> float:
        """Share of the counted tokens that is in the vocabulary."""
        total = self.counts_V.sum()
        return float(self.counts_V[self.ids].sum() / total) if total else 1.0

    def count(self, completions: Iterable[list[int]]) -> None:
        self.uncounted += completions

    def add_up(self, ranks: Ranks) -> None:
        """Count what any rank has counted since the last time; collective."""
        counts_V = self.counts_V
        if ranks.size > 1:
            total_V = torch.from_numpy(self.untold_V.copy())
            ranks.add_up([total_V])
            self.counts_V = counts_V + total_V.numpy() - self.untold_V
            self.counts_V = np.floor(self.counts_V * GRID) / GRID
        self.untold_V[:] = 0

    def load(self, counts_V: np.ndarray, ids: np.ndarray) -> None:
        self.uncounted = []
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
