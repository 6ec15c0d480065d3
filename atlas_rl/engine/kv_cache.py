"""KV memory: the tensors, and the pool that says who owns which block of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch


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

    Zeroed, because a masked slot still takes part in attention, with weight 0, and 0 * NaN is NaN.
    """

    def __init__(self, shape: KVShape, num_blocks: int, device: torch.device) -> None:
        self.shape = shape
        dims = (shape.num_layers, num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
        self.keys_LNSHD = _zeros(dims, shape.dtype, device)
        self.values_LNSHD = _zeros(dims, shape.dtype, device)
        self.workspaces: dict[str, torch.Tensor] = {}
        """What `gather` fills, kept from layer to layer: fresh memory of this size costs a page fault every 4 KiB."""

    def store(self, layer: int, slots_N: torch.Tensor, key_NHD: torch.Tensor, value_NHD: torch.Tensor) -> None:
        """Write one token's key and value per slot."""
        self.keys_LNSHD[layer].flatten(0, 1).index_copy_(0, slots_N, key_NHD.to(self.shape.dtype))
        self.values_LNSHD[layer].flatten(0, 1).index_copy_(0, slots_N, value_NHD.to(self.shape.dtype))

    def gather(self, layer: int, blocks_RM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of R rows of M blocks each: two [R, M * block_size, H, D], valid until the next call."""
        num_rows, num_blocks = blocks_RM.shape
        dims = (num_rows, num_blocks * self.shape.block_size, self.shape.num_kv_heads, self.shape.head_dim)
        flat = blocks_RM.flatten()
        keys = self._select("keys", self.keys_LNSHD[layer], flat)
        return keys.view(dims), self._select("values", self.values_LNSHD[layer], flat).view(dims)

    def _select(self, name: str, source_NSHD: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        if name not in self.workspaces or len(self.workspaces[name]) < len(blocks):
            self.workspaces[name] = source_NSHD.new_empty(len(blocks) * 5 // 4, *source_NSHD.shape[1:])
        return torch.index_select(source_NSHD, 0, blocks, out=self.workspaces[name][: len(blocks)])

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks from source to target, all layers at once."""
        if copies:
            sources, targets = map(list, zip(*copies, strict=True))
            self.keys_LNSHD[:, targets] = self.keys_LNSHD[:, sources]
            self.values_LNSHD[:, targets] = self.values_LNSHD[:, sources]


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
