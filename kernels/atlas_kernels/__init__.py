"""Kernels of Atlas-RL: torch (and Triton, on an accelerator), never atlas_rl.

Each op has a Triton kernel with a typed launcher in a module of its own, and a torch twin of the same signature in `reference`.
The names exported here pick by the device of their first argument.
"""

from __future__ import annotations

from importlib import import_module

import torch

from atlas_kernels import cpu, reference
from atlas_kernels.reference import SharedPrefixes, row_keys

__all__ = [
    "SharedPrefixes",
    "coupled_sample",
    "cpu",
    "gumbel_noise",
    "noise_bits",
    "paged_attention",
    "rope_and_store",
    "row_keys",
    "store_kv",
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


def store_kv(key_NHD: torch.Tensor, value_NHD: torch.Tensor, slots_N: torch.Tensor, kv_2BHSD: torch.Tensor) -> None:
    """Put one key and value per token into one layer of the cache; see `reference.store_kv`."""
    _module("rotary", key_NHD).store_kv(key_NHD, value_NHD, slots_N, kv_2BHSD)


def rope_and_store(
    qkv_ND: torch.Tensor,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
    cos_PD: torch.Tensor,
    sin_PD: torch.Tensor,
    positions_N: torch.Tensor,
    slots_N: torch.Tensor,
    kv_2BHSD: torch.Tensor,
) -> torch.Tensor:
    """Norm and rotate queries and keys, store keys and values, return the queries; see `reference.rope_and_store`."""
    places = (cos_PD, sin_PD, positions_N, slots_N, kv_2BHSD)
    return _module("rotary", qkv_ND).rope_and_store(qkv_ND, query_norm, key_norm, eps, *places)


def paged_attention(
    query_NHD: torch.Tensor,
    kv_2BHSD: torch.Tensor,
    block_tables_RM: torch.Tensor,
    starts_R: torch.Tensor,
    query_lens_R: torch.Tensor,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    query_starts_R: torch.Tensor | None = None,
    max_query_len: int | None = None,
    shared: SharedPrefixes | None = None,
) -> torch.Tensor:
    """Causal attention of each row's tokens over the row's own blocks; see `reference.paged_attention`."""
    return _module("attention", query_NHD).paged_attention(
        query_NHD,
        kv_2BHSD,
        block_tables_RM,
        starts_R,
        query_lens_R,
        scaling,
        sliding_window,
        softcap,
        query_starts_R=query_starts_R,
        max_query_len=max_query_len,
        shared=shared,
    )


triton_everywhere = False
"""Set by tests: run the Triton kernels on CPU tensors too, through Triton's interpreter."""


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether ops on this tensor run as Triton kernels."""
    return tensor.is_cuda or triton_everywhere


def _module(name: str, tensor: torch.Tensor):
    """Where an op on this tensor is found: in the Triton module of this name, or among the twins."""
    return import_module(f"atlas_kernels.{name}") if uses_triton(tensor) else reference
