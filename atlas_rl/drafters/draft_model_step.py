"""A draft model within a captured decode step: the same guesses as `DraftModelDrafter` makes, without the host.

A step's guesses are fed back but for the last one: if all were right, the next step finds the KV of the token before the last one
missing. So every draft begins with both, whether it is missing or not. What other drafters' steps emitted is missing too: the
host sees to that before this one drafts again (`Drafter.rejoin`), as a forward of its own at every plain step would be dear.

Shapes: S slots, R rows.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import numpy as np
import torch

from atlas_rl.drafters.paged_step import PagedStep, StepRows, known_rows
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.decode_state import DecodeState, to_device
from atlas_rl.types import SamplingParams

if TYPE_CHECKING:
    from atlas_rl.drafters.draft_model import DraftModelDrafter


class DraftModelStep(PagedStep):
    drafter: DraftModelDrafter

    def __init__(self, drafter: DraftModelDrafter) -> None:
        super().__init__(drafter)
        self.previous_S: torch.Tensor | None = None
        """The token before each slot's last one, where there is one."""

    def wake(self, sampling: SamplingParams, num_slots: int, num_positions: int) -> None:
        super().wake(sampling, num_slots, num_positions)
        view = self.drafter.view
        if self.previous_S is None or len(self.previous_S) != num_slots:
            self.previous_S = torch.zeros(num_slots, dtype=torch.int64, device=view.device)
        view.prepare_positions(num_positions)

    def memory_key(self) -> Hashable:
        return super().memory_key(), self.previous_S.data_ptr(), self.drafter.view.memory_key()

    def admit(self, slots: list[int], batch: ForwardBatch | None, places: np.ndarray, state: DecodeState) -> None:
        if (places >= 0).any():
            slots_R, places_R = to_device(known_rows(slots, places), self.previous_S.device)
            self.previous_S.index_copy_(0, slots_R, batch.input_ids_N[places_R])

    def keep(self, slots_R: torch.Tensor, batch: ForwardBatch, places_R: torch.Tensor, tokens_N: torch.Tensor) -> None:
        self.previous_S.index_copy_(0, slots_R, batch.input_ids_N[places_R])

    def first_states(self, rows: StepRows, slots_R: torch.Tensor) -> torch.Tensor:
        has_previous_R = rows.starts_R > 0
        first_R = torch.where(has_previous_R, self.previous_S[slots_R], rows.last_tokens_R)
        lens_R = rows.remaining_R.clamp(max=1) * (1 + has_previous_R.long())  # 0 for a row that is finished
        starts_R = (rows.starts_R - 1).clamp(min=0)
        batch = self.batch_of(rows, first_R, starts_R, lens_R, further_RK=rows.last_tokens_R[:, None])
        return self.drafter.hidden_states(batch)[batch.query_starts_R + (lens_R - 1).clamp(min=0)]
