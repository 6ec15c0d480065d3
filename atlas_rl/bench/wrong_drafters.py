"""Drafters that are wrong on purpose: the output law must hold with them, and the floor law must bench or ignore them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

from atlas_rl.drafters.base import Drafter, DraftRow, Drafts


class WrongDrafter(Drafter):
    """Follows the protocol strictly (it asserts that the engine does) and learns nothing; subclasses propose for one row."""

    name = "wrong"

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self.rng = random.Random(seed)
        self.rows: dict[int, DraftRow] = {}

    def admit(self, rows: Sequence[DraftRow]) -> None:
        for row in rows:
            assert row.row_id not in self.rows, "admitted twice"
            self.rows[row.row_id] = row

    def propose(self, rows: Sequence[DraftRow], max_lens: np.ndarray, min_prob: float = 0.0) -> Drafts:
        assert all(row.row_id in self.rows for row in rows), "a row that was never admitted"
        drafts = Drafts(np.zeros((len(rows), max_lens.max()), np.int64), np.zeros((len(rows), max_lens.max())))
        for index, (row, max_len) in enumerate(zip(rows, max_lens.tolist(), strict=True)):
            tokens = self.propose_one(row, max_len)
            drafts.token_ids[index, : len(tokens)] = tokens
            drafts.probs[index, : len(tokens)] = 1.0  # promised to be certain
        return drafts

    def observe(self, rows: Sequence[DraftRow], num_drafted: np.ndarray, num_accepted: np.ndarray) -> None:
        assert all(0 <= a <= d for d, a in zip(num_drafted, num_accepted, strict=True))

    def release(self, rows: Sequence[DraftRow], finished: bool) -> None:
        for row in rows:
            del self.rows[row.row_id]

    def policy_updated(self) -> None:
        self.rng.seed(0)


class RandomDrafter(WrongDrafter):
    """Random tokens at random lengths."""

    name = "random"

    def propose_one(self, row: DraftRow, max_len: int) -> list[int]:
        length = self.rng.randint(0, max_len)
        return [self.rng.randrange(self.vocab_size) for _ in range(length)]


class AdversarialDrafter(WrongDrafter):
    """Knows the completions: right for n tokens, then wrong, with another n at every step."""

    name = "adversarial"

    def __init__(self, vocab_size: int, answers: Mapping[tuple[tuple[int, ...], int], list[int]]) -> None:
        super().__init__(vocab_size)
        self.answers = answers
        """The completion of each (prompt, seed)."""

    def propose_one(self, row: DraftRow, max_len: int) -> list[int]:
        answer = self.answers[row.prompt_ids, row.request.seed]
        ahead = answer[len(row.output_ids) :][:max_len]
        num_right = self.rng.randint(0, max_len)
        return [t if i < num_right else (t + 1) % self.vocab_size for i, t in enumerate(ahead)]
