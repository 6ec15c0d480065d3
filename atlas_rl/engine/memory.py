"""How much KV memory a rollout takes, and what becomes of it afterwards."""

from __future__ import annotations

import heapq
import logging
from pathlib import Path

import torch

from atlas_rl.config import EngineConfig
from atlas_rl.engine.kv_cache import KVCache, KVShape
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.sequence import PromptGroup

logger = logging.getLogger(__name__)

FREE_SHARE, FREE_SHARE_GPU = 0.5, 0.85
"""Share of the free memory that the KV cache may take when no bound is configured. A GPU's rest is for activations and logits; a
CPU's memory is shared with others."""
KEPT_SHARE = 0.01
"""Of a GPU's memory: KV memory up to this size is kept between rollouts, with the steps that were captured over it."""
SMALLER = 0.7
"""Where memory is too fragmented for what should fit, so much of it is tried next."""


def take_kv(
    view: PolicyView, groups: list[PromptGroup], config: EngineConfig, drafter_block_bytes: int, kept: KVCache | None
) -> KVCache:
    """KV memory for these groups: what was kept, if that is enough, or else new.

    Args:
        drafter_block_bytes: what drafters keep per block beside it.
    Raises:
        ValueError: the bound, or the memory, cannot hold the longest sequence.
    """
    shape, device = view.kv_shape(config.block_size), view.device
    if kept is not None and kept.shape != shape:
        kept = None
    least, num_blocks = kv_blocks(shape, groups, config, device, drafter_block_bytes)
    if kept is not None and kept.num_blocks >= num_blocks:
        return kept
    rounded = 1 << (num_blocks - 1).bit_length()
    block_bytes = shape.block_bytes + drafter_block_bytes
    if config.kv_memory_gib is None and rounded * block_bytes <= _little_bytes(device):
        num_blocks = rounded  # to be kept, also for rollouts that need a little more
    while True:
        try:
            return KVCache(shape, num_blocks, device)
        except torch.OutOfMemoryError:
            give_back(device)
            if num_blocks == least:
                raise ValueError(_too_little(least * shape.block_bytes, free_bytes(device), "free")) from None
            logger.warning("KV memory of %.1f GiB is free but not in one piece", num_blocks * shape.block_bytes / 2**30)
            num_blocks = max(least, int(SMALLER * num_blocks))


def kv_blocks(
    shape: KVShape, groups: list[PromptGroup], config: EngineConfig, device: torch.device, drafter_block_bytes: int = 0
) -> tuple[int, int]:
    """Blocks that the longest sequence needs, and blocks to allocate: what the groups need at most, or what the bound allows.

    Raises:
        ValueError: the bound cannot hold the longest sequence.
    """
    block_bytes = shape.block_bytes + drafter_block_bytes
    if config.kv_memory_gib is None:
        bound_bytes = (FREE_SHARE_GPU if device.type == "cuda" else FREE_SHARE) * free_bytes(device)
    else:
        bound_bytes = config.kv_memory_gib * 2**30
    bound = int(bound_bytes // block_bytes)
    own_blocks, prefix_blocks, longest = [], 0, 0
    for group in groups:
        shared = len(group.prefix_ids) // shape.block_size
        prefix_blocks += shared
        for seq in group.sequences:
            longest = max(longest, seq.max_tokens)
            own_blocks.append(-(-seq.max_tokens // shape.block_size) - shared)
    least = -(-longest // shape.block_size)
    if least > bound:
        raise ValueError(_too_little(least * block_bytes, bound_bytes, "allowed"))
    # the block per running sequence that admission keeps spare is part of the need, or a full batch would wait for it
    concurrent = heapq.nlargest(config.max_num_seqs, own_blocks)
    return least, min(bound, max(least, prefix_blocks + sum(concurrent) + len(concurrent)))


def is_little(kv_cache: KVCache, drafter_block_bytes: int = 0) -> bool:
    """Whether it may be kept, and what drafters keep beside it: a trainer would not miss it."""
    memory = kv_cache.memory_L2NHSD
    return memory.nbytes + kv_cache.num_blocks * drafter_block_bytes <= _little_bytes(memory.device)


def give_back(device: torch.device) -> None:
    """Have freed memory where others can take it in one piece: blocks of the allocator that a trainer's small tensors settle in
    would be lost for the next rollout."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _little_bytes(device: torch.device) -> float:
    return KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0.0


def _too_little(needed: float, there: float, how: str) -> str:
    return (
        f"KV memory for the longest sequence is {needed / 2**20:.1f} MiB, but {there / 2**20:.1f} MiB are {how}: raise "
        "engine.kv_memory_gib (or leave it null), or lower max_new_tokens (max_completion_length in a trainer)"
    )


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, with what torch holds unused; on CPU what the kernel calls available."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable line: set engine.kv_memory_gib")
