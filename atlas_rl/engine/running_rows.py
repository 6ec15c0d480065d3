"""Arrays over the running rows that stay, or nearly so, from one decode step to the next."""

from __future__ import annotations

import numpy as np

from atlas_rl.engine.sequence import Sequence


class RunningRows:
    """Kept, because making them anew takes as long as a small policy's step.

    Attributes:
        seeds, prompt_lens: [R] int64 of the rows.
        block_tables: [R, at least as many as the longest row has] int64; block 0 pads.
    """

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.tables: list[list[int]] = []
        """Each row's own: a row that was preempted comes back with another list."""
        self.num_blocks: list[int] = []
        """How many of each are in `block_tables`."""
        self.seeds = self.prompt_lens = np.zeros(0, np.int64)
        self.block_tables = np.zeros((0, 0), np.int64)

    def follow(self, sequences: list[Sequence]) -> None:
        """Be the arrays of these rows."""
        tables = [seq.block_table for seq in sequences]
        if sequences != self.sequences or any(a is not b for a, b in zip(tables, self.tables)):
            num_rows = len(sequences)
            self.sequences, self.tables, self.num_blocks = list(sequences), tables, [0] * num_rows
            self.seeds = np.fromiter((seq.request.seed for seq in sequences), np.int64, num_rows)
            self.prompt_lens = np.fromiter((len(seq.prompt_ids) for seq in sequences), np.int64, num_rows)
            self.block_tables = np.zeros((num_rows, 0), np.int64)
        longest, width = max(map(len, tables)), self.block_tables.shape[1]
        if longest > width:
            wider = np.zeros((len(sequences), longest + 4), np.int64)
            wider[:, :width] = self.block_tables
            self.block_tables = wider
        for row, (table, done) in enumerate(zip(tables, self.num_blocks)):
            if len(table) != done:
                self.block_tables[row, done : len(table)] = table[done:]
                self.num_blocks[row] = len(table)
