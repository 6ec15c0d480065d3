"""Kernels of Atlas-RL: torch (and Triton, on an accelerator), never atlas_rl.

Each op has a Triton kernel with a typed launcher in a module of its own, and a torch twin of the same signature in `reference`.
The names exported here pick by the device of their first argument.
"""

from __future__ import annotations

from importlib import import_module

import torch

from atlas_kernels import cpu, reference
from atlas_kernels.reference import row_keys

__all__ = [
    "coupled_sample",
    "cpu",
    "fused_linear",
    "gumbel_noise",
    "noise_bits",
    "rms_norm",
    "row_keys",
    "silu_mul",
    "uses_triton",
]


def noise_bits(keys_2N: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """31 uniform bits per (seed, position, token id); see `reference.noise_bits`."""
    return _module("noise", keys_2N).noise_bits(keys_2N, vocab_size)


def gumbel_noise(keys_2N: torch.Tensor, vocab_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard Gumbel noise per (seed, position, token id); see `reference.gumbel_noise`."""
    if dtype == torch.float64:  # no kernel of its own: only law tests sample in float64
        return reference.gumbel_noise(keys_2N, vocab_size, dtype)
    return _module("noise", keys_2N).gumbel_noise(keys_2N, vocab_size, dtype)


def coupled_sample(
    logits_NV: torch.Tensor, keys_2N: torch.Tensor | None, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token per row of logits, with its log-prob; see `reference.coupled_sample`."""
    on_cpu = not logits_NV.is_cuda and logits_NV.dtype == torch.float32
    if on_cpu and logits_NV.is_contiguous() and cpu.unavailable_reason() is None:
        return cpu.coupled_sample(logits_NV, keys_2N, temperature)
    return reference.coupled_sample(logits_NV, keys_2N, temperature)


def fused_linear(
    x_ND: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None] | None = None,
    *,
    norm_D: torch.Tensor | None = None,
    eps: float = 0.0,
    residual_NO: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """One to three Linears of one input with norm, gate and residual; see `reference.fused_linear`."""
    options = {"norm_D": norm_D, "eps": eps, "residual_NO": residual_NO, "gated": gated}
    return _module("linears", x_ND).fused_linear(x_ND, weights, biases, **options)


def rms_norm(x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of each row, in x's dtype; see `reference.rms_norm`."""
    return _module("linears", x_ND).rms_norm(x_ND, weight_D, eps)


def silu_mul(gate_up_NI: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up of the two halves of each row; see `reference.silu_mul`."""
    return _module("linears", gate_up_NI).silu_mul(gate_up_NI)


triton_everywhere = False
"""Set by tests: run the Triton kernels on CPU tensors too, through Triton's interpreter."""


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether ops on this tensor run as Triton kernels."""
    return tensor.is_cuda or triton_everywhere


def _module(name: str, tensor: torch.Tensor):
    """Where an op on this tensor is found: in the Triton module of this name, or among the twins."""
    return import_module(f"atlas_kernels.{name}") if uses_triton(tensor) else reference
