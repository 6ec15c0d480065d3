"""What launchers of kernels ask about the device."""

from __future__ import annotations

import functools

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, whose arithmetic is wrong for bf16."""


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of the device; an H100's where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
