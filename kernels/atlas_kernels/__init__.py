"""Kernels of Atlas-RL: torch (and Triton, on an accelerator), never atlas_rl.

Each op has a Triton kernel with a typed launcher in a module of its own, and a torch twin of the same signature in `reference`.
The names exported here pick by the device of their first argument.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from atlas_kernels import cpu, reference
from atlas_kernels.reference import SharedPrefixes, StepInputs
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

Arguments, Result = ParamSpec("Arguments"), TypeVar("Result")

triton_everywhere = False
"""Set by tests: run the Triton kernels on CPU tensors too, through Triton's interpreter."""


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether ops on this tensor run as Triton kernels: on a GPU, where they all compute what their twins do, and not in float64,
    which law tests alone use."""
    if tensor.dtype == torch.float64:
        return False
    return triton_everywhere or (tensor.is_cuda and unavailable_reason(tensor.device) is None)


def fix_routes() -> None:
    """From now on no clock decides how something is computed, and so how it is rounded."""
    import_module("atlas_kernels.linears").ROUTES.measures = False


def _module(name: str, tensor: torch.Tensor):
    """Where an op on this tensor is found: in the Triton module of this name, or among the twins."""
    return import_module(f"atlas_kernels.{name}") if uses_triton(tensor) else reference


def _dispatched(module: str, twin: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The op of a twin, with its signature and its docstring: run where its first argument says."""

    first = next(iter(inspect.signature(twin).parameters))

    @functools.wraps(twin)
    def op(*args: Any, **kwargs: Any) -> Any:
        tensor = args[0] if args else kwargs[first]
        return getattr(_module(module, tensor), twin.__name__)(*args, **kwargs)

    return op


noise_bits = _dispatched("noise", reference.noise_bits)
filter_thresholds = _dispatched("sampling", reference.filter_thresholds)
device_row_keys = _dispatched("steps", reference.device_row_keys)
prepare_step = _dispatched("steps", reference.prepare_step)
finish_step = _dispatched("steps", reference.finish_step)
fused_linear = _dispatched("linears", reference.fused_linear)
rms_norm = _dispatched("linears", reference.rms_norm)
silu_mul = _dispatched("linears", reference.silu_mul)
store_kv = _dispatched("rotary", reference.store_kv)
rope_and_store = _dispatched("rotary", reference.rope_and_store)
paged_attention = _dispatched("attention", reference.paged_attention)
lk_hybrid = _dispatched("distill", reference.lk_hybrid)


def row_keys(seeds: np.ndarray, positions: np.ndarray, device: torch.device) -> torch.Tensor:
    """Two 32-bit keys per row, made by the host; see `reference.row_keys`."""
    if device.type == "cpu" and cpu.unavailable_reason() is None:
        return cpu.row_keys(seeds, positions)
    return reference.row_keys(seeds, positions, device)


def gumbel_noise(keys_2N: torch.Tensor, vocab_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard Gumbel noise per (seed, position, token id); see `reference.gumbel_noise`."""
    if dtype == torch.float64:  # its argument is not: the keys are integers
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
    return _module("sampling", logits_NV).coupled_sample(logits_NV, keys_2N, temperature, **options)
