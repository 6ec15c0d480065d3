"""What is kept from step to step is what would be made anew."""

from __future__ import annotations

import random

import numpy as np

from atlas_rl.engine.running_rows import RunningRows
from atlas_rl.engine.sequence import Sequence
from atlas_rl.types import RolloutRequest


def sequence(index: int, prompt_len: int) -> Sequence:
    request = RolloutRequest(prompt_ids=tuple(range(prompt_len)), seed=100 + index, max_new_tokens=50)
    return Sequence(request, row_id=index, index=index)


def check(rows: RunningRows, sequences: list[Sequence]) -> None:
    rows.follow(sequences)
    assert rows.seeds.tolist() == [seq.request.seed for seq in sequences]
    assert rows.prompt_lens.tolist() == [len(seq.prompt_ids) for seq in sequences]
    for row, seq in enumerate(sequences):
        assert rows.block_tables[row, : len(seq.block_table)].tolist() == seq.block_table
        assert not rows.block_tables[row, len(seq.block_table) :].any(), "block 0 pads"


def test_rows_grow_finish_and_come_back():
    rng, rows = random.Random(0), RunningRows()
    sequences = [sequence(i, 3 + i) for i in range(6)]
    blocks = iter(range(1, 10_000))
    for seq in sequences:
        seq.block_table = [next(blocks) for _ in range(rng.randint(1, 3))]
    for _ in range(60):
        for seq in sequences:
            if rng.random() < 0.3:
                seq.block_table.append(next(blocks))
        if rng.random() < 0.3:
            sequences = rng.sample(sequences, len(sequences))
        if rng.random() < 0.2:  # preempted: its blocks are given back, and it is prefilled again into others
            seq = rng.choice(sequences)
            seq.block_table = [next(blocks) for _ in seq.block_table]
        if rng.random() < 0.05 and len(sequences) > 1:
            sequences = sequences[1:]
        check(rows, sequences)
    assert isinstance(rows.block_tables, np.ndarray)


def test_a_lone_row_that_was_preempted_has_other_blocks_of_the_same_number():
    rows, seq = RunningRows(), sequence(0, 5)
    seq.block_table = [3, 4]
    check(rows, [seq])
    seq.block_table.clear()  # as the pool releases it
    seq.block_table = [7, 8]
    check(rows, [seq])
