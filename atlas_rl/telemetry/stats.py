"""The figures of one rollout (one generate call), and their sums over an optimizer step."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from atlas_rl.telemetry.timeline import Timeline


@dataclass(slots=True, kw_only=True)
class DrafterStats:
    steps: int = 0
    """Verify steps in which this drafter had a token verified."""
    proposed: int = 0
    """Draft tokens verified."""
    accepted: int = 0


@dataclass(slots=True, kw_only=True)
class RetrainStats:
    """Of updates of the adaptive drafter. Acceptance is in tokens per decode step at lookahead 4, on held-out completions."""

    updates: int = 0
    steps: int = 0
    """Optimizer steps."""
    seconds: float = 0.0
    acceptance_before: float | None = None
    """Of the latest update, as is the next."""
    acceptance_after: float | None = None
    kept: int = 0
    """Updates that were not undone."""

    @classmethod
    def total(cls, parts: Iterable[RetrainStats]) -> RetrainStats:
        result = cls()
        for part in parts:
            for name in ("updates", "steps", "seconds", "kept"):
                setattr(result, name, getattr(result, name) + getattr(part, name))
            if part.acceptance_before is not None:
                result.acceptance_before, result.acceptance_after = part.acceptance_before, part.acceptance_after
        return result


@dataclass(slots=True, kw_only=True)
class RolloutStats:
    num_prompts: int = 0
    num_completions: int = 0
    prompt_tokens: int = 0
    """Each distinct prompt counted once: it is prefilled once."""
    completion_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """`total` and its parts: prefill, draft, verify, sample, refresh, retrain, and between ranks exchange."""
    rank_idle_seconds: float | None = None
    """That this rank waited for the slowest at the end of a rollout; None where ranks did not meet."""
    tokens_of_all_ranks: int = 0
    """Completion tokens of a rollout at whose end ranks met; 0 where they did not."""
    slowest_rank_seconds: float = 0.0
    """Of that rollout, on the rank that took longest."""
    expected_idle: dict[str, float] | None = None
    """Share of the ranks' time that they were expected to wait, `with` groups changing ranks and `without`."""
    moved_samples: int = 0
    """Completions that were made on another rank than the one that asked for them, over all ranks."""
    device_seconds: float = 0.0
    """That captured decode steps took on the device; the rest of their time it waited for the host."""
    decode_steps: int = 0
    row_steps: int = 0
    """Sum over decode steps of the rows that took part."""
    proposed_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    drafters: dict[str, DrafterStats] = field(default_factory=dict)
    arms: Counter[str] = field(default_factory=Counter)
    """Decode steps by who drafted: drafters' names joined by +, or `plain`."""
    retrain: RetrainStats | None = None
    """None where the adaptive drafter was not retrained before this rollout."""
    draft_vocabulary: dict[str, float] = field(default_factory=dict)
    """Size of the draft vocabulary, and the share of recent tokens that it covers, if there is one."""
    preemptions: int = 0
    kv_peak_bytes: int = 0
    plain_seconds_estimate: float | None = None
    """What the same completions would have cost without drafts, from the step times measured in this rollout."""
    seconds_by_part: dict[str, float] = field(default_factory=dict)
    """What they would have cost with one drafter alone (`control.parts`), by its name; all retraining is the adaptive one's."""
    timeline: Timeline | None = None
    """Of one rollout, as are the lengths; sums have none."""
    completion_lens: list[int] = field(default_factory=list)

    @classmethod
    def total(cls, parts: Iterable[RolloutStats]) -> RolloutStats:
        """Sums of several rollouts; the KV peak is their maximum."""
        result = cls()
        parts = list(parts)
        estimates = [part.plain_seconds_estimate for part in parts]
        for part in parts:
            for name in (
                "num_prompts",
                "num_completions",
                "prompt_tokens",
                "completion_tokens",
                "decode_steps",
                "row_steps",
                "preemptions",
                "moved_samples",
                "tokens_of_all_ranks",
            ):
                setattr(result, name, getattr(result, name) + getattr(part, name))
            for name, seconds in part.seconds.items():
                result.seconds[name] += seconds
            result.add_depths(part.proposed_by_depth, part.accepted_by_depth)
            for name, counts in part.drafters.items():
                mine = result.drafters.setdefault(name, DrafterStats())
                mine.steps += counts.steps
                mine.proposed += counts.proposed
                mine.accepted += counts.accepted
            result.device_seconds += part.device_seconds
            result.slowest_rank_seconds += part.slowest_rank_seconds
            result.kv_peak_bytes = max(result.kv_peak_bytes, part.kv_peak_bytes)
            result.arms += part.arms
            result.draft_vocabulary = part.draft_vocabulary or result.draft_vocabulary
            if part.retrain is not None:
                result.retrain = RetrainStats.total(r for r in (result.retrain, part.retrain) if r is not None)
            if part.rank_idle_seconds is not None:
                result.rank_idle_seconds = (result.rank_idle_seconds or 0.0) + part.rank_idle_seconds
        if estimates and None not in estimates:
            result.plain_seconds_estimate = sum(estimates)
            for name in set.intersection(*(set(part.seconds_by_part) for part in parts)):
                result.seconds_by_part[name] = sum(part.seconds_by_part[name] for part in parts)
        return result

    def bill(self, part: str, seconds: float) -> None:
        """Add time that was spent after the rollout, and would have been without drafts as well."""
        self.seconds[part] += seconds
        self.seconds["total"] += seconds
        if self.plain_seconds_estimate is not None:
            self.plain_seconds_estimate += seconds
        for name in self.seconds_by_part:
            self.seconds_by_part[name] += seconds

    def add_depths(self, proposed: list[int], accepted: list[int]) -> None:
        missing = len(proposed) - len(self.proposed_by_depth)
        self.proposed_by_depth += [0] * missing
        self.accepted_by_depth += [0] * missing
        for depth, (num_proposed, num_accepted) in enumerate(zip(proposed, accepted)):
            self.proposed_by_depth[depth] += num_proposed
            self.accepted_by_depth[depth] += num_accepted

    def to_dict(self) -> dict[str, Any]:
        """The fields of a `rollouts.jsonl` row. A figure that has no meaning for this rollout is absent."""
        total = self.seconds["total"]
        row: dict[str, Any] = {
            "num_prompts": self.num_prompts,
            "num_completions": self.num_completions,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": {name: round(seconds, 6) for name, seconds in self.seconds.items()},
            "decode_steps": self.decode_steps,
            "row_steps": self.row_steps,
            "preemptions": self.preemptions,
            "kv_peak_bytes": self.kv_peak_bytes,
        }
        if self.device_seconds:
            row["device_seconds"] = round(self.device_seconds, 6)
        if self.rank_idle_seconds is not None:
            row["rank_idle_s"] = round(self.rank_idle_seconds, 6)
            row["moved_samples"] = self.moved_samples
        if self.expected_idle is not None:
            row["expected_idle"] = {name: round(share, 4) for name, share in self.expected_idle.items()}
        if total > 0 and self.completion_tokens:
            row["tokens_per_s"] = self.completion_tokens / total
        if self.row_steps:
            row["tokens_per_decode_step"] = self.completion_tokens / self.row_steps
        if any(self.proposed_by_depth):
            pairs = zip(self.accepted_by_depth, self.proposed_by_depth)
            row["acceptance_by_depth"] = [accepted / proposed for accepted, proposed in pairs if proposed]
        if self.drafters:
            row["drafters"] = {name: _drafter_row(counts) for name, counts in self.drafters.items()}
        if self.arms:
            row["arms"] = dict(self.arms)
        if self.draft_vocabulary:
            row["draft_vocabulary"] = self.draft_vocabulary
        if self.retrain is not None:
            row["retrain"] = {k: round(v, 6) for k, v in asdict(self.retrain).items() if v is not None}
        if self.plain_seconds_estimate and total > 0:
            row["plain_tokens_per_s_estimate"] = self.completion_tokens / self.plain_seconds_estimate
            row["speedup_estimate"] = self.plain_seconds_estimate / total
            if self.seconds_by_part:
                speedups = {
                    name: self.plain_seconds_estimate / seconds for name, seconds in self.seconds_by_part.items()
                }
                row["speedup_by_part"] = {name: round(speedup, 4) for name, speedup in sorted(speedups.items())}
        if self.completion_lens:
            row["lengths"] = _quantiles(self.completion_lens)
        if self.timeline is not None and self.timeline.states:
            row["timeline"] = self.timeline.to_dict()
        return row


def _quantiles(lens: list[int]) -> dict[str, float]:
    p10, p50, p90 = np.percentile(lens, (10, 50, 90)).round(1).tolist()
    return {
        "min": min(lens),
        "p10": p10,
        "p50": p50,
        "p90": p90,
        "max": max(lens),
        "mean": round(sum(lens) / len(lens), 2),
    }


def _drafter_row(counts: DrafterStats) -> dict[str, float]:
    row: dict[str, float] = {"steps": counts.steps, "proposed": counts.proposed, "accepted": counts.accepted}
    if counts.proposed:
        row["acceptance"] = counts.accepted / counts.proposed
    return row
