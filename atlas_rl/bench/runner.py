"""Arms interleaved in one run, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from atlas_rl.bench import FAILED, FIXED_ARM, is_engine
from atlas_rl.bench.arms import (
    Arm,
    AtlasAdaptive,
    AtlasArm,
    AtlasPlain,
    AtlasStatic,
    AtlasSuffix,
    fixed_arm,
)
from atlas_rl.bench.hf_arms import HFContinuousBatching, HFGenerate, HFPromptLookup
from atlas_rl.bench.judging import MAX_HALF_WIDTH, PEER_HALF_WIDTH, STEP, judge, summarize
from atlas_rl.bench.limits import Limits
from atlas_rl.bench.vllm_arm import VLLM, VLLMNgram, VLLMSuffix
from atlas_rl.bench.workload import BenchConfig, Workload, WorkloadConfig, build_workload, load_policy

ARMS: dict[str, type[Arm]] = {
    "hf_generate": HFGenerate,
    "hf_continuous_batching": HFContinuousBatching,
    "hf_prompt_lookup": HFPromptLookup,
    "vllm": VLLM,
    "vllm_ngram": VLLMNgram,
    "vllm_suffix": VLLMSuffix,
    "atlas_plain": AtlasPlain,
    "atlas_static": AtlasStatic,
    "atlas_adaptive": AtlasAdaptive,
    "atlas_suffix": AtlasSuffix,
    "atlas": AtlasArm,
}
logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
"""Of the checkout, where this is one."""
PACKAGES = ("atlas-rl", "torch", "transformers", "trl", "numpy")
BOUNDED = ("atlas_plain", "atlas")
"""Arms whose time is held against the machine's limits."""
STEP_TOKENS = 32
"""What a decode step costs whatever its batch, in tokens."""
TYPICAL_ROUNDS = 12
"""Of a workload that has as many as its ratios need."""


def run_bench(
    config: BenchConfig,
    arm_names: list[str],
    report: Callable[[str, float], None],
    keep: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """One JSON object per workload: machine, versions, workload, arms, ratios; and limits, bounds, expectations, and when it
    started.

    Args:
        report: told what is being done, and how many of the seconds for measuring are spent.
        keep: given the results so far after every workload. One that is interrupted is the last, with what was measured of it.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    def prepare(what: str) -> None:
        report(what, 0.0)

    def measure(what: str) -> None:
        report(what, config.max_seconds - (end - time.perf_counter()))

    prepare("loading the policy")
    policy = load_policy(config.model, config.added_layers)
    start_weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    workloads = [build_workload(workload_config, config, policy, prepare) for workload_config in config.workloads]
    header = {"machine": machine(), "versions": versions(), "policy": policy_fields(policy, config)}
    arms: dict[str, Arm] = {}
    results = []
    try:
        for name in arm_names:
            if not any(takes(workload_config, name) for workload_config in config.workloads):
                continue
            prepare(f"starting {name}")
            fixed = FIXED_ARM.fullmatch(name)
            arms[name] = (fixed_arm(fixed[1], int(fixed[2])) if fixed else ARMS[name])(policy)
            header["versions"] |= arms[name].versions
        end = time.perf_counter() + config.max_seconds
        for index, workload in enumerate(workloads):
            now = time.perf_counter()
            # what a workload leaves of its share is the later ones'
            share = size(workload) / sum(map(size, workloads[index:]))
            policy.load_state_dict(start_weights)
            measurement = Measurement(workload, arms, config)
            measurement.run(now + share * (end - now), measure)
            results.append(header | {"workload": workload_fields(workload)} | measurement.to_dict())
            keep(results)
            if measurement.interrupted:
                break
    finally:
        for arm in arms.values():
            arm.close()
    return results


def takes(workload: WorkloadConfig, arm_name: str) -> bool:
    """Whether an arm takes part in it."""
    return workload.arms is None or arm_name in workload.arms


def size(workload: Workload) -> float:
    """About proportional to the time that a workload wants: a decode step costs its tokens, and some more whatever its batch. A
    run in which the policy moves is made whole."""
    batch = workload.batch(1)
    rounds = len(workload.batches) / TYPICAL_ROUNDS if workload.moves else 1
    num_read = sum(map(len, batch.prompts))
    return rounds * (num_read + batch.num_tokens + STEP_TOKENS * max(batch.lens))


class Measurement:
    """Rounds of all arms in turn over one workload, until every ratio asked for is decided or the time is spent."""

    def __init__(self, workload: Workload, arms: dict[str, Arm], config: BenchConfig) -> None:
        self.workload = workload
        self.arms = {name: arm for name, arm in arms.items() if takes(workload.config, name)}
        self.config = config
        self.skipped = {name: arm.skipped or arm.cannot(workload) for name, arm in self.arms.items()}
        self.seconds: dict[str, list[float]] = {name: [] for name in self.arms}
        """Of the counted rounds. An arm whose ratios are all decided rests, so these lists may differ in length."""
        self.tokens: dict[str, list[int]] = {name: [] for name in self.arms}
        """Made in these seconds."""
        self.figures: dict[str, list[dict[str, Any]]] = {name: [] for name in self.arms}
        self.limits = Limits.of({name: self.arms[name] for name in self.running}, workload)
        self.interrupted = False
        self.started = datetime.now(timezone.utc)

    @property
    def running(self) -> list[str]:
        return [name for name in self.arms if self.skipped[name] is None]

    def run(self, deadline: float, report: Callable[[str], None]) -> None:
        """Ends early, with what has been measured, when it is interrupted (Ctrl-C)."""
        try:
            self._run(deadline, report)
        except KeyboardInterrupt:
            self.interrupted = True

    def _run(self, deadline: float, report: Callable[[str], None]) -> None:
        moves = self.workload.moves
        for repeat in range((len(self.workload.batches) if moves else self.config.max_repeats) + 1):
            late = repeat > 1 and not moves and time.perf_counter() > deadline
            names = self.running if moves else self._names_of_round(repeat)
            if late or not names:
                break
            weights = self.workload.batch(repeat).weights
            if weights is not None:
                self.arms[names[0]].policy.load_state_dict(weights)
            # every other round goes backwards: no arm always runs after the same other one
            for name in names if repeat % 2 else reversed(names):
                report(f"{self.workload.config.name}: {name}, {f'repeat {repeat}' if repeat else 'warm-up'}")
                self._try_arm(name, repeat)

    def _names_of_round(self, repeat: int) -> list[str]:
        """The first rounds are everybody's; then only arms of a ratio that is not decided take part."""
        if repeat <= self.config.min_repeats:
            return self.running
        needed = {name for pair in self._asked_pairs() if self._is_open(*pair) for name in pair}
        expects_step = STEP in self.workload.config.expect and self.limits is not None
        if expects_step and not self.limits.step_over_linears()["decided"]:
            needed.add("atlas_plain")
        return [name for name in self.running if name in needed]

    def _is_open(self, a: str, b: str) -> bool:
        """Whether more rounds are to be spent on a ratio: of one that is expected, until it is clear on which side it lies."""
        ratio = self._ratio(a, b)
        target = self.workload.config.expect.get(f"{a}/{b}")
        if target is None or ratio["half_width"] is None:
            return not ratio["decided"]
        is_clear = judge(ratio, target)["verdict"] in ("passed", "missed")
        return not (is_clear and ratio["half_width"] <= PEER_HALF_WIDTH)

    def _try_arm(self, name: str, repeat: int) -> None:
        """An arm that fails takes no further part, here and in what follows; what it has measured stays."""
        try:
            self._run_arm(name, repeat)
        except Exception as error:
            arm = self.arms[name]
            reason = f"{FAILED}{f'repeat {repeat}' if repeat else 'the warm-up'} of {self.workload.config.name}"
            arm.skipped = self.skipped[name] = f"{reason}: {type(error).__name__}: {error}"
            arm.close()
            if is_engine(name):
                logger.exception("%s %s", name, reason)

    def _run_arm(self, name: str, repeat: int) -> None:
        arm, batch = self.arms[name], self.workload.batch(repeat)
        arm.start(self.workload, repeat)
        seconds, lens = arm.timed(batch)
        if arm.ends_by_itself(batch):
            fits = len(lens) == len(batch.lens) and min(lens) > 0 and max(lens) <= batch.own.max_new_tokens
        else:
            fits = lens == batch.lens
        assert fits, f"{name} made other lengths than it was told to"
        if not repeat:
            return
        self.tokens[name].append(sum(lens))  # first: Ctrl-C may fall between
        self.seconds[name].append(seconds)
        self.figures[name].append(arm.figures())
        if self.limits is not None and name in BOUNDED:
            self.limits.note(name, arm)
            if name == "atlas_plain":
                self.limits.measure()

    def _asked_pairs(self) -> list[tuple[str, str]]:
        """Each arm against the first, the engine's arms against its plain one, and what the workload expects."""
        pairs = [(name, self.running[0]) for name in self.running[1:]]
        pairs += [(name, "atlas_plain") for name in ("atlas_suffix", "atlas")]
        pairs += [tuple(key.split("/")) for key in self.workload.config.expect if key != STEP]
        return [pair for pair in dict.fromkeys(pairs) if set(pair) <= set(self.running)]

    def _ratio(self, a: str, b: str) -> dict[str, Any]:
        """Tokens per second of arm a over arm b's, from the rounds in which both took part: no arm comes back once it rests."""
        max_half_width = MAX_HALF_WIDTH if is_engine(a) and is_engine(b) else PEER_HALF_WIDTH
        return summarize([sa / sb for sa, sb in zip(self._speeds(a), self._speeds(b))], max_half_width)

    def _speeds(self, name: str) -> list[float]:
        """Tokens per second."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens[name], self.seconds[name])]

    def to_dict(self) -> dict[str, Any]:
        measured = [name for name in self.arms if self.seconds[name]]
        ratios = {f"{a}/{b}": self._ratio(a, b) for a in measured for b in measured if a != b}
        limits = None if self.limits is None else self.limits.to_dict()
        judged = ratios | ({STEP: limits[STEP]} if limits else {})
        expectations = {
            key: judge(judged.get(key), target, at_least=key != STEP)
            for key, target in self.workload.config.expect.items()
        }
        return {
            "arms": {name: self._arm_fields(name) for name in self.arms},
            "ratios": ratios,
            "limits": limits,
            "bounds": {} if self.limits is None else self.limits.bounds(),
            "expectations": expectations,
            "started": self.started.isoformat(timespec="seconds"),
            "interrupted": self.interrupted,
        }

    def _arm_fields(self, name: str) -> dict[str, Any]:
        seconds, figures = self.seconds[name], self.figures[name]
        fields: dict[str, Any] = {
            "tokens_per_s": self._speeds(name),
            "seconds": seconds,
            "tokens": self.tokens[name],
            "skipped": self.skipped[name],
        }
        batches = [self.workload.batch(repeat) for repeat in range(1, len(seconds) + 1)]
        if any(map(self.arms[name].ends_by_itself, batches)):
            fields["tokens_of_the_others"] = [batch.num_tokens for batch in batches]
        if figures and "tokens_per_decode_step" in figures[0]:
            fields["tokens_per_decode_step"] = fmean(row["tokens_per_decode_step"] for row in figures)
            fields["peak_bytes"] = max(row["peak_bytes"] for row in figures)
        if figures and "parts" in figures[0]:
            names = dict.fromkeys(part for row in figures for part in row["parts"])
            fields["parts"] = {part: fmean(row["parts"].get(part, 0.0) for row in figures) for part in names}
        return fields


def workload_fields(workload: Workload) -> dict[str, Any]:
    """Its configuration, and what the first counted repeat amounts to."""
    batch = workload.batch(1)
    return asdict(workload.config) | {
        "completion_tokens": batch.num_tokens,
        "longest": max(batch.lens),
        "sequences": len(batch.lens),
        "batches": len(workload.batches),
        "drafter": "starts every repeat from nothing" if workload.starts_over(2) else "lives on over the repeats",
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
    found: dict[str, str | None] = {"python": platform.python_version(), "revision": revision()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def revision() -> str | None:
    """Of this checkout, with "+changes" where it has some that are not committed; None outside of one, or without git."""
    if not (ROOT / ".git").exists():  # else git would answer for a checkout that this is installed in
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude", "*", "--dirty=+changes"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None


def policy_fields(policy: PreTrainedModel, config: BenchConfig) -> dict[str, Any]:
    return {
        "architecture": type(policy).__name__,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "added_layers": config.added_layers,
    }
