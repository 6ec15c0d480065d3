"""Blocks: owned, shared and given back exactly; nothing lost, nothing freed twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from atlas_rl.engine.kv_cache import BlockPool, KVCache, KVShape, OutOfBlocks


class PoolMachine(RuleBasedStateMachine):
    """Random growth, forks and releases; after each the pool's own check must hold."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=24, block_size=4)
        self.live: list[tuple[list[int], list[int]]] = []  # (table, [number of tokens])

    def is_live(self, entry) -> bool:
        return any(entry is other for other in self.live)

    @rule(target=tables, num_tokens=st.integers(0, 40))
    def allocate(self, num_tokens: int):
        table: list[int] = []
        free = self.pool.num_free
        try:
            self.pool.grow(table, num_tokens)
        except OutOfBlocks:
            assert self.pool.blocks_for(num_tokens) > free and not table and self.pool.num_free == free
            num_tokens = 0
        entry = (table, [num_tokens])
        self.live.append(entry)
        return entry

    @rule(entry=tables, extra=st.integers(0, 12))
    def extend(self, entry, extra: int):
        table, num_tokens = entry
        if not self.is_live(entry):
            return
        try:
            self.pool.grow(table, num_tokens[0] + extra)
            num_tokens[0] += extra
        except OutOfBlocks:
            pass

    @rule(target=tables, entry=tables)
    def fork(self, entry):
        table, num_tokens = entry
        if not self.is_live(entry):
            table, num_tokens = [], [0]
        try:
            forked, copy = self.pool.fork(table, num_tokens[0])
        except OutOfBlocks:
            forked, copy, num_tokens = [], None, [0]
        if copy is not None:
            source, target = copy
            assert source == table[num_tokens[0] // 4] and target == forked[-1] and source != target
            assert self.pool.ref_counts[target] == 1, "a partial block is never shared"
        child = (forked, [num_tokens[0]])
        self.live.append(child)
        return child

    @rule(entry=tables)
    def release(self, entry):
        if self.is_live(entry):
            self.live = [other for other in self.live if other is not entry]
            self.pool.release(entry[0])

    @invariant()
    def sound(self):
        self.pool.check_integrity(table for table, _ in self.live)
        for table, num_tokens in self.live:
            assert len(table) >= self.pool.blocks_for(num_tokens[0])


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_pool = PoolMachine.TestCase


def test_integrity_check_finds_a_leak_and_a_double_free():
    pool = BlockPool(8, 4)
    table: list[int] = []
    pool.grow(table, 9)
    with pytest.raises(AssertionError, match="disagree"):
        pool.check_integrity([])
    copy = list(table)
    pool.release(table)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.release(copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cache_returns_what_was_stored(dtype: torch.dtype):
    shape = KVShape(num_layers=2, num_kv_heads=3, head_dim=8, dtype=dtype, block_size=4)
    cache = KVCache(shape, 6, torch.device("cpu"))
    assert cache.memory_L2NHSD.nbytes == 6 * shape.block_bytes
    keys, values = torch.randn(5, 3, 8), torch.randn(5, 3, 8)
    table = [5, 2]
    slots = torch.tensor([table[i // 4] * 4 + i % 4 for i in range(5)])
    cache.store(1, cache.token_places(slots), keys, values)

    def gather(layer: int, blocks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """[H, S, D] -> [S, H, D] of one row."""
        places = cache.piece_places(torch.tensor([blocks]))
        return tuple(part[0].transpose(0, 1).clone() for part in cache.gather(layer, places, 1))

    got_keys, got_values = gather(1, table)
    torch.testing.assert_close(got_keys[:5], keys.to(dtype))
    torch.testing.assert_close(got_values[:5], values.to(dtype))
    assert not gather(0, table)[0].any(), "other layers are untouched"
    cache.copy_blocks([])
    cache.copy_blocks([(5, 0)])
    torch.testing.assert_close(gather(1, [0])[0], keys[:4].to(dtype))
