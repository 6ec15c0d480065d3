"""Arms interleaved in one run, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch

from atlas_rl.bench.arms import ARMS, Arm
from atlas_rl.bench.workload import BenchConfig, Workload, build_workload, load_policy

PACKAGES = ("atlas-rl", "torch", "transformers", "trl", "numpy")


def run_bench(config: BenchConfig, arm_names: list[str], report: Callable[[str], None]) -> list[dict[str, Any]]:
    """One JSON object per workload, as DESIGN calls it: machine, versions, workload, arms, ratios."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    report("loading the policy")
    policy = load_policy(config.model)
    arms = {name: ARMS[name](policy) for name in arm_names}
    deadline = time.perf_counter() + config.max_seconds
    header = {"machine": machine(), "versions": versions(), "policy": policy_fields(policy)}
    results = []
    for workload_config in config.workloads:
        report(f"{workload_config.name}: preparing")
        workload = build_workload(workload_config, config, policy)
        measured = measure(workload, arms, config.repeats, deadline, report)
        lens = {"completion_tokens": sum(workload.lens), "longest": max(workload.lens), "sequences": len(workload.lens)}
        results.append(header | {"workload": asdict(workload_config) | lens} | measured)
    return results


def measure(
    workload: Workload, arms: dict[str, Arm], repeats: int, deadline: float, report: Callable[[str], None]
) -> dict[str, Any]:
    """`repeats` rounds of all arms in turn, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        if repeat > 1 and time.perf_counter() > deadline:
            break
        # every other round goes backwards: no arm always runs after the same other one
        for name in list(arms) if repeat % 2 else reversed(arms):
            report(f"{workload.config.name}: {name}, {f'repeat {repeat} of {repeats}' if repeat else 'warm-up'}")
            arms[name].start(workload, repeat)
            start = time.perf_counter()
            lens = arms[name].run(workload, repeat)
            elapsed = time.perf_counter() - start
            assert lens == workload.lens, f"{name} made other lengths than it was told to"
            if repeat:
                seconds[name].append(elapsed)
    num_tokens = sum(workload.lens)
    rows = {
        name: {"tokens_per_s": [num_tokens / s for s in seconds[name]], "seconds": seconds[name], "skipped": None}
        | arm.figures()
        for name, arm in arms.items()
    }
    return {"arms": rows, "ratios": ratios(seconds)}


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Speed of each arm over each other, pair by pair within a round."""
    result = {}
    for a in seconds:
        for b in seconds:
            if a != b:
                pairs = [sb / sa for sa, sb in zip(seconds[a], seconds[b], strict=True)]
                result[f"{a}/{b}"] = {"median": median(pairs), "min": min(pairs), "max": max(pairs)}
    return result


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def policy_fields(policy) -> dict[str, Any]:
    return {"architecture": type(policy).__name__, "parameters": sum(p.numel() for p in policy.parameters())}
