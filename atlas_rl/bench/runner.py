"""Arms interleaved in one run, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from atlas_rl.bench import FIXED_ARM
from atlas_rl.bench.arms import (
    Arm,
    AtlasAdaptive,
    AtlasArm,
    AtlasPlain,
    AtlasStatic,
    AtlasSuffix,
    HFContinuousBatching,
    HFGenerate,
    fixed_arm,
)
from atlas_rl.bench.judging import STEP, judge, summarize
from atlas_rl.bench.limits import Limits
from atlas_rl.bench.vllm_arm import VLLM
from atlas_rl.bench.workload import BenchConfig, Workload, build_workload, load_policy

ARMS: dict[str, type[Arm]] = {
    "hf_generate": HFGenerate,
    "hf_continuous_batching": HFContinuousBatching,
    "vllm": VLLM,
    "atlas_plain": AtlasPlain,
    "atlas_static": AtlasStatic,
    "atlas_adaptive": AtlasAdaptive,
    "atlas_suffix": AtlasSuffix,
    "atlas": AtlasArm,
}
PACKAGES = ("atlas-rl", "torch", "transformers", "trl", "numpy")


def run_bench(config: BenchConfig, arm_names: list[str], report: Callable[[str], None]) -> list[dict[str, Any]]:
    """One JSON object per workload, as DESIGN calls it: machine, versions, workload, arms, ratios; and limits, expectations."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    report("loading the policy")
    policy = load_policy(config.model)
    workloads = [build_workload(workload_config, config, policy) for workload_config in config.workloads]
    header = {"machine": machine(), "versions": versions(), "policy": policy_fields(policy)}
    arms: dict[str, Arm] = {}
    results = []
    try:
        for name in arm_names:
            report(f"starting {name}")
            fixed = FIXED_ARM.fullmatch(name)
            arms[name] = (fixed_arm(fixed[1], int(fixed[2])) if fixed else ARMS[name])(policy)
            header["versions"] |= arms[name].versions
        end = time.perf_counter() + config.max_seconds
        for index, workload in enumerate(workloads):
            now = time.perf_counter()
            # what a workload leaves of its share is the later ones'
            share = size(workload) / sum(map(size, workloads[index:]))
            measured = Measurement(workload, arms, config).run(now + share * (end - now), report)
            results.append(header | {"workload": workload_fields(workload)} | measured)
    finally:
        for arm in arms.values():
            arm.close()
    return results


def size(workload: Workload) -> float:
    """About proportional to the time of a round: a decode step costs its tokens, and about eight more whatever its batch."""
    batch = workload.batch(1)
    return batch.num_tokens + 8 * max(batch.lens)


class Measurement:
    """Rounds of all arms in turn over one workload, until every ratio asked for is decided or the time is spent."""

    def __init__(self, workload: Workload, arms: dict[str, Arm], config: BenchConfig) -> None:
        self.workload = workload
        self.arms = arms
        self.config = config
        self.running = [name for name, arm in arms.items() if arm.skipped is None]
        self.seconds: dict[str, list[float]] = {name: [] for name in arms}
        """Of the counted rounds. An arm whose ratios are all decided rests, so these lists may differ in length."""
        self.figures: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
        self.limits = Limits.of(arms["atlas_plain"] if "atlas_plain" in self.running else None, workload)

    def run(self, deadline: float, report: Callable[[str], None]) -> dict[str, Any]:
        for repeat in range(self.config.max_repeats + 1):
            late = repeat > 1 and time.perf_counter() > deadline
            names = self._names_of_round(repeat)
            if late or not names:
                break
            # every other round goes backwards: no arm always runs after the same other one
            for name in names if repeat % 2 else reversed(names):
                report(f"{self.workload.config.name}: {name}, {f'repeat {repeat}' if repeat else 'warm-up'}")
                self._run_arm(name, repeat)
        return self._to_dict()

    def _names_of_round(self, repeat: int) -> list[str]:
        """The first rounds are everybody's; then only arms of a ratio that is not decided take part."""
        if repeat <= self.config.min_repeats:
            return self.running
        needed = {name for pair in self._asked_pairs() if not self._ratio(*pair)["decided"] for name in pair}
        if self.limits is not None and not self.limits.step_over_linears()["decided"]:
            needed.add("atlas_plain")
        return [name for name in self.running if name in needed]

    def _run_arm(self, name: str, repeat: int) -> None:
        arm, batch = self.arms[name], self.workload.batch(repeat)
        arm.start(self.workload, repeat)
        seconds, lens = arm.timed(batch)
        assert lens == batch.lens, f"{name} made other lengths than it was told to"
        if repeat:
            self.seconds[name].append(seconds)
            self.figures[name].append(arm.figures())
            if name == "atlas_plain" and self.limits is not None:
                self.limits.measure()

    def _asked_pairs(self) -> list[tuple[str, str]]:
        """Each arm against the first, the engine's arms against its plain one, and what the workload expects."""
        pairs = [(name, self.running[0]) for name in self.running[1:]]
        pairs += [(name, "atlas_plain") for name in ("atlas_suffix", "atlas")]
        pairs += [tuple(key.split("/")) for key in self.workload.config.expect if key != STEP]
        return [pair for pair in dict.fromkeys(pairs) if set(pair) <= set(self.running)]

    def _ratio(self, a: str, b: str) -> dict[str, Any]:
        """Speed of arm a over arm b, from the rounds in which both took part: no arm comes back once it rests."""
        return summarize([sb / sa for sa, sb in zip(self.seconds[a], self.seconds[b])])

    def _to_dict(self) -> dict[str, Any]:
        ratios = {f"{a}/{b}": self._ratio(a, b) for a in self.running for b in self.running if a != b}
        limits = None if self.limits is None else self.limits.to_dict()
        judged = ratios | ({STEP: limits[STEP]} if limits else {})
        expectations = {
            key: judge(judged.get(key), target, at_least=key != STEP)
            for key, target in self.workload.config.expect.items()
        }
        arms = {name: self._arm_fields(name) for name in self.arms}
        return {"arms": arms, "ratios": ratios, "limits": limits, "expectations": expectations}

    def _arm_fields(self, name: str) -> dict[str, Any]:
        arm, seconds = self.arms[name], self.seconds[name]
        speeds = [self.workload.batch(repeat).num_tokens / s for repeat, s in enumerate(seconds, start=1)]
        fields = {"tokens_per_s": speeds, "seconds": seconds, "skipped": arm.skipped}
        figures = self.figures[name]
        if figures and figures[0]:
            fields["tokens_per_decode_step"] = fmean(row["tokens_per_decode_step"] for row in figures)
            fields["peak_bytes"] = max(row["peak_bytes"] for row in figures)
        return fields


def workload_fields(workload: Workload) -> dict[str, Any]:
    """Its configuration, and what the first counted repeat amounts to."""
    batch = workload.batch(1)
    return asdict(workload.config) | {
        "completion_tokens": batch.num_tokens,
        "longest": max(batch.lens),
        "sequences": len(batch.lens),
        "batches": len(workload.batches),
        "drafter": "lives on over the repeats" if workload.config.warm else "starts every repeat from nothing",
    }


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
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


def policy_fields(policy: PreTrainedModel) -> dict[str, Any]:
    return {"architecture": type(policy).__name__, "parameters": sum(p.numel() for p in policy.parameters())}
