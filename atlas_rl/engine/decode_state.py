"""What the device knows of running rows: enough to go from one decode step to the next without the host.

Shapes: S slots, M blocks of a row, R rows. A row keeps its slot while it runs; slot 0 belongs to no row: its rows pad a batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch

from atlas_rl.engine.sequence import Sequence

NUM_FIELDS = 5


class DecodeState:
    """The memory stays where it is, so that captured steps may read and write it.

    The host's copy of a row lags behind by the steps that are in flight; block tables are the host's alone to write.
    """

    def __init__(self, num_rows: int, num_blocks_per_row: int, device: torch.device) -> None:
        self.device = device
        self.fields_FS = torch.zeros(NUM_FIELDS, num_rows + 1, dtype=torch.int64, device=device)
        self.last_tokens_S, self.starts_S, self.remaining_S, self.seeds_S, self.prompt_lens_S = self.fields_FS
        """`starts_S`: position of the last token, whose KV is still to be computed. `remaining_S`: tokens that may be emitted."""
        self.tables_SM = torch.zeros(num_rows + 1, num_blocks_per_row, dtype=torch.int64, device=device)
        self.forget()

    def forget(self) -> None:
        """A rollout is over."""
        self.slots: dict[int, int] = {}
        """By row id."""
        self.free_slots = list(range(len(self.starts_S) - 1, 0, -1))
        self.num_known_blocks: dict[int, int] = {}
        """By row id: entries of its block table that the device has."""

    def slots_of(self, sequences: Rows[Sequence]) -> list[int]:
        """Slots of the rows; rows that have none yet get one, and their state."""
        slots = self.slots
        new = [seq for seq in sequences if seq.row_id not in slots]
        if new:
            self._admit(new)
        return [slots[seq.row_id] for seq in sequences]

    def release(self, sequences: Rows[Sequence]) -> None:
        """Rows leave; steps in flight do nothing for those that are finished."""
        for seq in sequences:
            slot = self.slots.pop(seq.row_id, None)  # a row can leave before its first step
            if slot is not None:
                self.free_slots.append(slot)
                del self.num_known_blocks[seq.row_id]

    def upload_tables(self, sequences: Rows[Sequence]) -> None:
        """Blocks that rows (which have slots) were given since the last step."""
        places, blocks, width = [], [], self.tables_SM.shape[1]
        known = self.num_known_blocks
        for seq in sequences:
            num_known, num_blocks = known[seq.row_id], len(seq.block_table)
            if num_known < num_blocks:
                first = self.slots[seq.row_id] * width
                places += range(first + num_known, first + num_blocks)
                blocks += seq.block_table[num_known:]
                known[seq.row_id] = num_blocks
        if places:
            places_P, blocks_P = to_device(np.array([places, blocks], np.int64), self.device)
            self.tables_SM.view(-1).index_copy_(0, places_P, blocks_P)

    def _admit(self, sequences: list[Sequence]) -> None:
        values = []
        for seq in sequences:
            slot = self.slots[seq.row_id] = self.free_slots.pop()
            self.num_known_blocks[seq.row_id] = 0
            row = (seq.last_token, seq.num_computed, seq.num_remaining, seq.noise_seed or 0, len(seq.prompt_ids))
            values.append((slot, *row))
        slots_R, *fields = to_device(np.array(values, np.int64).T.copy(), self.device)
        self.fields_FS.index_copy_(1, slots_R, torch.stack(fields))


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
