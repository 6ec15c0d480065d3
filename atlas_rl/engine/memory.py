"""How much KV memory a rollout takes."""

from __future__ import annotations

import heapq
from pathlib import Path

import torch

from atlas_rl.config import EngineConfig
from atlas_rl.engine.kv_cache import KVShape
from atlas_rl.engine.sequence import PromptGroup

FREE_SHARE = 0.5
"""Share of the free memory that the KV cache may take when no bound is configured."""


def kv_blocks(shape: KVShape, groups: list[PromptGroup], config: EngineConfig, device: torch.device) -> int:
    """Blocks to allocate: what these groups need at most, or else what the bound allows.

    Raises:
        ValueError: the bound cannot hold the longest sequence.
    """
    if config.kv_memory_gib is None:
        bound_bytes = FREE_SHARE * free_bytes(device)
    else:
        bound_bytes = config.kv_memory_gib * 2**30
    bound = int(bound_bytes // shape.block_bytes)
    own_blocks, prefix_blocks, longest = [], 0, 0
    for group in groups:
        shared = len(group.prefix_ids) // shape.block_size
        prefix_blocks += shared
        for seq in group.sequences:
            num_tokens = seq.max_tokens
            longest = max(longest, num_tokens)
            own_blocks.append(-(-num_tokens // shape.block_size) - shared)
    longest_blocks = -(-longest // shape.block_size)
    if longest_blocks > bound:
        raise ValueError(
            f"KV memory for one sequence of {longest} tokens is {longest_blocks * shape.block_bytes / 2**20:.1f} MiB, but "
            f"{bound_bytes / 2**20:.1f} MiB are allowed: raise engine.kv_memory_gib, or lower max_new_tokens "
            "(max_completion_length in a trainer)"
        )
    # the block per running sequence that admission keeps spare is part of the need, or a full batch would wait for it
    concurrent = heapq.nlargest(config.max_num_seqs, own_blocks)
    return min(bound, max(longest_blocks, prefix_blocks + sum(concurrent) + len(concurrent)))


def free_bytes(device: torch.device) -> int:
    """Free memory of the device; on CPU what the kernel calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable line: set engine.kv_memory_gib")
