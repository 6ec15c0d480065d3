"""What a run says while it trains: a live panel on a terminal, one plain line per logged step everywhere else.

Both take the place of transformers' progress bar, and of its line with the whole dictionary of metrics.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from atlas_rl.generator import AtlasRolloutGenerator

SHOWN = (
    ("reward", "reward", "{:.3f}"),
    ("completions/mean_length", "tokens", "{:.0f}"),
    ("completions/clipped_ratio", "clipped", "{:.0%}"),
    ("rollout/tokens_per_s", "rollout tok/s", "{:,.0f}"),
    ("rollout/speedup_estimate", "speed-up", "{:.2f}x"),
    ("rollout/tokens_per_decode_step", "tokens/decode step", "{:.2f}"),
)
"""(metric, label, format); a metric that a step does not log is left out."""


class Display(TrainerCallback):
    """Tells how a trainer gets on. As a context around `trainer.train()` it is over when that is, however it ends."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *rest: Any) -> None:
        pass


def show_progress(trainer: Trainer, atlas: AtlasRolloutGenerator) -> Display:
    """Have the trainer tell how it gets on, in the way that suits where its output goes."""
    from atlas_rl.cli.panel import LivePanel

    for callback in (ProgressCallback, PrinterCallback):
        trainer.pop_callback(callback)
    display = LivePanel(atlas) if can_show_panel() and not trainer.args.disable_tqdm else PlainLines()
    trainer.add_callback(display)
    return display


def can_show_panel() -> bool:
    """Whether stdout is a terminal that can move its cursor, and knows the panel's characters."""
    console = Console()
    return sys.stdout.isatty() and console.is_interactive and console.encoding.startswith("utf")


class PlainLines(Display):
    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if state.is_world_process_zero and (line := to_line(state.global_step, logs)):
            print(line, flush=True)  # who follows a log file wants it now


def to_line(step: int, logs: dict[str, Any]) -> str:
    """The line of a logged step; empty where it has logged none of our figures."""
    phase, figures = phase_of(logs)
    parts = [f"{label} {form.format(figures[name])}" for name, label, form in SHOWN if figures.get(name) is not None]
    if accepted := acceptances(figures):
        parts.append("accepted " + " ".join(f"{name} {share:.0%}" for name, share in accepted.items()))
    if "rollout/retrain_acceptance_before" in figures:
        parts.append("retrained {} -> {} {}".format(*retraining(figures)))
    mark = "evaluation  " if phase == "eval" else ""
    return f"step {step:>4}  {mark}" + "  ".join(parts) if parts else ""


def phase_of(logs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Whether a trainer's log is of training or of an evaluation, and its figures under their names in training."""
    evaluated = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
    return ("eval", evaluated) if evaluated else ("train", logs)


def acceptances(figures: dict[str, Any]) -> dict[str, float]:
    """Share of the drafted tokens that were right, by drafter."""
    return {
        name.removeprefix("rollout/").removesuffix("_acceptance"): value
        for name, value in figures.items()
        if name.startswith("rollout/") and name.endswith("_acceptance")
    }


def arm_shares(figures: dict[str, Any]) -> dict[str, float]:
    """Share of the decode steps by who drafted, the most frequent first."""
    shares = {
        name.removeprefix("rollout/arm_").replace("_and_", "+"): value
        for name, value in figures.items()
        if name.startswith("rollout/arm_")
    }
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def retraining(figures: dict[str, Any]) -> tuple[str, str, str]:
    """The adaptive drafter's tokens per step before and after its latest retraining, and whether that was kept."""
    before, after = (figures[f"rollout/retrain_acceptance_{when}"] for when in ("before", "after"))
    kept, updates = (figures[f"rollout/retrain_{name}"] for name in ("kept", "updates"))
    judged = "kept" if kept == updates else f"kept {kept} of {updates}" if kept else "undone"
    return f"{before:.2f}", f"{after:.2f}", judged
