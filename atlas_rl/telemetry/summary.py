"""The end of a run in one table: what the rollouts cost, what speculation bought, whether the policy got better."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas_rl.telemetry.log import read_log

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """Figures of one run. None: the run has no such figure (no drafts were made, one step only, …)."""

    log_path: Path
    num_rollouts: int
    """Calls of generate that Atlas served."""
    fallbacks: tuple[str, ...]
    """Why other calls went to the model's own generate, one reason per call."""
    completions: int
    tokens: int
    tokens_per_s: float | None
    speedup: float | None
    acceptance: float | None
    tokens_per_decode_step: float | None
    arms: dict[str, int]
    """Decode steps by who drafted."""
    retrain_updates: int
    retrain_kept: int
    retrain_steps: int
    retrain_seconds: float
    retrain_first: float | None
    """Tokens per step of the adaptive drafter (lookahead 4, held-out completions) when it was first retrained."""
    retrain_last: float | None
    """After the last time."""
    rollout_seconds: float
    rollout_share: float | None
    idle_share: float | None
    """Of the ranks' time in rollouts, what they waited for the slowest; None on one process."""
    num_steps: int
    reward_first: float | None
    """Mean over the first fifth of the logged steps."""
    reward_last: float | None

    def to_table(self) -> Table:
        from rich.table import Table

        table = Table(title="Rollouts of this run", title_justify="left", show_header=False, padding=(0, 1))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(style="dim")
        for row in self.rows():
            table.add_row(*row)
        return table

    def rows(self) -> Iterable[tuple[str, str, str]]:
        """Name, figure, and what it is about, of each that the run has."""
        if self.fallbacks:
            about = f"generate calls were not for Atlas: {'; '.join(sorted(set(self.fallbacks)))}"
            yield "served by transformers", f"{len(self.fallbacks):,}", about
        if not self.num_rollouts:
            yield "rollouts", "none", "Atlas made no rollout in this run"
            return
        yield "completions", f"{self.completions:,}", f"{self.tokens:,} tokens in {self.num_rollouts:,} rollouts"
        if self.tokens_per_s is not None:
            yield "tokens per second", f"{self.tokens_per_s:,.0f}", "all costs of the rollouts counted"
        if self.speedup is not None:
            yield "speed-up", f"{self.speedup:.2f}x", "over plain decoding, from measured step times"
        if self.acceptance is not None:
            yield (
                "draft acceptance",
                f"{self.acceptance:.0%}",
                "of drafted tokens were the policy's own",
            )
        if self.tokens_per_decode_step is not None:
            yield "tokens per decode step", f"{self.tokens_per_decode_step:.2f}", "per sequence; 1 without drafts"
        if len(self.arms) > 1:
            total = sum(self.arms.values())
            shares = sorted(self.arms.items(), key=lambda item: -item[1])
            about = ", ".join(f"{name} {count / total:.0%}" for name, count in shares if count / total >= 0.005)
            yield "drafts by", f"{1 - self.arms.get('plain', 0) / total:.0%}", f"of decode steps: {about}"
        if self.retrain_updates:
            about = f"{self.retrain_steps} optimizer steps in {self.retrain_updates} updates, {self.retrain_kept} kept"
            yield "retraining", f"{self.retrain_seconds:.2f} s", f"of {self.rollout_seconds:.1f} s of rollouts; {about}"
        if self.retrain_first is not None:
            change = f"{self.retrain_first:.2f} → {self.retrain_last:.2f}"
            yield "adaptive drafter", change, "tokens per step at lookahead 4, held-out completions"
        if self.rollout_share is not None:
            yield "share of the step", f"{self.rollout_share:.0%}", "of a training step goes into rollouts"
        if self.idle_share is not None:
            yield "ranks idle", f"{self.idle_share:.0%}", "of their time in rollouts they waited for the slowest one"
        if self.reward_first is not None:
            change = f"{self.reward_first:.3f} → {self.reward_last:.3f}"
            yield "reward", change, f"first → last fifth of {self.num_steps:,} logged steps"


def summarize_run(log_path: str | Path, log_history: list[dict[str, Any]]) -> RunSummary:
    """From `rollouts.jsonl` (which may not exist: then no rollout was made) and the trainer's `state.log_history`."""
    path = Path(log_path)
    return summarize_rows(path, read_log(path) if path.exists() else [], log_history)


def summarize_rows(path: Path, rows: list[dict[str, Any]], log_history: list[dict[str, Any]]) -> RunSummary:
    """From the rows of such a log."""
    calls = [row for row in rows if row["kind"] == "rollout"]
    rollouts = [row for row in calls if "fallback" not in row]
    timed = [row for row in rows if row["kind"] == "step" and "step_seconds" in row]
    tokens = sum(row["completion_tokens"] for row in rollouts)
    rewards = [entry["reward"] for entry in log_history if "reward" in entry]
    first_rank = min((row["rank"] for row in rollouts), default=0)
    retrained = [row for row in rollouts if row["rank"] == first_rank]  # ranks retrain together
    retrains = [row["retrain"] for row in retrained if "retrain" in row]
    judged = [row for row in retrains if "acceptance_before" in row]
    fifth = max(1, len(rewards) // 5)
    return RunSummary(
        log_path=path,
        num_rollouts=len(rollouts),
        fallbacks=tuple(row["fallback"] for row in calls if "fallback" in row),
        completions=sum(row["num_completions"] for row in rollouts),
        tokens=tokens,
        tokens_per_s=_ratio(tokens, _slowest_rank_seconds(rollouts)),
        speedup=_speedup(rollouts),
        acceptance=_acceptance(rollouts),
        tokens_per_decode_step=_tokens_per_decode_step(rollouts),
        arms=dict(sum((Counter(row.get("arms", {})) for row in rollouts), Counter())),
        retrain_updates=sum(row["updates"] for row in retrains),
        retrain_kept=sum(row["kept"] for row in retrains),
        retrain_steps=sum(row["steps"] for row in retrains),
        retrain_seconds=sum(row["seconds"].get("retrain", 0.0) for row in retrained),
        retrain_first=judged[0]["acceptance_before"] if judged else None,
        retrain_last=judged[-1]["acceptance_after"] if judged else None,
        rollout_seconds=_slowest_rank_seconds(rollouts),
        rollout_share=_ratio(sum(row["seconds"]["total"] for row in timed), sum(row["step_seconds"] for row in timed)),
        idle_share=_idle_share(rollouts),
        num_steps=len(rewards),
        reward_first=sum(rewards[:fifth]) / fifth if len(rewards) > 1 else None,
        reward_last=sum(rewards[-fifth:]) / fifth if len(rewards) > 1 else None,
    )


def _slowest_rank_seconds(rollouts: list[dict[str, Any]]) -> float:
    """Ranks make their rollouts at the same time, and wait for the slowest."""
    seconds: dict[int, float] = defaultdict(float)
    for row in rollouts:
        seconds[row["rank"]] += row["seconds"]["total"] + row.get("rank_idle_s", 0.0)
    return max(seconds.values(), default=0.0)


def _idle_share(rollouts: list[dict[str, Any]]) -> float | None:
    met = [(row["rank_idle_s"], row["seconds"]["total"]) for row in rollouts if "rank_idle_s" in row]
    return _ratio(sum(idle for idle, _ in met), sum(idle + total for idle, total in met))


def _speedup(rollouts: list[dict[str, Any]]) -> float | None:
    """Seconds that plain decoding would have taken over seconds taken, so that long rollouts count for more."""
    pairs = [(row["speedup_estimate"], row["seconds"]["total"]) for row in rollouts if "speedup_estimate" in row]
    return _ratio(sum(speedup * seconds for speedup, seconds in pairs), sum(seconds for _, seconds in pairs))


def _acceptance(rollouts: list[dict[str, Any]]) -> float | None:
    drafters = [counts for row in rollouts for counts in row.get("drafters", {}).values()]
    return _ratio(sum(counts["accepted"] for counts in drafters), sum(counts["proposed"] for counts in drafters))


def _tokens_per_decode_step(rollouts: list[dict[str, Any]]) -> float | None:
    pairs = [
        (row["completion_tokens"], row["completion_tokens"] / row["tokens_per_decode_step"])
        for row in rollouts
        if row.get("tokens_per_decode_step")
    ]
    return _ratio(sum(tokens for tokens, _ in pairs), sum(row_steps for _, row_steps in pairs))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
