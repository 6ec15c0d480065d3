"""Kernels of Atlas-RL: torch (and Triton, on an accelerator), never atlas_rl.

Each op has a Triton kernel with a typed launcher in a module of its own, and a torch twin of the same signature in `reference`.
The names exported here pick by the device of their first argument.
"""

from __future__ import annotations

import torch

from atlas_kernels import reference
from atlas_kernels.reference import row_keys

__all__ = ["gumbel_noise", "noise_bits", "row_keys"]


def noise_bits(keys_2N: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """31 uniform bits per (seed, position, token id); see `reference.noise_bits`."""
    return _module(keys_2N).noise_bits(keys_2N, vocab_size)


def gumbel_noise(keys_2N: torch.Tensor, vocab_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard Gumbel noise per (seed, position, token id); see `reference.gumbel_noise`."""
    if dtype == torch.float64:  # no kernel of its own: only law tests sample in float64
        return reference.gumbel_noise(keys_2N, vocab_size, dtype)
    return _module(keys_2N).gumbel_noise(keys_2N, vocab_size, dtype)


def _module(tensor: torch.Tensor):
    if not tensor.is_cuda:
        return reference
    from atlas_kernels import noise

    return noise
