"""Figures of studies, drawn by matplotlib (`pip install 'atlas-rl[plots]'`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "every_update": "#d1495b",
    "on_drift": "#edae49",
    "never": "#00798c",
    "static": "#00798c",
    "suffix": "#6a994e",
    "plain": "#8d8d8d",
}
LABELS = {
    "every_update": "retrained at every update",
    "on_drift": "retrained on drift",
    "never": "frozen at the start",
    "static": "static drafter alone",
    "suffix": "suffix drafter alone",
    "plain": "no drafts",
}
WIDTH, HEIGHT, DPI = 4.2, 3.2, 96


def plot_drift(study: dict[str, Any] | str | Path, png: str | Path) -> Path:
    """Of `examples/drift_study.py`, a dictionary or its JSON file: tokens per step against KL by drafter, tokens per second
    along the run by mode, and what shares of time for retraining come to.

    Raises:
        ValueError: matplotlib is not installed.
    """
    Figure = figure_class()
    if not isinstance(study, dict):
        study = json.loads(Path(study).read_text())
    panels = [panel for name, panel in PANELS.items() if name in study]
    figure = Figure(figsize=(WIDTH * sum(map(len, panels)), HEIGHT), dpi=DPI, layout="constrained")
    places = iter(figure.subplots(1, sum(map(len, panels)), squeeze=False)[0])
    for draw in (draw for panel in panels for draw in panel):
        axes = next(places)
        draw(axes, study)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(png)
    return Path(png)


def _against_kl(axes: Axes, study: dict[str, Any]) -> None:
    kl = {step["step"]: step["kl"] for step in study["drift"]["steps"] if "kl" in step}
    modes = study["drift"]["modes"]
    for name, mode in modes.items():
        probes = {s["step"]: s["probe"]["tokens_per_decode_step"] for s in mode["steps"] if "probe" in s}
        if probes and not (name == "static" and "never" in modes):  # one drafter, one line
            points = [kl[i] for i in probes], list(probes.values())  # in the order of time
            axes.plot(*points, "o-", ms=3, lw=1.3, color=COLORS[name], label=LABELS[name])
    axes.set(
        xlabel="KL(policy ‖ start), nats per token", ylabel="tokens per step, lookahead 4", title="Following the policy"
    )


def _along_the_run(axes: Axes, study: dict[str, Any]) -> None:
    for name, mode in study["drift"]["modes"].items():
        rates = [step["tokens_per_s"] for step in mode["steps"]]
        style = ":" if name == "static" else "-"
        axes.plot(_smooth(rates), style, lw=1.3, color=COLORS[name], label=LABELS[name])
    axes.set(xlabel="policy update", ylabel="tokens per second", title="Speed, retraining included", ylim=(0, None))


def _shares(axes: Axes, study: dict[str, Any]) -> None:
    sweep = study["sweep"]
    shares = [100 * row["share_spent"] for row in sweep["shares"]]
    values = [row["probe"]["tokens_per_decode_step"] for row in sweep["shares"]]
    best = sweep["converged"]["probe"]["tokens_per_decode_step"]
    axes.plot(shares, values, "o-", ms=4, color=COLORS["every_update"], label="retrained along the run")
    axes.axhline(best, color="black", lw=1, label="trained to convergence at the end")
    axes.axhline(0.95 * best, color="black", lw=0.8, ls=":", label="0.95 of it")
    frozen = sweep["frozen"]["probe"]["tokens_per_decode_step"]
    axes.axhline(frozen, color=COLORS["never"], lw=1, label=LABELS["never"])
    axes.set(
        xlabel="% of the run's time spent on retraining",
        ylabel="tokens per step at the end",
        title="How much it takes",
        xscale="log",
    )
    axes.set_xticks(shares, [f"{share:.2g}" for share in shares])
    axes.minorticks_off()


PANELS = {"drift": (_against_kl, _along_the_run), "sweep": (_shares,)}


def plot_workload(study: dict[str, Any] | str | Path, png: str | Path) -> Path:
    """Of `examples/evolving_workload.py`: tokens per step along the traffic.

    Raises:
        ValueError: matplotlib is not installed.
    """
    Figure = figure_class()
    if not isinstance(study, dict):
        study = json.loads(Path(study).read_text())
    figure = Figure(figsize=(1.6 * WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for name, (label, color) in {
        "reference": ("trained on the second family", "black"),
        "adaptive": ("learns from the traffic", COLORS["every_update"]),
        "frozen": (LABELS["never"], COLORS["never"]),
    }.items():
        points = study["traffic"][name]
        axes.plot(
            [p["tokens"] / 1000 for p in points],
            [p["tokens_per_decode_step"] for p in points],
            lw=1.4,
            label=label,
            color=color,
        )
    axes.axvline(study["switch_at_tokens"] / 1000, color="black", lw=0.8, ls=":")
    axes.set(
        xlabel="thousand tokens generated",
        ylabel="tokens per step, lookahead 4",
        title=f"{study['first']} → {study['second']}",
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(png)
    return Path(png)


def plot_rewards(study: dict[str, Any] | str | Path, png: str | Path) -> Path:
    """Of `atlas_rl.bench.whole_run`: each arm's reward along the run, a thin line per seed and their mean.

    Raises:
        ValueError: matplotlib is not installed.
    """
    Figure = figure_class()
    if not isinstance(study, dict):
        study = json.loads(Path(study).read_text())
    figure = Figure(figsize=(1.6 * WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    colors = (COLORS["plain"], COLORS["every_update"], COLORS["static"])
    for name, color in zip(study["runs"][0]["arms"], colors):
        curves = [[step["reward"] for step in run["arms"][name]] for run in study["runs"]]
        for curve in curves:
            axes.plot(range(1, len(curve) + 1), curve, lw=0.6, alpha=0.5, color=color)
        means = [sum(values) / len(values) for values in zip(*curves)]
        axes.plot(range(1, len(means) + 1), means, lw=1.8, color=color, label=name)
    axes.set(xlabel="policy update", ylabel="reward", title="Reward by seed, and the mean")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(png)
    return Path(png)


def _smooth(values: list[float], width: int = 5) -> list[float]:
    """Medians of neighbours: single steps are at the mercy of the machine."""
    half = width // 2
    parts = [sorted(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    return [part[len(part) // 2] for part in parts]


def figure_class() -> type:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("figures need matplotlib: pip install 'atlas-rl[plots]'") from None
    return Figure
