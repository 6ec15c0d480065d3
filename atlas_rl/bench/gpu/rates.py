"""Section `machine`: what this device's memory and multipliers really do. Everything else is compared with these rates."""

from __future__ import annotations

from typing import Any

import torch

from atlas_rl.bench.gpu.machine import Machine
from atlas_rl.bench.gpu.plan import Plan
from atlas_rl.bench.gpu.section import Section

MIN_REPEATS = 10


def run(section: Section) -> None:
    machine, plan = section.machine, section.plan
    section.part("device", machine.describe)
    section.part("copy_bytes_per_s", section.copy_rate)
    section.part("read_bytes_per_s", lambda: read_rate(machine, plan))
    section.part("matrix_flops_per_s", lambda: matrix_rate(machine, plan))


def copy_rate(machine: Machine, plan: Plan) -> float:
    """Bytes read and written per second of a device-to-device copy."""
    source = torch.randint(-128, 127, (plan.copy_bytes,), dtype=torch.int8, device=machine.device)
    target = torch.empty_like(source)
    seconds = machine.seconds([lambda: target.copy_(source)], max(MIN_REPEATS, plan.repeats))
    return 2 * plan.copy_bytes / seconds


def read_rate(machine: Machine, plan: Plan) -> float:
    """Bytes read per second by torch's sum; more than a copy's where the device reads faster than it turns around."""
    source = torch.randn(plan.copy_bytes // 4, device=machine.device)
    return plan.copy_bytes / machine.seconds([source.sum], max(MIN_REPEATS, plan.repeats))


def matrix_rate(machine: Machine, plan: Plan) -> dict[str, Any]:
    """Of a square bf16 product of random data: zeros would draw less power and run faster."""
    size = plan.matrix_size
    a, b = (torch.randn(size, size, device=machine.device).bfloat16() for _ in range(2))
    seconds = machine.seconds([lambda: torch.mm(a, b)], plan.repeats)
    return {"size": size, "seconds": seconds, "flops_per_s": 2 * size**3 / seconds}
