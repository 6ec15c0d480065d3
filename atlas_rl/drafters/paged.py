"""What drafters with a KV cache of their own have in common: where it lies, and the loop that guesses token after token.

Their keys and values lie in the rows' own blocks, so that prefixes are shared, copied and given back as the policy's are. A row
is caught up when a draft is asked for, not before: a drafter that is not asked costs next to nothing, and whatever was emitted in
the meantime passes through it in one forward over all rows.

Shapes: R rows, K tokens of a draft, M blocks of a row, D size of a state, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from atlas_rl.drafters.base import Drafter, DraftRow, Drafts
from atlas_rl.drafters.guess import Calibration, draw
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.kv_cache import KVCache, KVShape
from atlas_rl.types import SamplingParams


class PagedDrafter(Drafter):
    """Subclasses say how rows are caught up, what one more token does to a state, and which logits a state has."""

    uses_blocks = True
    feeds_ahead: int
    """Where a draft's first guess is fed back: so many positions after `num_computed`."""
    device: torch.device

    def __init__(self) -> None:
        self.calibration = Calibration()
        self.sampling = SamplingParams()
        self.kv_cache: KVCache | None = None
        self.kept_cache: KVCache | None = None
        """Of the last rollout, where steps stay captured over it."""
        self.rows: dict[int, DraftRow] = {}
        """Rows that decode, by id."""
        self.proposed: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}
        """Of each row's last draft that was not judged yet: its place in the completion, its tokens, and their cells."""

    # ---- what subclasses give --------------------------------------------------------------------------------------------

    @abstractmethod
    def kv_shape(self, block_size: int) -> KVShape: ...

    @abstractmethod
    def catch_up(self, rows: Sequence[DraftRow]) -> tuple[np.ndarray, torch.Tensor]:
        """Bring the KV of these rows, which come first, and all others up to date.

        Returns:
            The rows that can be drafted for (places in `rows`, ascending), and the state of each that gives its first guess.
        """

    @abstractmethod
    def advance(self, batch: ForwardBatch, states_RD: torch.Tensor) -> torch.Tensor:
        """States after one more token of each row, given those before it."""

    @abstractmethod
    def logits(self, states_RD: torch.Tensor) -> torch.Tensor:
        """[R, V], over the policy's vocabulary."""

    def draft_logits(self, states_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same over the tokens that it knows, and which these are; None: the policy's."""
        return self.logits(states_RD), None

    # ---- the life of a rollout -------------------------------------------------------------------------------------------

    def wake(self, sampling: SamplingParams, num_blocks: int, block_size: int) -> None:
        self.sampling = sampling
        shape, kept, self.kept_cache = self.kv_shape(block_size), self.kept_cache, None
        fits = kept is not None and (kept.shape, kept.num_blocks) == (shape, num_blocks)
        self.kv_cache = kept if fits else KVCache(shape, num_blocks, self.device)

    def sleep(self) -> None:
        self.kv_cache = None
        self.rows.clear()
        self.proposed.clear()

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        self.kv_cache.copy_blocks(copies)

    def admit(self, rows: Sequence[DraftRow]) -> None:
        self.rows.update((row.row_id, row) for row in rows)

    def release(self, rows: Sequence[DraftRow], finished: bool) -> None:
        for row in rows:
            del self.rows[row.row_id]
            self.proposed.pop(row.row_id, None)

    # ---- one step --------------------------------------------------------------------------------------------------------

    def propose(self, rows: Sequence[DraftRow], max_lens: np.ndarray, min_prob: float = 0.0) -> Drafts:
        width = int(max_lens.max())
        if width == 0:
            return Drafts(np.zeros((len(rows), 1), np.int64), np.zeros((len(rows), 1)))
        able, states = self.catch_up(rows)
        wanted = max_lens[able] > 0
        if not wanted.all():
            able, states = able[wanted], states[torch.from_numpy(wanted).to(self.device)]
        tokens, cells, probs = self._guess(rows, able, states, max_lens, min_prob)
        lens = (probs > 0).sum(axis=1)
        self.proposed = {
            rows[i].row_id: (len(rows[i].output_ids), tokens[i, : lens[i]], cells[i])
            for i in np.flatnonzero(lens).tolist()
        }
        return Drafts(tokens, np.where(probs < min_prob, 0.0, probs))

    def _guess(
        self, rows: Sequence[DraftRow], able: np.ndarray, states: torch.Tensor, max_lens: np.ndarray, min_prob: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, cells and probabilities [R, K] of guesses for the rows in `able`; the last may be below `min_prob`."""
        seeds = np.array([row.noise_seed or 0 for row in rows], np.int64)
        places = np.array([len(row.output_ids) for row in rows], np.int64)
        computed = np.array([row.num_computed for row in rows], np.int64)
        dims = (len(rows), int(max_lens.max()))
        tokens, cells, probs = np.zeros(dims, np.int64), np.zeros(dims, np.int64), np.zeros(dims)
        prob_R = np.ones(len(rows))
        tables = self._tables([rows[i] for i in able.tolist()])
        for depth in range(dims[1]):
            if not len(able):
                break
            guess_R, margin_R = draw(self.logits(states), self.sampling, seeds[able], places[able] + depth)
            margins = margin_R.cpu().numpy()
            if np.isnan(margins).any():
                raise FloatingPointError("its logits are NaN")
            cells_R = self.calibration.cells(margins)
            prob_R[able] *= self.calibration.prob_at(depth, cells_R)
            tokens[able, depth], cells[able, depth] = guess_R.cpu().numpy(), cells_R
            probs[able, depth] = prob_R[able]
            on = (max_lens[able] > depth + 1) & (prob_R[able] >= min_prob)
            if not on.all():
                keep = torch.from_numpy(on).to(self.device)
                able, tables, guess_R, states = able[on], tables[keep], guess_R[keep], states[keep]
            if len(able):
                positions = computed[able] + self.feeds_ahead + depth
                states = self.advance(self._one_token(tables, guess_R, positions), states)
        return tokens, cells, probs

    def _tables(self, rows: Sequence[DraftRow]) -> torch.Tensor:
        """[R, M] the rows' blocks; block 0 pads."""
        tables = [row.block_table for row in rows]
        width = max(map(len, tables), default=0)
        padded = np.array([table + [0] * (width - len(table)) for table in tables], np.int64)
        return torch.from_numpy(padded).to(self.device)

    def _one_token(self, tables_RM: torch.Tensor, token_ids_R: torch.Tensor, positions: np.ndarray) -> ForwardBatch:
        """What `ForwardBatch.build` makes of one token per row, from what is known already."""
        positions_R = torch.from_numpy(positions).to(self.device)
        block_size = self.kv_cache.shape.block_size
        blocks_R = tables_RM.gather(1, (positions_R // block_size)[:, None])[:, 0]
        ones = np.ones(len(positions), np.int64)
        return ForwardBatch(
            kv_cache=self.kv_cache,
            input_ids=positions,  # nobody asks for the tokens on the host
            positions=positions,
            input_ids_N=token_ids_R,
            positions_N=positions_R,
            slots_N=blocks_R * block_size + positions_R % block_size,
            block_tables_RM=tables_RM,
            starts_R=positions_R,
            query_lens_R=torch.from_numpy(ones).to(self.device),
            query_lens=ones,
            max_query_len=1,
            num_cached=int(positions.sum()),
        )

    def observe(self, rows: Sequence[DraftRow], num_drafted: np.ndarray, num_accepted: np.ndarray) -> None:
        """The counts are not needed: every guess, verified or not, is judged by the tokens that were emitted."""
        judged = [row for row in rows if row.row_id in self.proposed]
        if not judged:
            return
        drafts = [self.proposed.pop(row.row_id) for row in judged]
        cells = np.stack([cells for _, _, cells in drafts])
        guesses, emitted = np.full(cells.shape, -1), np.full(cells.shape, -2)
        for index, (row, (start, tokens, _)) in enumerate(zip(judged, drafts)):
            told = row.output_ids[start : start + len(tokens)]
            guesses[index, : len(told)] = tokens[: len(told)]
            emitted[index, : len(told)] = told
        num_right = (guesses == emitted).cumprod(axis=1).sum(axis=1)
        self.calibration.record(cells, (guesses >= 0).sum(axis=1), num_right)
        num_fed = np.array([len(tokens) - 1 for _, tokens, _ in drafts])
        self.judged(judged, np.minimum(num_right, num_fed))

    def judged(self, rows: Sequence[DraftRow], num_right_fed: np.ndarray) -> None:
        """So many guesses of the rows' last drafts were right, and were fed back: all but a draft's last one are."""


def tokens_between(row: DraftRow, start: int, end: int) -> list[int]:
    """Tokens [start, end) of prompt and completion."""
    offset = len(row.prompt_ids)
    if start >= offset:
        return row.output_ids[start - offset : end - offset]
    return [*row.prompt_ids[start:end], *row.output_ids[: max(0, end - offset)]]
