"""The EAGLE drafter within a captured decode step: the same guesses as `EagleDrafter` makes, without the host.

Every step, whoever drafted, passes through the layer as soon as the policy has computed it: what a draft starts from is always
there. Of places whose drafts were wrong it stores garbage, which the next step overwrites.

Shapes: S slots, R rows, N places of a step, D hidden size.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from atlas_rl.drafters.paged_step import PagedStep, StepRows, known_rows
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.decode_state import DecodeState, to_device
from atlas_rl.types import SamplingParams

if TYPE_CHECKING:
    from atlas_rl.drafters.eagle import EagleDrafter


class EagleStep(PagedStep):
    drafter: EagleDrafter

    def __init__(self, drafter: EagleDrafter) -> None:
        super().__init__(drafter)
        self.states_SD: torch.Tensor | None = None
        """Outputs of each slot's last known pair: its last token, and the features before it."""

    def wake(self, sampling: SamplingParams, num_slots: int, num_positions: int) -> None:
        super().wake(sampling, num_slots, num_positions)
        head = self.drafter.head
        if self.states_SD is None or len(self.states_SD) != num_slots:
            self.states_SD = head.fc.weight.new_zeros(num_slots, head.hidden_size)
        self.drafter.paged.grow_rotations(num_positions)

    def memory_key(self) -> Hashable:
        return super().memory_key(), self.states_SD.data_ptr(), self.drafter.paged.memory_key()

    def admit(self, slots: list[int], batch: ForwardBatch | None, places: np.ndarray, state: DecodeState) -> None:
        """The prefix's last pair is in the KV already, but its output is wanted: it is computed once more."""
        device = self.states_SD.device
        self.states_SD.index_fill_(0, to_device(np.array(slots, np.int64), device), 0)
        if not (places >= 0).any():
            return
        slots_R, places_R = to_device(known_rows(slots, places), device)
        rows = StepRows.of(slots_R, state)
        nothing_R0 = slots_R.new_empty(len(slots_R), 0)
        pairs = self.batch_of(
            rows, rows.last_tokens_R, rows.starts_R - 1, torch.ones_like(slots_R), further_RK=nothing_R0
        )
        pairs.slots_N = torch.full_like(pairs.slots_N, -1)  # a prompt's samples share the block: nobody writes it again
        tapped = [batch.tapped[layer][places_R] for layer in self.drafter.layers]
        self.states_SD.index_copy_(0, slots_R, self.drafter.outputs(pairs, tapped))

    def keep(self, slots_R: torch.Tensor, batch: ForwardBatch, places_R: torch.Tensor, tokens_N: torch.Tensor) -> None:
        """The pairs of a step: the features of each place and the token drawn after it."""
        pairs = replace(batch, kv_cache=self.kv_cache, input_ids_N=tokens_N.clamp(min=0), tapped={}, masks={})
        outputs_ND = self.drafter.outputs(pairs, [batch.tapped[layer] for layer in self.drafter.layers])
        self.states_SD.index_copy_(0, slots_R, outputs_ND[places_R])

    def first_states(self, rows: StepRows, slots_R: torch.Tensor) -> torch.Tensor:
        return self.states_SD[slots_R]
