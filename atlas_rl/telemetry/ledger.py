"""Ledger: what the rollouts of one served model have cost, for the trainer's log and for `rollouts.jsonl`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeVar

from atlas_rl.telemetry.log import RolloutLog, keep_earlier_log
from atlas_rl.telemetry.stats import RolloutStats

T = TypeVar("T")


class Ledger:
    """Keeps the last rollout's figures, and their sums since the trainer last logged and since the optimizer step began."""

    def __init__(self) -> None:
        self.log: RolloutLog | None = None
        self.stats = RolloutStats()
        self.unlogged: dict[str, RolloutStats] = {}
        """By phase, the sums since `Trainer.log` last took them."""
        self.step_stats: RolloutStats | None = None
        self.step_start = time.perf_counter()
        self.unlogged_step_seconds = 0.0
        """Of whole optimizer steps, since `Trainer.log` last took them."""

    def open(self, path: str | None, starts_anew: bool) -> None:
        """Write rows there from now on, if they go nowhere yet; a run that starts anew puts an earlier run's log aside."""
        if self.log is not None or path is None:
            return
        if starts_anew:
            keep_earlier_log(path)
        self.log = RolloutLog(path)

    def record(self, row: dict[str, Any], work: Callable[[], T], stats_of: Callable[[], RolloutStats]) -> T:
        """Do the work of a generate call, and count and log its figures, also those of work that raises."""
        try:
            return work()
        except BaseException as error:
            row["error"] = type(error).__name__
            raise
        finally:
            self.stats, phase = stats_of(), row["phase"]
            self.unlogged[phase] = RolloutStats.total(s for s in (self.unlogged.get(phase), self.stats) if s)
            if phase == "train":
                self.step_stats = RolloutStats.total(s for s in (self.step_stats, self.stats) if s)
            self._write({"kind": "rollout"} | row | self.stats.to_dict())

    def begin_step(self) -> None:
        self.step_start = time.perf_counter()

    def end_step(self, step: int, rank: int) -> None:
        """Write the row of an optimizer step."""
        row = {"kind": "step", "phase": "train", "step": step, "rank": rank}
        row["step_seconds"] = round(time.perf_counter() - self.step_start, 6)
        self.unlogged_step_seconds += row["step_seconds"]
        # a step may train on an earlier step's rollouts, and have none of its own
        self._write(row | (self.step_stats.to_dict() if self.step_stats else {}))
        self.step_stats = None

    def pop_metrics(self, phase: str) -> dict[str, float]:
        """Figures since the last call, named as the trainer's metrics are."""
        stats = self.unlogged.pop(phase, None)
        if stats is None:
            return {}
        metrics = flat_metrics(stats.to_dict())
        if stats.tokens_of_all_ranks:  # rank 0 logs for the run, which waits for the slowest
            metrics["tokens_per_s"] = stats.tokens_of_all_ranks / stats.slowest_rank_seconds
        if phase == "train" and self.unlogged_step_seconds:
            metrics["step_seconds"], self.unlogged_step_seconds = self.unlogged_step_seconds, 0.0
        prefix = "rollout/" if phase == "train" else "eval_rollout/"
        return {prefix + name: value for name, value in metrics.items()}

    def record_metrics(self, phase: str, step: int, metrics: dict[str, Any]) -> None:
        """Write the row of what a trainer has logged: its finite numbers."""
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, Real)}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self._write(finite | {"kind": "log", "phase": phase, "step": step})

    def _write(self, row: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(row)


def flat_metrics(row: dict[str, Any]) -> dict[str, float]:
    """A row's figures as one level of numbers, which every reporter takes: `seconds.draft` becomes `seconds_draft`.

    What has no meaning for these rollouts (no retraining, no drafts of that drafter) is absent, never None.
    """
    names = ("tokens_per_s", "tokens_per_decode_step", "speedup_estimate", "rank_idle_s", "kv_peak_bytes")
    metrics = {name: row[name] for name in names if name in row}
    for group in ("seconds", "retrain", "draft_vocabulary"):
        metrics |= {f"{group}_{name}": value for name, value in row.get(group, {}).items()}
    metrics["seconds"] = metrics.pop("seconds_total")
    for name, counts in row.get("drafters", {}).items():
        if "acceptance" in counts:  # of an arm's drafters one may never have been the better one
            metrics[f"{name}_acceptance"] = counts["acceptance"]
    arms = row.get("arms", {})
    for name, steps in arms.items():  # TensorBoard's tags have no +
        metrics[f"arm_{name.replace('+', '_and_')}"] = steps / sum(arms.values())
    return metrics
