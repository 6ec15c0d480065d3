"""Kernels of Atlas-RL: torch (and Triton, on an accelerator), never atlas_rl.

Each op has a Triton kernel with a typed launcher in a module of its own, and a torch twin of the same signature in `reference`.
The names exported here pick by the device of their first argument.
"""

from __future__ import annotations

import torch

from atlas_kernels import reference

__all__ = ["gumbel_noise", "noise_bits"]


def noise_bits(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """31 uniform bits per (seed, position, token id); see `reference.noise_bits`."""
    return _module(seeds).noise_bits(seeds, positions, vocab_size)


def gumbel_noise(
    seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Standard Gumbel noise per (seed, position, token id); see `reference.gumbel_noise`."""
    if dtype == torch.float64:  # no kernel of its own: only law tests sample in float64
        return reference.gumbel_noise(seeds, positions, vocab_size, dtype)
    return _module(seeds).gumbel_noise(seeds, positions, vocab_size, dtype)


def _module(tensor: torch.Tensor):
    if not tensor.is_cuda:
        return reference
    from atlas_kernels import noise

    return noise
