"""Suffix drafter: guesses that the policy goes on as it, its siblings or its earlier rollouts went on after the same last tokens.

It holds no weights. For each of several context lengths (up to 8 tokens) it counts which tokens followed a context: over all
prompts, and per prompt, whose rollouts repeat each other. The counts of all lengths are mixed as PPM does it (Witten and Bell
1991: the longer context's word weighs the more, the more often it was seen), and the guess is drawn from the mixture with the
policy's own noise, so that where the policy chooses at random the guess tends to choose alike.

How likely a guess is to be right is not assumed but counted, for this policy, as it decodes: guesses fall into cells by the
longest context known, their share of the mixture, the margin by which they won, and whether the row's last token was guessed.

Everything is in one table of fixed size: what is seldom met and long ago gives way. Counts fade with policy updates. The work is
done in C++ (suffix.cpp), as 64 rows of a small policy leave a drafter 50 µs per step.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int64, c_uint64, c_void_p
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar

import numpy as np

from atlas_kernels.native import Library
from atlas_rl.drafters.base import Drafter, DraftRow, Drafts

LIBRARY = Library(
    Path(__file__).with_suffix(".cpp"),
    {
        "suffix_new": [c_int64, c_double],
        "suffix_free": [c_void_p],
        "suffix_admit": [c_void_p, c_uint64] + [c_void_p, c_int64] * 2 + [c_int64] * 3,
        "suffix_release": [c_void_p, c_int64],
        "suffix_propose": [c_void_p] * 3 + [c_int64] * 2 + [c_float] + [c_void_p] * 2,
        "suffix_observe": [c_void_p] * 4 + [c_int64],
        "suffix_policy_updated": [c_void_p],
    },
    {"suffix_new": c_void_p, "suffix_admit": c_int64},
)
CONTEXT = 8
"""Tokens that a guess looks back at."""
MAX_DRAFT = 32
MAX_UNLEARNED = 64
"""Rows that are kept to be learned from later; the oldest are forgotten."""


class SuffixDrafter(Drafter):
    """Memory: 32 bytes for each of 2^`log2_entries` contexts; a token adds nine contexts or finds them known.

    Args:
        floor: a draft ends where the probability that all of it is accepted falls below this.
        half_life: policy updates after which a count weighs half.
    Raises:
        ValueError: there is no C++ compiler (`unavailable_reason`).
    """

    name: ClassVar[str] = "suffix"

    def __init__(self, *, log2_entries: int = 19, floor: float = 0.15, half_life: float = 16.0) -> None:
        if self.unavailable_reason() is not None:
            raise ValueError(f"the suffix drafter needs a C++ compiler (set CXX): {self.unavailable_reason()}")
        self.floor = floor
        self.functions = LIBRARY.functions
        self.settings = (log2_entries, half_life)
        self.model = c_void_p(self.functions.suffix_new(*self.settings))
        self.slots: dict[int, int] = {}
        """Of each row in the model."""
        self.num_learned: dict[int, int] = {}
        """Tokens of each row's completion that the model knows."""
        self.prompts: dict[int, int] = {}
        """Key of each row's prompt."""
        self.num_live: dict[int, int] = {}
        """Rows per prompt; what a prompt itself says is learned once, with its first row."""
        self.unlearned: deque[DraftRow] = deque()
        """Rows that have left, and have said more than was learned."""

    def __del__(self) -> None:
        if hasattr(self, "model"):
            self.functions.suffix_free(self.model)

    @staticmethod
    def unavailable_reason() -> str | None:
        """Why it cannot be used on this machine; None where it can."""
        return LIBRARY.unavailable_reason

    def admit(self, rows: Sequence[DraftRow]) -> None:
        keys: dict[Sequence[int], int] = {}
        for row in rows:
            if row.prompt_ids not in keys:
                keys[row.prompt_ids] = _prompt_key(row.prompt_ids)
            prompt = self.prompts[row.row_id] = keys[row.prompt_ids]
            learned = np.array(() if prompt in self.num_live else row.prompt_ids, np.int64)
            self.num_live[prompt] = self.num_live.get(prompt, 0) + 1
            recent = np.array([*row.prompt_ids[-CONTEXT:], *row.output_ids[-CONTEXT:]][-CONTEXT:], np.int64)
            position, seed = len(row.output_ids), row.noise_seed
            self.slots[row.row_id] = self.functions.suffix_admit(
                self.model,
                prompt,
                learned.ctypes.data,
                len(learned),
                recent.ctypes.data,
                len(recent),
                position,
                seed or 0,
                seed is None,
            )
            self.num_learned[row.row_id] = position

    def propose(self, rows: Sequence[DraftRow], max_lens: np.ndarray, min_prob: float = 0.0) -> Drafts:
        self._catch_up()
        slots = np.array([self.slots[row.row_id] for row in rows], np.int64)
        width = min(MAX_DRAFT, int(max_lens.max()))
        tokens, probs = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width))
        max_lens = np.minimum(max_lens, width)
        self.functions.suffix_propose(
            self.model,
            slots.ctypes.data,
            max_lens.ctypes.data,
            len(rows),
            width,
            max(self.floor, min_prob),
            tokens.ctypes.data,
            probs.ctypes.data,
        )
        return Drafts(tokens, probs)

    def observe(self, rows: Sequence[DraftRow], num_drafted: np.ndarray, num_accepted: np.ndarray) -> None:
        """The counts are not needed: every guess, verified or not, is judged by the tokens that were emitted."""
        tokens: list[int] = []
        ends = []
        for row in rows:
            tokens += row.output_ids[self.num_learned[row.row_id] :]
            self.num_learned[row.row_id] = len(row.output_ids)
            ends.append(len(tokens))
        slots = np.array([self.slots[row.row_id] for row in rows], np.int64)
        emitted, counts = np.array(tokens, np.int64), np.diff(np.array(ends, np.int64), prepend=0)
        self.functions.suffix_observe(
            self.model, slots.ctypes.data, emitted.ctypes.data, counts.ctypes.data, len(slots)
        )

    def release(self, rows: Sequence[DraftRow], finished: bool) -> None:
        """Learning costs time, lost where the drafter is not asked: what rows have said at their end waits until it is."""
        for row in rows:
            if finished and self.num_learned[row.row_id] < len(row.output_ids):
                self.unlearned.append(row)
                if len(self.unlearned) > MAX_UNLEARNED:
                    self._drop(self.unlearned.popleft())
            else:
                self._drop(row)

    def _catch_up(self) -> None:
        if self.unlearned:
            nobody = np.zeros(len(self.unlearned), np.int64)
            self.observe(self.unlearned, nobody, nobody)
            while self.unlearned:
                self._drop(self.unlearned.popleft())

    def _drop(self, row: DraftRow) -> None:
        self.functions.suffix_release(self.model, self.slots.pop(row.row_id))
        del self.num_learned[row.row_id]
        prompt = self.prompts.pop(row.row_id)
        self.num_live[prompt] -= 1
        if not self.num_live[prompt]:
            del self.num_live[prompt]

    def reset(self) -> None:
        # of rows that it was benched with
        for known in (self.slots, self.num_learned, self.prompts, self.num_live, self.unlearned):
            known.clear()
        self.functions.suffix_free(self.model)
        self.model = c_void_p(self.functions.suffix_new(*self.settings))

    def policy_updated(self) -> None:
        self.functions.suffix_policy_updated(self.model)


def _prompt_key(prompt_ids: Sequence[int]) -> int:
    return int.from_bytes(blake2b(array("q", prompt_ids).tobytes(), digest_size=8).digest(), "little")
