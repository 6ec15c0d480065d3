"""Section `policy`: the shipped small policy with its drafters, against plain decoding; and the output law on this device."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from atlas_rl.bench.arms import Arm, AtlasArm, AtlasPlain, AtlasStatic
from atlas_rl.bench.gpu import law
from atlas_rl.bench.gpu.section import Section, say
from atlas_rl.bench.runner import Measurement, size
from atlas_rl.bench.workload import (
    Batch,
    BenchConfig,
    Workload,
    WorkloadConfig,
    build_workload,
    load_policy,
)

ARMS: dict[str, type[AtlasArm]] = {"atlas_plain": AtlasPlain, "atlas_static": AtlasStatic, "atlas": AtlasArm}
DRAINING_TARGET, FLOOR_TARGET = 1.5, 0.97
LAW_SHARE = 0.25
"""Of the section's time."""


def run(section: Section) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        policy = section.part(f"{name}: policy", lambda dtype=dtype: _load(section, dtype), needs=5)
        if policy is None:
            continue
        section.results.pop(f"{name}: policy")
        last = dtype == torch.float32
        share = section.seconds_left * (1.0 if last else 0.5)
        _speeds(section, name, policy, time.perf_counter() + share * (1 - LAW_SHARE))
        _law(section, name, policy)
        del policy
        section.machine.release()


def _load(section: Section, dtype: torch.dtype) -> PreTrainedModel:
    return load_policy("shipped").to(section.machine.device, dtype)


def workloads(section: Section, policy: PreTrainedModel) -> list[Workload]:
    """The draining batches, and equal lengths on the same prompts; drafters live on over the repeats, as in training."""
    plan = section.plan
    bench = BenchConfig(min_repeats=plan.min_repeats, max_repeats=plan.max_repeats)
    config = WorkloadConfig(
        name="draining",
        num_prompts=plan.draining_prompts,
        num_samples=8,
        new_tokens=None,
        warm=plan.policy_warm,
        expect={"atlas/atlas_plain": DRAINING_TARGET},
    )
    draining = build_workload(config, bench, policy)
    short = [replace(b, lens=[min(n, plan.draining_tokens) for n in b.lens]) for b in draining.batches]
    found = [replace(draining, batches=short)]
    for num_prompts, num_samples in plan.policy_rows:
        rows = num_prompts * num_samples
        own = WorkloadConfig(
            name=f"{rows} rows",
            num_prompts=num_prompts,
            num_samples=num_samples,
            new_tokens=plan.policy_tokens,
            warm=plan.policy_warm,
            expect={"atlas/atlas_plain": FLOOR_TARGET},
        )
        found.append(Workload(config=own, batches=[_equal(own, batch) for batch in draining.batches]))
    return found


def _equal(config: WorkloadConfig, recorded: Batch) -> Batch:
    prompts = list(dict.fromkeys(recorded.prompts))[: config.num_prompts]
    prompts = [prompt for prompt in prompts for _ in range(config.num_samples)]
    return Batch(prompts=prompts, seeds=recorded.seeds[: len(prompts)], lens=[config.new_tokens] * len(prompts))


def _speeds(section: Section, dtype: str, policy: PreTrainedModel, deadline: float) -> None:
    plan, found = section.plan, workloads(section, policy)
    arms = section.part(f"{dtype}: arms", lambda: _arms(section, policy), needs=5)
    if arms is None:
        return
    section.results.pop(f"{dtype}: arms")
    bench = BenchConfig(min_repeats=plan.min_repeats, max_repeats=plan.max_repeats)
    for index, workload in enumerate(found):
        left = deadline - time.perf_counter()
        share = size(workload) / sum(map(size, found[index:]))
        end = time.perf_counter() + share * left
        name = f"{dtype}: {workload.config.name}"
        row = section.part(name, lambda w=workload, e=end: _measure(arms, w, bench, e), needs=2)
        for key, target in workload.config.expect.items():
            ratio = row and row["ratios"][key]["median"]
            section.judge(f"{name}: {key}", ratio, target)


def _arms(section: Section, policy: PreTrainedModel) -> dict[str, Arm]:
    arms: dict[str, Arm] = {name: kind(policy) for name, kind in ARMS.items()}
    for arm in arms.values():
        arm.graphs = section.machine.graphs
    return arms


def _measure(arms: dict[str, Arm], workload: Workload, bench: BenchConfig, end: float) -> dict[str, Any]:
    """Engines begin anew with each workload, and live on over its repeats with what they captured."""
    measurement = Measurement(workload, arms, bench)
    measurement.run(end, lambda text: None)
    if measurement.interrupted:
        raise KeyboardInterrupt
    if set(measurement.running) != set(arms):
        raise RuntimeError("; ".join(filter(None, measurement.skipped.values())))
    measured = measurement.to_dict()
    for name, arm in arms.items():
        captured = arm.engine.captured
        measured["arms"][name] |= {
            "fused": arm.view.fused is not None,
            "not_captured": "never" if captured is None else captured.failure,
            "benched": sorted(map(str, arm.engine.controller.benched)),
            "last_run": arm.engine.stats.to_dict(),
        }
    ratio = measured["ratios"]["atlas/atlas_plain"]
    say(f"    {workload.config.name}: atlas / atlas_plain {ratio['median']:.2f}")
    return measured


def _law(section: Section, dtype: str, policy: PreTrainedModel) -> None:
    row = section.part(f"{dtype}: output law", lambda: law.check(section, policy), needs=5)
    violations = None if row is None else sum(variant["violations"] for variant in row["variants"].values())
    section.judge(f"{dtype}: first differences that no float tie explains", violations, 0, at_least=False)
