"""What drafters with a KV cache of their own have in common within a captured decode step.

They write into the blocks that the step's rows have been given, at positions that the step itself may write, and nowhere else:
where less of a row remains than is asked for, its further guesses store nothing.

Shapes: S slots, R rows, K draft tokens, M blocks of a row, D size of a state.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from atlas_kernels import prepare_step
from atlas_rl.drafters.guess import draw_within
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.decode_state import DecodeState
from atlas_rl.engine.kv_cache import KVCache
from atlas_rl.types import SamplingParams

if TYPE_CHECKING:
    from atlas_rl.drafters.paged import PagedDrafter


class StepRows(NamedTuple):
    """The state of a step's rows, row by row (`DecodeState`)."""

    rows_R: torch.Tensor
    """0, 1, …"""
    last_tokens_R: torch.Tensor
    starts_R: torch.Tensor
    remaining_R: torch.Tensor
    seeds_R: torch.Tensor
    prompt_lens_R: torch.Tensor
    tables_RM: torch.Tensor

    @classmethod
    def of(cls, slots_R: torch.Tensor, state: DecodeState) -> StepRows:
        rows_R = torch.arange(len(slots_R), device=slots_R.device)
        return cls(rows_R, *state.fields_FS.index_select(1, slots_R), state.tables_SM.index_select(0, slots_R))


class PagedStep:
    """Subclasses say which state a draft starts from, and what they keep of a step."""

    def __init__(self, drafter: PagedDrafter) -> None:
        self.drafter = drafter
        self.kv_cache: KVCache | None = None
        """The host's side took it, and fills it with what rows begin with."""

    @abstractmethod
    def first_states(self, rows: StepRows, slots_R: torch.Tensor) -> torch.Tensor:
        """[R, D] that the first guess of each row comes from."""

    def wake(self, sampling: SamplingParams, num_slots: int, num_positions: int) -> None:
        self.sampling, self.kv_cache = sampling, self.drafter.kv_cache

    def sleep(self, keep: bool) -> None:
        self.drafter.kept_cache = self.kv_cache if keep else None
        self.kv_cache = None

    def memory_key(self) -> Hashable:
        return self.kv_cache.memory_L2NHSD.data_ptr(), self.kv_cache.memory_L2NHSD.shape

    def draft(self, num_drafts: int, slots_R: torch.Tensor, state: DecodeState) -> torch.Tensor:
        """Guesses [R, K] of what follows each row's last token."""
        drafter, rows = self.drafter, StepRows.of(slots_R, state)
        states_RD = self.first_states(rows, slots_R)
        # the last token is drawn already: the first guess is of the one that the policy draws next
        drawn_R = rows.starts_R + 1 - rows.prompt_lens_R
        guesses: list[torch.Tensor] = []
        for depth in range(num_drafts):
            if depth:
                batch = self.one_token(rows, guesses[-1], drafter.feeds_ahead + depth - 1)
                states_RD = drafter.advance(batch, states_RD)
            logits_RV, token_ids_V = drafter.draft_logits(states_RD)
            guesses_R = draw_within(logits_RV, self.sampling, rows.seeds_R, drawn_R + depth, token_ids_V)
            guesses.append(guesses_R.clamp(min=0))  # of logits that are NaN anything may come
        return torch.stack(guesses, dim=1)

    def one_token(self, rows: StepRows, tokens_R: torch.Tensor, num_ahead: int) -> ForwardBatch:
        """One token of each row, so many positions after its last one; padding where less remains than that."""
        starts_R = rows.starts_R + (rows.remaining_R - 1).clamp(0, num_ahead)
        nothing_R0 = tokens_R.new_empty(len(tokens_R), 0)
        return self.batch_of(rows, tokens_R, starts_R, (rows.remaining_R - num_ahead).clamp(min=0), nothing_R0)

    def batch_of(
        self,
        rows: StepRows,
        first_R: torch.Tensor,
        starts_R: torch.Tensor,
        lens_R: torch.Tensor,
        further_RK: torch.Tensor,
    ) -> ForwardBatch:
        """The first of these tokens of each row (at most 1 + K) from these positions on."""
        noise = (rows.seeds_R, rows.prompt_lens_R)
        block_size, num_places = self.kv_cache.shape.block_size, 1 + further_RK.shape[1]
        inputs = prepare_step(
            rows.rows_R, first_R, starts_R, lens_R, *noise, rows.tables_RM, further_RK, None, block_size
        )
        return ForwardBatch.of_step(self.kv_cache, inputs, rows.rows_R * num_places, num_places)


def known_rows(slots: list[int], places: np.ndarray) -> np.ndarray:
    """[2, R] slots of rows that begin with a prefix, and the places of their last tokens."""
    return np.array([slots, places], np.int64).compress(places >= 0, axis=1)
