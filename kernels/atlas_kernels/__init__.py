"""Kernels of Atlas-RL: torch (and Triton, on an accelerator), never atlas_rl.

Each op has a Triton kernel with a typed launcher in a module of its own, and a torch twin of the same signature in `reference`.
The names exported here pick by the device of their first argument.
"""

from __future__ import annotations

import torch

from atlas_kernels import cpu, reference
from atlas_kernels.reference import row_keys

__all__ = ["coupled_sample", "cpu", "gumbel_noise", "noise_bits", "row_keys"]


def noise_bits(keys_2N: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """31 uniform bits per (seed, position, token id); see `reference.noise_bits`."""
    return _module(keys_2N).noise_bits(keys_2N, vocab_size)


def gumbel_noise(keys_2N: torch.Tensor, vocab_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard Gumbel noise per (seed, position, token id); see `reference.gumbel_noise`."""
    if dtype == torch.float64:  # no kernel of its own: only law tests sample in float64
        return reference.gumbel_noise(keys_2N, vocab_size, dtype)
    return _module(keys_2N).gumbel_noise(keys_2N, vocab_size, dtype)


def coupled_sample(
    logits_NV: torch.Tensor, keys_2N: torch.Tensor | None, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token per row of logits, with its log-prob; see `reference.coupled_sample`."""
    on_cpu = not logits_NV.is_cuda and logits_NV.dtype == torch.float32
    if on_cpu and logits_NV.is_contiguous() and cpu.unavailable_reason() is None:
        return cpu.coupled_sample(logits_NV, keys_2N, temperature)
    return reference.coupled_sample(logits_NV, keys_2N, temperature)


def _module(tensor: torch.Tensor):
    if not tensor.is_cuda:
        return reference
    from atlas_kernels import noise

    return noise
