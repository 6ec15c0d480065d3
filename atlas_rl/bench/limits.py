"""What the engine cannot be faster than on this machine, measured in the same rounds as the arms.

Of a plain decode step, where all rows end together:
linears       the products of one forward, as the engine computes them, by themselves
memory        reading as many bytes as the step has to (weights once, keys and values once, those of a shared prompt too), from
              memory of that size
arithmetic    the products' multiply-adds at the highest rate that is seen: of one large product, oneDNN's (`torch.matmul` reaches
              less than half of it on AMD processors) or the engine's own, or of the step's linears

And of a whole rollout of an arm, drafts and draining batch included: the sum over its forwards of memory or arithmetic, whichever
takes longer, with the head where logits were asked for. Attention's own arithmetic, drafting and sampling are left out, so that
it is a bound from below.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import nn

from atlas_rl.bench.arms import AtlasArm, AtlasPlain, Forward
from atlas_rl.bench.judging import summarize
from atlas_rl.bench.workload import Workload
from atlas_rl.engine.linears import PackedLinear

PASSES = 7
"""Of each measurement in a round; their median counts."""
LARGE = 1024
"""Rows and columns of the large product."""


class Limits:
    """Measured right after the runs of `atlas_plain`."""

    def __init__(self, arm: AtlasPlain, workload: Workload) -> None:
        self.arm = arm
        batch = workload.batch(0)
        self.rows_end_together = len(set(batch.lens)) == 1
        self.linears = arm.view.packed_linears()
        self.inputs = [torch.randn(len(batch.lens), linear.in_features) for linear in self.linears]
        self.num_weights = sum(linear.num_weights for linear in self.linears)
        self.bytes_per_token = arm.bytes_per_token()
        self.num_head_weights = sum(linear.num_weights for linear in self.linears if linear is arm.view.head)
        num_cached = sum(map(len, set(batch.prompts))) + batch.num_tokens / 2  # halfway through
        self.buffer = torch.ones(self.num_weights + int(num_cached * self.bytes_per_token) // 4)
        self.multiplications = self.num_weights * len(batch.lens)
        self.large = torch.randn(LARGE, LARGE)
        self.large_onednn = torch.ops.mkldnn._reorder_linear_weight(self.large)
        self.large_packed = PackedLinear(nn.Linear(LARGE, LARGE, bias=False))
        self.seconds: dict[str, list[float]] = {"linears": [], "memory": [], "arithmetic": [], "decode_step": []}
        """Of a plain decode step."""
        self.rollouts: dict[str, list[tuple[float, list[tuple[float, float]]]]] = {}
        """By arm and repeat: seconds, and of each forward the bytes that it reads and the products' multiplications."""

    @classmethod
    def of(cls, arms: Mapping[str, Any], workload: Workload) -> Limits | None:
        """None where `atlas_plain` is not among these arms, or its policy has no packed products."""
        arm = arms.get("atlas_plain")
        return cls(arm, workload) if arm is not None and arm.view.packed_linears() else None

    @torch.inference_mode()
    def measure(self) -> None:
        self.seconds["decode_step"].append(self.arm.decode_step_seconds)
        linears = _median_seconds(self._run_linears)
        self.seconds["linears"].append(linears)
        self.seconds["memory"].append(_median_seconds(self.buffer.sum))
        large = min(_median_seconds(self._run_onednn), _median_seconds(lambda: self.large_packed(self.large)))
        self.seconds["arithmetic"].append(min(linears, large * self.multiplications / LARGE**3))

    def note(self, name: str, arm: AtlasArm) -> None:
        """What an arm's last run has cost, and what it has computed."""
        work = [self._work(forward, arm.engine.config.engine.block_size) for forward in arm.forwards]
        self.rollouts.setdefault(name, []).append((arm.engine.stats.seconds["total"], work))

    def _work(self, forward: Forward, block_size: int) -> tuple[float, float]:
        """Bytes and multiplications."""
        num_inner = self.num_weights - self.num_head_weights
        num_weights = self.num_weights if forward.num_logits else num_inner
        num_bytes = 4 * num_weights + forward.num_read(block_size) * self.bytes_per_token
        return num_bytes, forward.num_tokens * num_inner + forward.num_logits * self.num_head_weights

    def to_dict(self) -> dict[str, Any] | None:
        """Of a plain decode step; None where rows do not end together, or nothing has been measured."""
        if not self.rows_end_together or not self.seconds["linears"]:
            return None
        row: dict[str, Any] = {f"{name}_s": median(seconds) for name, seconds in self.seconds.items()}
        return row | {"step_over_linears": self.step_over_linears()}

    def step_over_linears(self) -> dict[str, Any]:
        pairs = zip(self.seconds["decode_step"], self.seconds["linears"], strict=True)
        return summarize([step / linears for step, linears in pairs])

    def bounds(self) -> dict[str, dict[str, float]]:
        """By arm: medians of a rollout's seconds, and of what its forwards cannot take less than."""
        if not self.seconds["memory"]:
            return {}
        per_byte = median(self.seconds["memory"]) / (4 * self.buffer.numel())
        per_multiplication = median(self.seconds["arithmetic"]) / self.multiplications
        bounds = {}
        for name, rollouts in self.rollouts.items():
            columns = {"seconds": [], "bound_s": [], "memory_s": [], "arithmetic_s": []}
            for seconds, work in rollouts:
                forwards = [(num_bytes * per_byte, number * per_multiplication) for num_bytes, number in work]
                columns["seconds"].append(seconds)
                columns["bound_s"].append(sum(map(max, forwards)))
                columns["memory_s"].append(sum(memory for memory, _ in forwards))
                columns["arithmetic_s"].append(sum(arithmetic for _, arithmetic in forwards))
            bounds[name] = {column: median(values) for column, values in columns.items()}
        return bounds

    def _run_linears(self) -> None:
        for linear, x in zip(self.linears, self.inputs, strict=True):
            linear(x)

    def _run_onednn(self) -> None:
        torch.ops.mkldnn._linear_pointwise(self.large, self.large_onednn, None, "none", [], "")


def _median_seconds(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds)
