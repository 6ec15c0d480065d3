"""What a plain decode step cannot be faster than on this machine, measured in the same rounds as the arms.

linears       the products of one forward, as the engine computes them, by themselves
memory        reading as many bytes as the step has to (weights once, keys and values once), from memory of that size
arithmetic    the products' multiply-adds at the rate of one large product of the same kind (`torch.matmul` reaches less than
              half of it on AMD processors)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from atlas_rl.bench.arms import AtlasPlain
from atlas_rl.bench.judging import summarize
from atlas_rl.bench.workload import Workload

PASSES = 7
"""Of each measurement in a round; their median counts."""
LARGE = 1024
"""Rows and columns of the large product."""


class Limits:
    """Of a workload whose rows all end together, so that every step has as many."""

    def __init__(self, arm: AtlasPlain, workload: Workload) -> None:
        self.arm = arm
        batch = workload.batch(0)
        self.linears = arm.view.packed_linears()
        self.inputs = [torch.randn(len(batch.lens), linear.in_features) for linear in self.linears]
        num_weights = sum(linear.num_weights for linear in self.linears)
        shape = arm.view.kv_shape(block_size=1)
        num_cached = sum(len(p) + n / 2 for p, n in zip(batch.prompts, batch.lens, strict=True))  # halfway through
        self.buffer = torch.ones(num_weights + int(num_cached * shape.block_bytes) // 4)
        self.large = torch.randn(LARGE, LARGE)
        self.large_packed = torch.ops.mkldnn._reorder_linear_weight(self.large)
        self.multiplications = num_weights * len(batch.lens)
        self.seconds: dict[str, list[float]] = {"linears": [], "memory": [], "arithmetic": [], "decode_step": []}

    @classmethod
    def of(cls, arm: AtlasPlain | None, workload: Workload) -> Limits | None:
        """None where there is no such arm, its policy has no packed products, or its batch drains."""
        fits = arm is not None and arm.view.packed_linears() and workload.config.new_tokens is not None
        return cls(arm, workload) if fits else None

    @torch.inference_mode()
    def measure(self) -> None:
        """Right after a run of the arm."""
        self.seconds["decode_step"].append(self.arm.decode_step_seconds)
        self.seconds["linears"].append(_median_seconds(self._run_linears))
        self.seconds["memory"].append(_median_seconds(self.buffer.sum))
        large = _median_seconds(self._run_large)
        self.seconds["arithmetic"].append(large * self.multiplications / LARGE**3)

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {f"{name}_s": median(seconds) for name, seconds in self.seconds.items()}
        return row | {"step_over_linears": self.step_over_linears()}

    def step_over_linears(self) -> dict[str, Any]:
        pairs = zip(self.seconds["decode_step"], self.seconds["linears"], strict=True)
        return summarize([step / linears for step, linears in pairs])

    def _run_linears(self) -> None:
        for linear, x in zip(self.linears, self.inputs, strict=True):
            linear(x)

    def _run_large(self) -> None:
        torch.ops.mkldnn._linear_pointwise(self.large, self.large_packed, None, "none", [], "")


def _median_seconds(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds)
