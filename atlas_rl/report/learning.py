"""Charts of what the run is for: the reward, and how long completions are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atlas_rl.report import drawing as d
from atlas_rl.report.drawing import Chart, NoFigure
from atlas_rl.report.run import Row, Run, Series, tokens_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reward(run: Run) -> Chart:
    rewards = Series.of({step: row["reward"] for step, row in run.logs.items() if "reward" in row})
    held_out = Series.of({step: row["eval_reward"] for step, row in run.eval_logs.items() if "eval_reward" in row})
    if not len(rewards):
        raise NoFigure("the trainer has logged no reward (older versions of Atlas-RL did not copy it into this log)")

    def draw(figure: Figure, screen: str) -> None:
        axes = figure.subplots()
        d.line(axes, rewards, screen, d.color("full"), label="training")
        if len(held_out):
            calm = held_out.thinned(d.POINTS[screen])
            axes.plot(calm.steps, calm.values, "D-", ms=5, lw=1.2, color=d.color("adaptive"), label="evaluation")
            d.legend(figure, screen)
        axes.set_ylabel("mean reward")
        d.step_axis(axes, run)

    finding = f"From {rewards.first:.3f} in the first fifth of the logged steps to {rewards.last:.3f} in the last"
    finding += (
        f"; in evaluations from {held_out.values[0]:.3f} to {held_out.values[-1]:.3f}." if len(held_out) > 1 else "."
    )
    return Chart(
        key="reward",
        label=f"Line chart: mean reward over {len(rewards):,} logged steps",
        how_to_read="The mean reward of each step's completions, as the trainer logs it: dots are single steps, which see "
        "different prompts, the line follows their median. Atlas changes how fast completions are made, not which ones.",
        finding=finding,
        draw=draw,
    )


def lengths(run: Run) -> Chart:
    means = run.series(lambda rows: tokens_of(rows) / sum(row["num_completions"] for row in rows))
    bands = {name: run.series(lambda rows, name=name: _quantile(rows, name)) for name in ("p10", "p50", "p90")}
    clipped_name = "completions/clipped_ratio"
    clipped = Series.of({step: 100 * row[clipped_name] for step, row in run.logs.items() if clipped_name in row})

    def draw(figure: Figure, screen: str) -> None:
        if any(clipped.values):
            axes, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [5, 2]})
            d.line(below, clipped, screen, d.color("adaptive"))
            below.set(ylabel="% cut off", ylim=(0, None))
        else:
            axes = below = figure.subplots()
        if len(bands["p10"]):
            low, high = (bands[name].smooth().thinned(d.POINTS[screen]) for name in ("p10", "p90"))
            label = "8 of 10 completions"
            axes.fill_between(low.steps, low.values, high.values, color=d.color("prefill"), lw=0, label=label)
        d.line(axes, means, screen, d.color("full"), label="mean")
        d.legend(figure, screen)
        axes.set_ylabel("tokens per completion")
        axes.set_ylim(0, None)
        d.step_axis(below, run)

    finding = f"Completions were {means.first:,.0f} tokens long on average at first and {means.last:,.0f} at the end."
    if len(bands["p90"]):
        ratio = bands["p90"].last / max(1.0, bands["p50"].last)
        finding += f" One in ten was longer than {bands['p90'].last:,.0f}, {ratio:.1f} times the median"
        finding += ": these are what a rollout waits for." if ratio > 1.5 else "."
    if len(clipped):
        share = f"{clipped.last:.1f} %" if clipped.last else "None"
        finding += f" {share} of the last fifth reached the limit of length and {'was' if share == 'None' else 'were'} cut off."
    return Chart(
        key="lengths",
        label="Line chart: mean length of completions, and a band that holds eight of ten",
        how_to_read="Long completions finish last and alone. The wider the band, the longer a rollout runs with few completions "
        "left, which is where drafts pay most.",
        finding=finding,
        draw=draw,
        heights=(320, 320),
    )


def _quantile(rows: list[Row], name: str) -> float | None:
    """Of several ranks or calls: the mean, weighted by their completions."""
    told = [(row["lengths"][name], row["num_completions"]) for row in rows if "lengths" in row]
    return sum(value * count for value, count in told) / sum(count for _, count in told) if told else None
