"""Torch twins of the kernels: the oracle of their tests, and what runs on CPU where there is no kernel for it."""

from atlas_kernels.reference.attention import SharedPrefixes, paged_attention, store_kv
from atlas_kernels.reference.layers import fused_linear, packed_linear, rms_norm, rope_and_store, silu_mul
from atlas_kernels.reference.losses import lk_hybrid
from atlas_kernels.reference.noise import MAX_GUMBEL, MIN_GUMBEL, gumbel_noise, noise_bits, row_keys
from atlas_kernels.reference.sampling import coupled_sample, filter_thresholds
from atlas_kernels.reference.steps import StepInputs, device_row_keys, finish_step, prepare_step

__all__ = [
    "MAX_GUMBEL",
    "MIN_GUMBEL",
    "SharedPrefixes",
    "StepInputs",
    "coupled_sample",
    "device_row_keys",
    "filter_thresholds",
    "finish_step",
    "fused_linear",
    "gumbel_noise",
    "lk_hybrid",
    "noise_bits",
    "packed_linear",
    "paged_attention",
    "prepare_step",
    "rms_norm",
    "rope_and_store",
    "row_keys",
    "silu_mul",
    "store_kv",
]
