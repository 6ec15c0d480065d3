"""Charts of the drafters: how often they are right, what retraining brings, what each would have been worth alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from atlas_rl.report import drawing as d
from atlas_rl.report.drawing import Chart, NoFigure
from atlas_rl.report.run import Row, Run, Series, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAFTERS = ("suffix", "static", "recurrent")
MANY_UPDATES = 60
"""From which on single updates are drawn as lines."""


def acceptance(run: Run) -> Chart:
    names = sorted({name for row in run.all_rollouts for name in row.get("drafters", {})}, key=_place)
    by_name = {name: run.series(lambda rows, name=name: _acceptance(rows, name)) for name in names}
    by_name = {name: series for name, series in by_name.items() if len(series)}
    if not by_name:
        raise NoFigure("no drafts were made in this run")
    by_depth = _by_depth(run.last_fifth)

    def draw(figure: Figure, screen: str) -> None:
        over_run, over_depth = d.panels(
            figure, screen, gridspec_kw={"width_ratios": [5, 3]} if screen == "wide" else {}
        )
        for name, series in by_name.items():
            percent = Series(series.steps, [100 * value for value in series.values])
            d.line(over_run, percent, screen, d.arm_color(name), label=d.arm_label(name))
        over_run.set(ylim=(0, 100), title="by drafter, over the run", ylabel="% of draft tokens that were right")
        d.step_axis(over_run, run)
        depths = np.arange(1, len(by_depth) + 1)
        over_depth.bar(depths, [100 * share for share in by_depth], color=d.color("full"), width=0.7)
        over_depth.set(ylim=(0, 100), xlabel="place in the draft", title="all, last fifth of the run", xticks=depths)
        d.legend(figure, screen)

    ends = [f"{d.arm_label(name)} {s.first:.0%} at first, {s.last:.0%} at the end" for name, s in by_name.items()]
    finding = f"Of their draft tokens were right: {'; '.join(ends)}."
    if len(by_depth) > 1:
        shares = " and ".join(f"{share:.0%}" for share in by_depth[:2])
        finding += (
            f" In the last fifth of the run the first and second token of a draft were right in {shares} of cases."
        )
    return Chart(
        key="acceptance",
        label="Line chart: share of accepted draft tokens by drafter; bars: by place in the draft",
        how_to_read="A drafter guesses the next tokens, the policy checks all of them in one forward, and those up to the first "
        "wrong one are kept. The policy changes with every update: a drafter that is left as it is may fall behind.",
        finding=finding,
        draw=draw,
        heights=(320, 520),
    )


def _place(name: str) -> tuple[int, str]:
    return (DRAFTERS.index(name) if name in DRAFTERS else len(DRAFTERS), name)


def _acceptance(rows: list[Row], name: str) -> float | None:
    counts = [row["drafters"][name] for row in rows if name in row.get("drafters", {})]
    proposed = sum(count["proposed"] for count in counts)
    return sum(count["accepted"] for count in counts) / proposed if proposed else None


def _by_depth(rows: list[Row]) -> list[float]:
    """Means over rollouts, weighted by their drafts; places that few drafts reach are left out."""
    drafted = [(row["acceptance_by_depth"][:8], _proposed(row)) for row in rows if "acceptance_by_depth" in row]
    depth = min(8, max((len(shares) for shares, _ in drafted), default=0))
    means = []
    for place in range(depth):
        reached = [(shares[place], weight) for shares, weight in drafted if len(shares) > place]
        if len(reached) < len(drafted) / 2:
            break
        means.append(sum(share * weight for share, weight in reached) / sum(weight for _, weight in reached))
    return means


def _proposed(row: Row) -> int:
    return sum(counts["proposed"] for counts in row["drafters"].values())


# ---- retraining --------------------------------------------------------------------------------------------------------------


def retraining(run: Run) -> Chart:
    """Of the first rank: ranks retrain together."""
    rows = {step: next((row for row in rows if "retrain" in row), None) for step, rows in run.rollouts.items()}
    updates = {step: row["retrain"] for step, row in rows.items() if row and row["retrain"].get("updates")}
    judged = {step: update for step, update in updates.items() if "acceptance_before" in update}
    if not judged:
        raise NoFigure("the adaptive drafter was not retrained in this run")
    before = Series.of({step: update["acceptance_before"] for step, update in judged.items()})
    after = Series.of({step: update["acceptance_after"] for step, update in judged.items()})
    seconds = Series.of({step: update["seconds"] for step, update in updates.items()})

    def draw(figure: Figure, screen: str) -> None:
        gain, cost = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [5, 3]})
        _draw_gain(gain, before, after, screen)
        gain.set_ylabel("tokens per step")
        calm = seconds.thinned(d.POINTS[screen])
        visible = (run.last_step - run.first_step) / (2 * d.POINTS[screen])
        cost.bar(calm.steps, calm.values, max(0.8, visible), color=d.color("retrain"))
        cost.set_ylabel("seconds")
        d.step_axis(cost, run)
        d.legend(figure, screen)

    total, kept = sum(seconds.values), sum(update["kept"] for update in updates.values())
    steps = sum(update["steps"] for update in updates.values())
    share = total / run.summary.rollout_seconds
    gain = mean(np.subtract(after.values, before.values))
    return Chart(
        key="retraining",
        label="Dots: the adaptive drafter's tokens per step before and after each update; bars: seconds of the updates",
        how_to_read="After a policy update the adaptive drafter may learn from what the policy has written. Above: how many "
        "tokens a step would bring with its drafts, on completions that it has not learned from. Below: what the update took.",
        finding=f"{len(updates):,} updates with {steps:,} optimizer steps took {total:.3g} s, {share:.1%} of the rollouts' time; "
        f"{kept:,} of them {'was' if kept == 1 else 'were'} kept. The drafter was at {before.values[0]:.2f} tokens per step "
        f"before the first and at {after.values[-1]:.2f} after the last; one update changed that by {gain:+.3f} on average.",
        draw=draw,
        heights=(340, 340),
    )


def _draw_gain(axes: Axes, before: Series, after: Series, screen: str) -> None:
    if len(before) > MANY_UPDATES:
        d.line(axes, before, screen, d.color("plain"), label="before")
        d.line(axes, after, screen, d.color("adaptive"), label="after")
        return
    axes.vlines(before.steps, before.values, after.values, color=d.color("adaptive-suffix"), lw=1.5)
    ring = {"mfc": "none", "mew": 1.5, "color": d.color("plain")}
    axes.plot(before.steps, before.values, "o", ms=9, label="before", **ring)
    axes.plot(after.steps, after.values, "o", ms=5, mew=0, color=d.color("adaptive"), label="after")
    axes.margins(y=0.15)


# ---- each part alone ---------------------------------------------------------------------------------------------------------


def parts(run: Run) -> Chart:
    rows = [row for row in run.all_rollouts if "speedup_by_part" in row]
    if not rows:
        raise NoFigure("the log has no estimate of what each drafter alone would have brought")
    names = sorted({name for row in rows for name in row["speedup_by_part"]}, key=_place)
    speedups = {name: _alone(rows, name) for name in names}
    bars = [("no drafts", 1.0, d.color("plain"))]
    bars += [(f"{d.arm_label(name)} alone", speedups[name], d.arm_color(name)) for name in names]
    bars += [("all together, as it ran", full := _together(rows), d.color("full"))]

    def draw(figure: Figure, screen: str) -> None:
        axes = figure.subplots()
        labels, values, colors = zip(*bars[::-1])
        places = range(len(bars))
        axes.barh(places, values, 0.62, color=colors)
        for place, value in zip(places, values):
            away = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{value:.2f}×", (value, place), **away, bbox={"fc": d.color("page"), "lw": 0, "pad": 1})
        axes.axvline(1.0, color=d.color("axis"), lw=1.0, zorder=0)
        axes.set_yticks(places, labels)
        axes.set_xlim(0, 1.15 * max(values))
        axes.set_xlabel("times as fast as without drafts")
        axes.grid(False)

    best = max(names, key=speedups.__getitem__)
    ratio = full / speedups[best]
    verdict = "about as much as" if 0.99 < ratio < 1.01 else "more than" if ratio > 1 else "less than"
    return Chart(
        key="parts",
        label="Bars: estimated speed-up with each drafter alone, and with all of them",
        how_to_read="Estimates of how much faster than plain decoding the rollouts would have been with one drafter alone, used "
        "only where it pays, from the acceptance and the step times of this run. The last bar is the run as it was: it also paid "
        "for trying out which drafter is best, which those with one drafter are not charged for.",
        finding=f"All together brought {full:.2f}×, {verdict} the best single part would have ({d.arm_label(best)}, "
        f"{speedups[best]:.2f}×).",
        draw=draw,
        heights=(60 + 44 * len(bars), 60 + 44 * len(bars)),
    )


def _alone(rows: list[Row], name: str) -> float:
    """Over the rollouts for which there is an estimate, each by its length."""
    known = [row for row in rows if name in row["speedup_by_part"]]
    return sum(map(_plain_seconds, known)) / sum(_plain_seconds(row) / row["speedup_by_part"][name] for row in known)


def _together(rows: list[Row]) -> float:
    return sum(map(_plain_seconds, rows)) / sum(row["seconds"]["total"] for row in rows)


def _plain_seconds(row: Row) -> float:
    return row["speedup_estimate"] * row["seconds"]["total"]
