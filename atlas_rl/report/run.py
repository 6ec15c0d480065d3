"""The log of a run, sorted for charts: by step, over all ranks, each thing once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from atlas_rl.telemetry.log import read_log
from atlas_rl.telemetry.summary import RunSummary, summarize_rows

Row = dict[str, Any]
LOG_NAME = "rollouts.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    path: Path
    """Of the log."""
    num_rows: int
    rollouts: dict[int, list[Row]]
    """Finished train rollouts that Atlas made, by the number of the optimizer step that they were for (without a trainer: of the
    call); several where there are several ranks or calls."""
    steps: dict[int, list[Row]]
    """Rows of optimizer steps, one per rank."""
    logs: dict[int, Row]
    """What the trainer has logged, by step."""
    eval_logs: dict[int, Row]
    summary: RunSummary

    @property
    def ranks(self) -> list[int]:
        return sorted({row["rank"] for row in self.all_rollouts})

    @property
    def all_rollouts(self) -> list[Row]:
        return [row for rows in self.rollouts.values() for row in rows]

    @property
    def unit(self) -> str:
        """What rollouts are counted by."""
        return "training step" if self.steps else "call of generate"

    @property
    def first_step(self) -> int:
        return min([*self.rollouts, *self.steps])

    @property
    def last_step(self) -> int:
        return max([*self.rollouts, *self.steps])

    @property
    def last_fifth(self) -> list[Row]:
        """Of its rollouts, by step."""
        steps = list(self.rollouts)
        return [row for step in steps[-fifth(steps) :] for row in self.rollouts[step]]

    def series(self, of: Callable[[list[Row]], float | None]) -> Series:
        """A figure of each step's rollouts, where they have it."""
        values = {step: of(rows) for step, rows in self.rollouts.items()}
        return Series.of({step: value for step, value in values.items() if value is not None})


def read_run(run_dir: str | Path) -> Run:
    """Raises ValueError if there is no log."""
    path = Path(run_dir)
    path = path / LOG_NAME if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: RUN_DIR is the output_dir of a run that Atlas has made rollouts for, or its {LOG_NAME} (a "
            "model without a trainer has a log where AtlasConfig(log_path=...) says so)"
        )
    rows = read_log(path)
    if not any(row["kind"] == "rollout" for row in rows):
        raise ValueError(f"{path} holds no rollout yet: make the report when the run has done a step")
    steps = _latest(
        (row for row in rows if row["kind"] == "step" and "step_seconds" in row), lambda row: (row["step"], row["rank"])
    )
    calls = [row for row in rows if row["kind"] == "rollout"]
    if steps:  # a run that was resumed makes the steps after its checkpoint again
        calls = _latest(calls, lambda row: (row["phase"], row["step"], row["call"], row["rank"]))
    logs = [row for row in rows if row["kind"] == "log"]
    return Run(
        path=path,
        num_rows=len(rows),
        rollouts=_by_step(calls, has_steps=bool(steps)),
        steps=_grouped((row["step"], row) for row in steps),
        logs=_merged(row for row in logs if row["phase"] == "train"),
        eval_logs=_merged(row for row in logs if row["phase"] == "eval"),
        summary=summarize_rows(path, [*calls, *steps], [row for row in logs if row["phase"] == "train"]),
    )


def _by_step(calls: list[Row], has_steps: bool) -> dict[int, list[Row]]:
    made = [row for row in calls if not {"fallback", "error"} & set(row) and row["completion_tokens"]]
    if not has_steps:
        return {number: [row] for number, row in enumerate(made, 1)}
    return _grouped((row["step"] + 1, row) for row in made if row["phase"] == "train")


def _latest(rows: Iterable[Row], key_of: Callable[[Row], Any]) -> list[Row]:
    return list({key_of(row): row for row in rows}.values())


def _grouped(pairs: Iterable[tuple[int, Row]]) -> dict[int, list[Row]]:
    groups: dict[int, list[Row]] = defaultdict(list)
    for key, row in pairs:
        groups[key].append(row)
    return dict(sorted(groups.items()))


def _merged(rows: Iterable[Row]) -> dict[int, Row]:
    merged: dict[int, Row] = defaultdict(dict)
    for row in rows:
        merged[row["step"]] |= row
    return dict(sorted(merged.items()))


# ---- series ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Series:
    """A figure over steps."""

    steps: list[float]
    values: list[float]

    @classmethod
    def of(cls, values: dict[int, float]) -> Series:
        return cls(list(values), list(values.values()))

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def first(self) -> float:
        """Mean over the first fifth."""
        return mean(self.values[: fifth(self.values)])

    @property
    def last(self) -> float:
        return mean(self.values[-fifth(self.values) :])

    def thinned(self, most: int) -> Series:
        """Medians over windows, where there are more points than that."""
        width = -(-len(self) // most)
        parts = [slice(start, start + width) for start in range(0, len(self), width)] if width > 1 else []
        if not parts:
            return self
        return Series([median(self.steps[p]) for p in parts], [median(self.values[p]) for p in parts])

    def broken(self) -> tuple[list[float], list[float]]:
        """For a line that does not bridge gaps: a point that is no number in each that is much wider than usual."""
        gaps = [b - a for a, b in zip(self.steps, self.steps[1:])]
        widest = 4 * median(gaps) if gaps else 0.0
        steps, values = self.steps[:1], self.values[:1]
        for step, value, gap in zip(self.steps[1:], self.values[1:], gaps):
            if gap > widest:
                steps, values = [*steps, step], [*values, math.nan]
            steps, values = [*steps, step], [*values, value]
        return steps, values

    def smooth(self) -> Series:
        """Medians of neighbours, a tenth of the run wide: single steps are at the mercy of the machine."""
        half = max(1, len(self) // 20)
        return Series(self.steps, [median(self.values[max(0, i - half) : i + half + 1]) for i in range(len(self))])


def fifth(things: list[Any]) -> int:
    """How many of them a fifth is."""
    return max(1, len(things) // 5)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


# ---- figures of the rollouts of one step -------------------------------------------------------------------------------------


def seconds_of(rows: list[Row]) -> float:
    """From the first rank's start to the slowest one's end; ranks work side by side, calls one after the other."""
    return _slowest((row["rank"], row["seconds"]["total"] + row.get("rank_idle_s", 0.0)) for row in rows)


def plain_seconds_of(rows: list[Row]) -> float | None:
    """Estimate: without drafts."""
    if not all("plain_tokens_per_s_estimate" in row for row in rows):
        return None
    return _slowest((row["rank"], row["completion_tokens"] / row["plain_tokens_per_s_estimate"]) for row in rows)


def tokens_of(rows: list[Row]) -> int:
    return sum(row["completion_tokens"] for row in rows)


def tokens_per_s(rows: list[Row]) -> float:
    return tokens_of(rows) / seconds_of(rows)


def plain_tokens_per_s(rows: list[Row]) -> float | None:
    seconds = plain_seconds_of(rows)
    return tokens_of(rows) / seconds if seconds else None


def _slowest(seconds: Iterable[tuple[int, float]]) -> float:
    by_rank: dict[int, float] = defaultdict(float)
    for rank, value in seconds:
        by_rank[rank] += value
    return max(by_rank.values())
