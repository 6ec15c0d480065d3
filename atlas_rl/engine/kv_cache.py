"""KV memory: the tensors, and the pool that says who owns which block of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

MANY_PIECES = 256
"""Gathers of fewer pieces take fresh memory, which the allocator has at hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """Shape of the KV cache, taken from the policy."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return 2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KVCache:
    """Keys and values of every layer. A slot is `block * block_size + offset`.

    Within a block the heads come first, so that a gather of (block, head) pieces gives each head's keys in one piece, which is
    what batched matrix products want. Zeroed, because a masked slot still takes part in attention with weight 0, and 0 * NaN
    is NaN.
    """

    def __init__(self, shape: KVShape, num_blocks: int, device: torch.device) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        dims = (shape.num_layers, 2, num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
        self.memory_L2NHSD = _zeros(dims, shape.dtype, device)  # 2: keys, values
        self.layers = list(self.memory_L2NHSD)
        self.num_pieces = num_blocks * shape.num_kv_heads
        self.heads_H = torch.arange(shape.num_kv_heads, device=device)
        # per layer, the same memory as (block, head) pieces [2 * N * H, S, D], and as single tokens of a head [N * H * S, D]
        self.pieces = list(self.memory_L2NHSD.flatten(1, 3))
        self.key_tokens, self.value_tokens = (list(self.memory_L2NHSD[:, i].flatten(1, 3)) for i in (0, 1))
        self.workspace = self.memory_L2NHSD.new_empty(0, shape.block_size, shape.head_dim)
        """What `gather` fills, kept from layer to layer: fresh memory of this size costs a page fault every 4 KiB."""

    def token_places(self, slots_N: torch.Tensor) -> torch.Tensor:
        """Where `store` writes the tokens of these slots: [N * H] rows of a layer's memory, the same for every layer."""
        block_N, offset_N = slots_N // self.shape.block_size, slots_N % self.shape.block_size
        piece_NH = block_N[:, None] * self.shape.num_kv_heads + self.heads_H
        return (piece_NH * self.shape.block_size + offset_N[:, None]).flatten()

    def piece_places(self, blocks_RM: torch.Tensor) -> torch.Tensor:
        """What `gather` reads for rows of M blocks each: [2 * R * H * M] (block, head) pieces, the same for every layer."""
        keys = (blocks_RM[:, None, :] * self.shape.num_kv_heads + self.heads_H[:, None]).flatten()
        return torch.cat([keys, keys + self.num_pieces])

    def store(self, layer: int, places: torch.Tensor, key_NHD: torch.Tensor, value_NHD: torch.Tensor) -> None:
        """Write one key and value per token."""
        self.key_tokens[layer].index_copy_(0, places, key_NHD.flatten(0, 1).to(self.shape.dtype))
        self.value_tokens[layer].index_copy_(0, places, value_NHD.flatten(0, 1).to(self.shape.dtype))

    def gather(self, layer: int, places: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of R rows of M blocks each: two [R, H, M * block_size, D], valid until the next call."""
        if len(places) < MANY_PIECES:
            gathered = self.pieces[layer].index_select(0, places)
        else:
            if len(self.workspace) < len(places):
                self.workspace = self.workspace.new_empty(len(places) * 5 // 4, *self.workspace.shape[1:])
            gathered = torch.index_select(self.pieces[layer], 0, places, out=self.workspace[: len(places)])
        return gathered.view(2, num_rows, self.shape.num_kv_heads, -1, self.shape.head_dim).unbind(0)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks from source to target, all layers at once."""
        if copies:
            sources, targets = map(list, zip(*copies, strict=True))
            self.memory_L2NHSD[:, :, targets] = self.memory_L2NHSD[:, :, sources]


def _zeros(dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on CPU through numpy, whose pages are taken when they are first written, not now."""
    if device.type != "cpu":
        return torch.zeros(dims, dtype=dtype, device=device)
    flat = np.zeros(math.prod(dims) * dtype.itemsize, np.uint8)
    return torch.from_numpy(flat).view(dtype).view(dims)


class OutOfBlocks(Exception):
    """No block is free. The scheduler preempts and tries again; it never reaches a user."""


class BlockPool:
    """Reference counts over the blocks of a KV cache. Holds numbers only, no tensors."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.free_ids = list(range(num_blocks - 1, -1, -1))
        self.ref_counts = [0] * num_blocks
        self.peak_used = 0

    @property
    def num_free(self) -> int:
        return len(self.free_ids)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def grow(self, block_table: list[int], num_tokens: int) -> None:
        """Extend a block table until it holds `num_tokens`; all or nothing (`OutOfBlocks`)."""
        missing = self.blocks_for(num_tokens) - len(block_table)
        if missing > len(self.free_ids):
            raise OutOfBlocks
        for _ in range(missing):
            block = self.free_ids.pop()
            assert self.ref_counts[block] == 0
            self.ref_counts[block] = 1
            block_table.append(block)
        self.peak_used = max(self.peak_used, self.num_blocks - len(self.free_ids))

    def fork(self, block_table: list[int], num_tokens: int) -> tuple[list[int], tuple[int, int] | None]:
        """A second table over the same `num_tokens`: full blocks are shared, a last partial block is to be copied.

        Returns the new table and the (source, target) blocks of the copy, if there is one.
        """
        num_full, num_partial_tokens = divmod(num_tokens, self.block_size)
        forked = block_table[:num_full]
        if num_partial_tokens:
            self.grow(forked, num_tokens)  # may raise: nothing is shared yet
        for block in block_table[:num_full]:
            self.ref_counts[block] += 1
        return forked, (block_table[num_full], forked[num_full]) if num_partial_tokens else None

    def release(self, block_table: list[int]) -> None:
        """Give a table's references back; it is empty afterwards."""
        for block in block_table:
            assert self.ref_counts[block] > 0, f"block {block} freed twice"
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free_ids.append(block)
        block_table.clear()

    def check_integrity(self, block_tables: Iterable[list[int]]) -> None:
        """Assert that the reference counts are what these tables, all that exist, amount to."""
        expected = [0] * self.num_blocks
        for table in block_tables:
            for block in table:
                expected[block] += 1
        assert expected == self.ref_counts, "reference counts and block tables disagree"
        free = set(self.free_ids)
        assert len(free) == len(self.free_ids), "a block is free twice"
        assert free == {b for b in range(self.num_blocks) if self.ref_counts[b] == 0}, (
            "a block is lost, or free while owned"
        )
