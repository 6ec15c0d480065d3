"""Charts of where the time goes: tokens per second, the parts of a step, a rollout from within, ranks that wait."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from atlas_rl.report import drawing as d
from atlas_rl.report.drawing import Chart, NoFigure
from atlas_rl.report.run import Row, Run, Series, fifth, mean, plain_tokens_per_s, seconds_of, tokens_per_s

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = {
    "prefill": "reading prompts",
    "draft": "drafting",
    "verify": "forwards of the policy",
    "sample": "sampling",
    "retrain": "retraining the drafter",
    "refresh": "taking over weights",
    "exchange": "exchange between ranks",
    "idle": "waiting for other ranks",
    "other": "other work of rollouts",
    "rollouts": "all of the rollouts",
    "rest": "the trainer's own work",
}
"""Of a step's seconds, from the bottom up."""
MOST_BARS = {"wide": 60, "narrow": 24}


def speed(run: Run) -> Chart:
    with_drafts, plain = run.series(tokens_per_s), run.series(plain_tokens_per_s)
    has_plain = len(plain) > 0

    def draw(figure: Figure, screen: str) -> None:
        axes = figure.subplots()
        d.line(axes, with_drafts, screen, d.color("full"), label="this run" if has_plain else None)
        if has_plain:
            d.line(axes, plain, screen, d.color("plain"), ls=(0, (4, 2)), label="without drafts (estimate)")
            d.legend(figure, screen)
        axes.set_ylabel("tokens per second")
        axes.set_ylim(0, 1.15 * max(np.percentile(s.values, 98) for s in (with_drafts, plain) if len(s)))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        d.step_axis(axes, run)

    how = (
        "Generated tokens per second of rollout time, everything that a rollout costs included. Dots are single steps, the line "
        "follows their median."
    )
    finding = f"The first fifth of the run made {with_drafts.first:,.0f} tokens/s, the last {with_drafts.last:,.0f}"
    if has_plain:
        how += " The dashed line is what the same engine would have reached without drafts, from step times measured in the run."
        gain = with_drafts.last / plain.last
        finding += f", where it would have been {plain.last:,.0f} without drafts ({gain:.2f} times as fast as that)"
        finding += when_ahead(with_drafts.smooth(), plain.smooth(), run.unit)
    return Chart(
        key="speed",
        label=f"Line chart: tokens per second over {len(with_drafts):,} {run.unit}s",
        how_to_read=how,
        finding=f"{finding}. {_slowest_step(run)}",
        draw=draw,
    )


def when_ahead(ours: Series, other: Series, unit: str) -> str:
    """When the one line was above the other, where that can be said in a few words."""
    by_step = dict(zip(other.steps, other.values))
    pairs = [(step, value > by_step[step]) for step, value in zip(ours.steps, ours.values) if step in by_step]
    is_ahead = [ahead for _, ahead in pairs]
    if len(set(is_ahead)) == 1:
        return f". {'It was faster than that all along' if is_ahead[0] else 'At no time was it faster than that'}"
    if not all(is_ahead[-fifth(is_ahead) :]):
        return f". It was faster than that in {sum(is_ahead) / len(is_ahead):.0%} of the run"
    begin = next(step for step, ahead in reversed(pairs) if not ahead)
    return f". From {unit} {begin + 1:,.0f} on it was faster than that"


def _slowest_step(run: Run) -> str:
    seconds = {step: seconds_of(rows) for step, rows in run.rollouts.items()}
    step = max(seconds, key=seconds.__getitem__)
    typical = float(np.median(list(seconds.values())))
    return f"A rollout took {typical:.3g} s in the median; the longest, of {run.unit} {step:,}, {seconds[step]:.3g} s."


# ---- the parts of a step -----------------------------------------------------------------------------------------------------


def parts_of_steps(run: Run) -> Chart:
    """Means over ranks, stacked."""
    by_step = {step: _mean_parts(rows) for step, rows in (run.steps or run.rollouts).items()}
    total: Counter[str] = Counter()
    for parts in by_step.values():
        total.update(parts)
    rollouts = total.total() - total["rest"]
    names = [name for name in PARTS if name != "rest" and total[name] > 0.004 * rollouts]
    for parts in by_step.values():
        parts["rollouts"] = sum(seconds for name, seconds in parts.items() if name != "rest")

    def draw(figure: Figure, screen: str) -> None:
        above, *below = figure.subplots(2 if run.steps else 1, 1, sharex=True, squeeze=False)[:, 0]
        _stack(above, by_step, names, MOST_BARS[screen])
        above.set_title("rollouts")
        for axes in below:
            _stack(axes, by_step, ["rollouts", "rest"], MOST_BARS[screen])
            axes.set_title("the whole training step")
        d.step_axis(figure.axes[-1], run)
        patches = [d.patch(name, PARTS[name]) for name in [*names, *(["rollouts", "rest"] if below else [])]]
        d.legend(figure, screen, patches, 4 if screen == "wide" else 2)

    largest = max(names, key=total.__getitem__)
    finding = f"Of the rollouts' time {total[largest] / rollouts:.0%} went into {PARTS[largest]}"
    finding += f", {total['draft'] / rollouts:.0%} into drafting" if largest != "draft" and total["draft"] else ""
    finding += f", {total['retrain'] / rollouts:.1%} into retraining." if total["retrain"] else "."
    if run.steps:
        share = rollouts / total.total()
        finding += (
            f" Rollouts were {share:.0%} of the training steps: faster ones can shorten the run by that much at most."
        )
    return Chart(
        key="seconds",
        label=f"Stacked bars: seconds of each {run.unit} by what they were spent on",
        how_to_read="Each bar is one step (the mean of a few, in long runs). Above: what its rollouts spent their time on. "
        "Below: the rollouts beside the trainer's own work. Bars that leave the chart are longer than it shows.",
        finding=finding,
        draw=draw,
        heights=(440, 560),
    )


def _stack(axes: Axes, by_step: dict[int, dict[str, float]], names: list[str], most: int) -> None:
    steps = list(by_step)
    width = -(-len(steps) // most)
    groups = [steps[start : start + width] for start in range(0, len(steps), width)]
    places, bottom = [mean(group) for group in groups], np.zeros(len(groups))
    for name in names:
        heights = np.array([mean(by_step[step].get(name, 0.0) for step in group) for group in groups])
        axes.bar(places, heights, 0.82 * width, bottom, color=d.color(name), lw=0)
        bottom += heights
    axes.set_ylim(0, 1.1 * _ceiling(bottom))
    axes.set_ylabel("seconds")


def _ceiling(heights: np.ndarray) -> float:
    """A single very long step must not flatten all others."""
    return min(heights.max(), 2.0 * float(np.percentile(heights, 90)))


def _mean_parts(rows: list[Row]) -> dict[str, float]:
    parts: dict[str, float] = defaultdict(float)
    for row in rows:  # one per rank; of calls that have no trainer, one
        seconds = {"total": 0.0} | row.get("seconds", {})
        named = {name: seconds[name] for name in PARTS if name in seconds}
        idle = row.get("rank_idle_s", 0.0)
        named |= {"idle": idle, "other": max(0.0, seconds["total"] - sum(named.values()))}
        named["rest"] = max(0.0, row.get("step_seconds", 0.0) - seconds["total"] - idle)
        for name, value in named.items():
            parts[name] += value / len(rows)
    return parts


# ---- a rollout from within ---------------------------------------------------------------------------------------------------


def within_rollouts(run: Run) -> Chart:
    """Live rows against time, of a typical rollout and of the longest one."""
    placed = [(step, row) for step, rows in run.rollouts.items() for row in rows if "timeline" in row]
    if not placed:
        raise NoFigure("this log was written by an older version, which did not record how many rows were alive when")
    by_length = sorted(placed, key=lambda pair: pair[1]["seconds"]["total"])
    chosen = {"a typical one": by_length[len(by_length) // 2], "the longest": by_length[-1]}
    if len(by_length) == 1:
        chosen = {"the only one": by_length[0]}
    arms = Counter[str]()
    for _, row in chosen.values():
        arms.update(_seconds_by_arm(row["timeline"]))
    names = [name for name, seconds in arms.most_common() if seconds > 0.002 * arms.total()]

    def draw(figure: Figure, screen: str) -> None:
        for axes, (which, (step, row)) in zip(d.panels(figure, screen, len(chosen)), chosen.items()):
            _draw_timeline(axes, row["timeline"], names)
            axes.set_title(f"{run.unit} {step:,}, {which}")
            axes.set_ylabel("completions not yet finished")
            axes.set_xlabel("seconds since the rollout began")
        d.legend(figure, screen, [d.patch(d.arm_color(name), d.arm_label(name)) for name in names])

    step, row = chosen.get("a typical one") or chosen["the only one"]
    return Chart(
        key="timeline",
        label=f"Area charts: live completions against time in the rollout of {run.unit} {step:,}, coloured by drafter",
        how_to_read="Completions leave as they finish, so that few are left at the end. The colour says who drafts: what pays "
        "for a handful of completions may not pay for many. Narrow stripes are trials of another drafter.",
        finding=_tail(row["timeline"], f"In {run.unit} {step:,}"),
        draw=draw,
        heights=(320, 520),
    )


def _draw_timeline(axes: Axes, timeline: dict[str, list[Any]], names: list[str]) -> None:
    edges = np.array(timeline["seconds"])
    rows, arms = np.array(timeline["rows"]), np.array(timeline["arms"])
    for name in names:
        axes.fill_between(edges, np.where(arms == name, rows, 0), step="post", lw=0, color=d.arm_color(name))
    axes.step(edges, rows, where="post", lw=1.0, color=d.color("soft"))
    axes.set_xlim(0, edges[-1] * 1.01)
    axes.set_ylim(0, 1.05 * rows.max())


def _seconds_by_arm(timeline: dict[str, list[Any]]) -> Counter[str]:
    seconds: Counter[str] = Counter()
    edges = timeline["seconds"]
    for arm, begin, end in zip(timeline["arms"], edges, edges[1:]):
        seconds[arm] += end - begin
    return seconds


def _tail(timeline: dict[str, list[Any]], where: str) -> str:
    """What the rollout's end was like, in words."""
    edges, rows = timeline["seconds"], timeline["rows"]
    few = max(1, rows[0] // 8)
    begin = next(time for time, alive in zip(edges, rows) if alive <= few)
    share = (edges[-1] - begin) / ((edges[-1] - edges[0]) or 1.0)
    by_arm = _seconds_by_arm(timeline)
    drafted = 1 - by_arm["plain"] / (by_arm.total() or 1.0)
    return (
        f"{where}, {rows[0]:,} completions started, and {share:.0%} of the decoding time was spent with {few:,} or fewer of them "
        f"left. Drafts were made during {drafted:.0%} of the time."
    )


# ---- ranks -------------------------------------------------------------------------------------------------------------------


def idle(run: Run) -> Chart:
    if len(run.ranks) < 2:
        raise NoFigure("the run had one process, so that none waited for another")
    waited = run.series(_idle_share)
    if not len(waited):
        raise NoFigure("the ranks of this run did not meet at the end of rollouts")
    forecast = run.series(_expected_idle)

    def draw(figure: Figure, screen: str) -> None:
        axes = figure.subplots()
        d.line(axes, _percent(waited), screen, d.color("full"), label="this run")
        if len(forecast):
            d.line(axes, _percent(forecast), screen, d.color("plain"), ls=(0, (4, 2)), label="forecast, nothing moved")
            d.legend(figure, screen)
        axes.set_ylabel("% of the ranks' rollout time")
        axes.set_ylim(0, None)
        d.step_axis(axes, run)

    finding = f"The {len(run.ranks)} ranks waited {mean(waited.values):.1%} of their rollout time"
    if len(forecast):
        finding += (
            f"; {mean(forecast.values):.1%} was forecast for completions that stay with the rank that asked for them"
        )
    return Chart(
        key="idle",
        label="Line chart: share of rollout time that ranks waited for the slowest one",
        how_to_read="All ranks have to finish their rollouts before the training step goes on; one with longer completions makes "
        "the others wait. Moving completions to ranks with less to do shortens that.",
        finding=finding + ".",
        draw=draw,
    )


def _idle_share(rows: list[Row]) -> float | None:
    met = [row for row in rows if "rank_idle_s" in row]
    time = sum(row["rank_idle_s"] + row["seconds"]["total"] for row in met)
    return sum(row["rank_idle_s"] for row in met) / time if time else None


def _expected_idle(rows: list[Row]) -> float | None:
    """None also where nothing was known of lengths yet."""
    return next((row["expected_idle"]["without"] for row in rows if "expected_idle" in row), None) or None


def _percent(series: Series) -> Series:
    return Series(series.steps, [100 * value for value in series.values])
