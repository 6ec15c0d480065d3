"""Kernels of Atlas-RL: torch (and Triton, on an accelerator), never atlas_rl.

Each op has a Triton kernel with a typed launcher in a module of its own, and a torch twin of the same signature in `reference`.
The names exported here pick by the device of their first argument.
"""

from __future__ import annotations

from importlib import import_module

import torch

from atlas_kernels import cpu, reference
from atlas_kernels.reference import SharedPrefixes, StepInputs, row_keys
from atlas_kernels.self_check import unavailable_reason

__all__ = [
    "SharedPrefixes",
    "StepInputs",
    "coupled_sample",
    "cpu",
    "device_row_keys",
    "filter_thresholds",
    "finish_step",
    "fix_routes",
    "fused_linear",
    "gumbel_noise",
    "lk_hybrid",
    "noise_bits",
    "paged_attention",
    "prepare_step",
    "rms_norm",
    "rope_and_store",
    "row_keys",
    "silu_mul",
    "store_kv",
    "unavailable_reason",
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
    logits_NV: torch.Tensor,
    keys_2N: torch.Tensor | None,
    temperature: float,
    *,
    thresholds_N: torch.Tensor | None = None,
    forbidden: tuple[torch.Tensor, torch.Tensor] | None = None,
    token_ids_V: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token per row of logits, with its log-prob; see `reference.coupled_sample`."""
    is_plain = thresholds_N is None and forbidden is None and token_ids_V is None
    for_cpu = logits_NV.is_cpu and logits_NV.dtype == torch.float32 and logits_NV.is_contiguous()
    if is_plain and for_cpu and not triton_everywhere and cpu.unavailable_reason() is None:
        return cpu.coupled_sample(logits_NV, keys_2N, temperature)
    options = {"thresholds_N": thresholds_N, "forbidden": forbidden, "token_ids_V": token_ids_V}
    # float64 has no kernel of its own: only law tests sample in it
    module = reference if logits_NV.dtype == torch.float64 else _module("sampling", logits_NV)
    return module.coupled_sample(logits_NV, keys_2N, temperature, **options)


def filter_thresholds(
    logits_NV: torch.Tensor,
    temperature: float,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    forbidden: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The smallest logit / T that each row may draw, for `coupled_sample`; see `reference.filter_thresholds`."""
    ops = reference if logits_NV.dtype == torch.float64 else _module("sampling", logits_NV)
    return ops.filter_thresholds(logits_NV, temperature, top_k=top_k, top_p=top_p, min_p=min_p, forbidden=forbidden)


def device_row_keys(seeds_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """`row_keys` of seeds and positions that are on the device; see `reference.device_row_keys`."""
    return _module("steps", seeds_N).device_row_keys(seeds_N, positions_N)


def prepare_step(
    slots_R: torch.Tensor,
    last_tokens_S: torch.Tensor,
    starts_S: torch.Tensor,
    remaining_S: torch.Tensor,
    seeds_S: torch.Tensor,
    prompt_lens_S: torch.Tensor,
    tables_SM: torch.Tensor,
    drafts_RK: torch.Tensor,
    draft_lens_R: torch.Tensor | None,
    block_size: int,
) -> StepInputs:
    """The inputs of a captured decode step; see `reference.prepare_step`."""
    return _module("steps", slots_R).prepare_step(
        slots_R,
        last_tokens_S,
        starts_S,
        remaining_S,
        seeds_S,
        prompt_lens_S,
        tables_SM,
        drafts_RK,
        draft_lens_R,
        block_size,
    )


def finish_step(
    slots_R: torch.Tensor,
    input_ids_N: torch.Tensor,
    tokens_N: torch.Tensor,
    logprobs_N: torch.Tensor,
    query_lens_R: torch.Tensor,
    stop_ids_E: torch.Tensor,
    last_tokens_S: torch.Tensor,
    starts_S: torch.Tensor,
    remaining_S: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count right draft tokens and advance the rows' state in place; see `reference.finish_step`."""
    return _module("steps", slots_R).finish_step(
        slots_R,
        input_ids_N,
        tokens_N,
        logprobs_N,
        query_lens_R,
        stop_ids_E,
        last_tokens_S,
        starts_S,
        remaining_S,
    )


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
    """One to three Linears over one input, with norm, gate or residual; see `reference.fused_linear`."""
    options = {"norm_D": norm_D, "eps": eps, "residual_NO": residual_NO, "gated": gated}
    return _module("linears", x_ND).fused_linear(x_ND, weights, biases, **options)


def lk_hybrid(
    draft_logits_NV: torch.Tensor,
    target_logits_NF: torch.Tensor,
    vocab_ids_V: torch.Tensor | None = None,
    *,
    lambda_decay: float = 3.0,
    with_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A drafter's loss per row, its acceptance, and the loss's gradient; see `reference.lk_hybrid`."""
    module = reference if draft_logits_NV.dtype == torch.float64 else _module("distill", draft_logits_NV)
    options = {"lambda_decay": lambda_decay, "with_grad": with_grad}
    return module.lk_hybrid(draft_logits_NV, target_logits_NF, vocab_ids_V, **options)


def rms_norm(x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of each row, in x's dtype; see `reference.rms_norm`."""
    return _module("linears", x_ND).rms_norm(x_ND, weight_D, eps)


def silu_mul(gate_up_NI: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up of the two halves of each row; see `reference.silu_mul`."""
    return _module("linears", gate_up_NI).silu_mul(gate_up_NI)


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
    """Whether ops on this tensor run as Triton kernels: on a GPU, where they all compute what their twins do."""
    return triton_everywhere or (tensor.is_cuda and unavailable_reason(tensor.device) is None)


def fix_routes() -> None:
    """From now on no clock decides how something is computed, and so how it is rounded."""
    import_module("atlas_kernels.linears").ROUTES.measures = False


def _module(name: str, tensor: torch.Tensor):
    """Where an op on this tensor is found: in the Triton module of this name, or among the twins."""
    return import_module(f"atlas_kernels.{name}") if uses_triton(tensor) else reference
