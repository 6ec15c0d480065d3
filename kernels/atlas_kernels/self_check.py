"""Whether every kernel computes on this device what its torch twin computes: no machine's word is taken for it.

A check makes inputs of some sizes, runs the Triton launcher on them and the twin, in float64 where it can, and measures how far
they are apart. It calls the launchers of the Triton modules themselves, whatever the device, and never the dispatchers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from importlib import import_module

import torch

from atlas_kernels import checks, layer_checks
from atlas_kernels.checks import Inputs, Sizes, WrongResult

logger = logging.getLogger(__name__)

MODULES = {
    "noise_bits": "noise",
    "gumbel_noise": "noise",
    "device_row_keys": "steps",
    "prepare_step": "steps",
    "finish_step": "steps",
    "store_kv": "rotary",
    "rope_and_store": "rotary",
    "paged_attention": "attention",
    "rms_norm": "linears",
    "silu_mul": "linears",
    "fused_linear": "linears",
    "coupled_sample": "sampling",
    "filter_thresholds": "sampling",
    "lk_hybrid": "distill",
}
"""Where each op's launcher is."""
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 5e-3, torch.float32: 2e-4}
"""Of `checks.relative_error`: rounding stays well below, a wrong tile far above."""
TORCH_TOLERANCE = 0.02
"""Of float32 products that may be torch's own, which may be made in TF32."""
POISON_BYTES = 2**19
SMALL = Sizes()


def failures(device: torch.device, sizes: Sizes = SMALL) -> dict[str, str]:
    """What is wrong, by op. Empty: everything is right."""
    found: dict[str, str] = {}
    for name in MODULES:
        for dtype in dtypes_of(name):
            try:
                error_of(name, device, dtype, sizes)
            except Exception as error:  # a compiler's, a driver's, ours: each means that the kernel cannot be used
                lines = str(error).strip().splitlines() or [""]
                found.setdefault(name, f"{type(error).__name__}: {lines[0]} ({dtype})")
    return found


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    """That an op has variants for; one for those of integers."""
    if name in ("noise_bits", "gumbel_noise", "device_row_keys", "prepare_step", "finish_step"):
        return (torch.float32,)
    return torch.bfloat16, torch.float32


@torch.no_grad()
def error_of(name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes = SMALL) -> float:
    """How far a kernel is from its twin, relative to the size of its results.

    Raises:
        WrongResult: too far. And whatever compiling and launching raise.
    """
    launcher = getattr(import_module(f"atlas_kernels.{MODULES[name]}"), name)
    _poison(device)
    with torch.autocast(device.type, enabled=False):
        error = _check_of(name)(launcher, Inputs(sizes, device, dtype))
    limit = TORCH_TOLERANCE if name == "fused_linear" and dtype == torch.float32 else TOLERANCE[dtype]
    if not error <= limit:
        raise WrongResult(f"{name} is off by {error:.2g} of the size of its results")
    return error


def _check_of(name: str) -> Callable[[Callable, Inputs], float]:
    return getattr(checks, f"check_{name}", None) or getattr(layer_checks, f"check_{name}")


def _poison(device: torch.device) -> None:
    """Leave NaN in the memory that outputs are likely to be made of."""
    blocks = [torch.full((POISON_BYTES // 4,), torch.nan, device=device) for _ in range(16)]
    del blocks


_reasons: dict[torch.device, str | None] = {}


def unavailable_reason(device: torch.device) -> str | None:
    """Why this device's work is done by the torch twins instead; None: by the kernels. Found out at the first question, which
    takes the time to compile them. While a graph is captured nothing can be tried: then they are taken to work."""
    if device in _reasons:
        return _reasons[device]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    logger.info("checking Triton's kernels on %s; the first time they are compiled, which takes up to a minute", device)
    _reasons[device] = None  # whoever asks meanwhile
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        wrong = failures(device)
    if wrong:
        name, reason = next(iter(wrong.items()))
        others = f" (and {len(wrong) - 1} more kernels)" if len(wrong) > 1 else ""
        _reasons[device] = f"{name}{others}: {reason}"
        logger.warning("Triton's kernels are not used on %s, which makes it slower: %s", device, _reasons[device])
    return _reasons[device]
