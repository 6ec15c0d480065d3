"""The live panel of `atlas-rl train`: how far the run is, what it does now, and the figures of the last logged step."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from atlas_rl.attachment import Attachment
from atlas_rl.cli.above import printed_above
from atlas_rl.cli.keyboard import unechoed
from atlas_rl.cli.progress import Display, acceptances, arm_shares, phase_of, retraining
from atlas_rl.generator import AtlasRolloutGenerator

MAX_WIDTH = 100
SECONDS_PER_FRAME = 0.5
"""Calm, and cheap: rendering takes the interpreter's lock from decoding."""
NUM_REWARDS = 24
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True, kw_only=True)
class RunView:
    """What the panel shows. Written by the trainer's thread, read by the one that draws: fields are replaced, never changed."""

    title: str
    first_step: int = 0
    """Where this run has begun; not 0 for a resumed one."""
    step: int = 0
    max_steps: int = 0
    start: float = field(default_factory=time.monotonic)
    step_end: float = field(default_factory=time.monotonic)
    activity: str = "starting"
    rollout: Callable[[], str | None] = lambda: None
    """What there is to say of the rollout that is being made, if one is."""
    logged_step: int = 0
    steps_in_log: int = 1
    logs: dict[str, Any] = field(default_factory=dict)
    """Figures of the last logged step."""
    rewards: tuple[float, ...] = ()
    """Of the last logged steps."""
    retrained: tuple[int, dict[str, Any]] | None = None
    """Step and figures of the last time the adaptive drafter was."""
    evaluated: tuple[int, dict[str, Any]] | None = None
    spinner: Spinner = field(default_factory=lambda: Spinner("dots", style="cyan", speed=0.16))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        figures = Table.grid(padding=(0, 2))
        figures.add_column(style="dim", no_wrap=True)
        figures.add_column(overflow="fold")
        for label, text in self._figures():
            figures.add_row(label, text)
        width = max(20, min(options.max_width, MAX_WIDTH))
        self.spinner.update(text=Text(self.rollout() or self.activity))
        yield Panel(
            Group(self._progress(), self.spinner, *([Text(), figures] if figures.row_count else [])),
            title=Text(self.title, style="bold"),
            title_align="left",
            border_style="dim",
            width=width,
        )

    def _progress(self) -> Table:
        done, now = self.step - self.first_step, time.monotonic()
        text = f"step {self.step} of {self.max_steps} · {clock(now - self.start)}"
        if done and self.step < self.max_steps:  # counted down within a step
            expected = (self.step_end - self.start) / done * (self.max_steps - self.step)
            text += f" · {clock(max(0, expected - (now - self.step_end)))} left"
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_row(Text(text), ProgressBar(total=self.max_steps or 1, completed=self.step, complete_style="cyan"))
        return row

    def _figures(self) -> Iterator[tuple[str, Text]]:
        logs = self.logs
        if is_number(logs.get("reward")):
            yield "reward", Text.assemble((f"{logs['reward']:.3f}", "bold"), "  ", (sparkline(self.rewards), "cyan"))
        if logs.get("completions/mean_length") is not None:
            text = f"{logs['completions/mean_length']:.0f} tokens on average"
            if logs.get("completions/clipped_ratio") is not None:
                text += f", {logs['completions/clipped_ratio']:.0%} clipped"
            yield "completions", Text(text)
        if "rollout/tokens_per_s" in logs:
            text = Text.assemble((f"{logs['rollout/tokens_per_s']:,.0f}", "bold"), " tokens/s")
            if "rollout/speedup_estimate" in logs:
                text.append(f", {logs['rollout/speedup_estimate']:.2f}x plain decoding")
            yield "rollouts", text
        if "rollout/step_seconds" in logs:
            yield "a step", self._split()
        if "rollout/tokens_per_decode_step" in logs:
            yield "per decode step", Text(f"{logs['rollout/tokens_per_decode_step']:.2f} tokens")
        if shares := arm_shares(logs):
            yield "drafted by", Text(", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
        if accepted := acceptances(logs):
            yield "drafts accepted", Text(", ".join(f"{name} {share:.0%}" for name, share in accepted.items()))
        if self.retrained is not None:
            yield "retraining", Text(self._retraining(*self.retrained))
        if self.evaluated is not None:
            step, figures = self.evaluated
            yield "evaluation", Text(f"reward {figures['reward']:.3f} at step {step}")

    def _split(self) -> Text:
        """Where a step's time goes, as a bar and in words."""
        logs, total = self.logs, self.logs["rollout/step_seconds"]
        retrain, idle = (logs.get(f"rollout/{name}", 0.0) for name in ("seconds_retrain", "rank_idle_s"))
        parts = [
            ("rollout", "cyan", "█", logs["rollout/seconds"] - retrain),
            ("retraining", "magenta", "▓", retrain),
            ("waiting for other ranks", "yellow", "▒", idle),
            ("the rest", "dim", "░", total - logs["rollout/seconds"] - idle),
        ]
        parts = [(*part, seconds / total) for *part, seconds in parts if seconds > 0]
        text, cells, shown = Text(f"{total / self.steps_in_log:.1f} s "), 0.0, 0
        for _, style, block, share in parts:
            cells += share * 20
            text.append(block * (round(cells) - shown), style)
            shown = round(cells)
        return text.append(" " + ", ".join(f"{name} {share:.0%}" for name, _, _, share in parts))

    @staticmethod
    def _retraining(step: int, figures: dict[str, Any]) -> str:
        steps = figures["rollout/retrain_steps"]
        cost = f"{steps} step{'s' * (steps != 1)}, {figures['rollout/retrain_seconds']:.2f} s, at step {step}"
        if "rollout/retrain_acceptance_before" not in figures:
            return cost
        before, after, judged = retraining(figures)
        return f"{before} → {after} tokens per step, {judged} ({cost})"


class LivePanel(Display):
    """Keeps the panel up while the trainer trains. It leaves nothing behind, unless training fails: then what it showed last."""

    def __init__(self, atlas: AtlasRolloutGenerator) -> None:
        self.atlas = atlas
        self.view: RunView | None = None
        self.live: Live | None = None
        self.stack = ExitStack()

    def __exit__(self, error_type: type[BaseException] | None, *rest: Any) -> None:
        if self.live is not None:
            self.live.transient = error_type is None or error_type is KeyboardInterrupt
        self.stack.close()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        step = state.global_step
        self.view = RunView(
            title=f"atlas-rl · {args.output_dir}",
            first_step=step,
            step=step,
            logged_step=step,
            max_steps=state.max_steps,
            rollout=lambda: rollout_so_far(self.atlas.attachment),
        )
        # a file of its own: what wandb copies from sys.stdout into the run's log would be every frame
        terminal = self.stack.enter_context(
            os.fdopen(sys.stdout.fileno(), "w", encoding=sys.stdout.encoding, closefd=False)
        )
        self.live = Live(
            self.view,
            console=Console(file=terminal),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.stack.enter_context(unechoed(terminal.fileno()))
        self.stack.enter_context(printed_above(self.live, SECONDS_PER_FRAME))

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.view is not None:
            self.view.activity = f"training, step {state.global_step + 1}"

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.view is not None:
            self.view.step, self.view.step_end = state.global_step, time.monotonic()
            self.view.activity = "between two steps"

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        if self.view is not None:
            self.view.activity = f"evaluation after step {state.global_step}"

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        view, (phase, figures) = self.view, phase_of(logs)
        if view is None or "train_runtime" in logs:  # the summary of the whole run
            return
        if phase == "eval":
            if is_number(figures.get("reward")):
                view.evaluated = (state.global_step, figures)
            return
        if "rollout/retrain_updates" in logs:
            view.retrained = (state.global_step, logs)
        rewards = (entry["reward"] for entry in reversed(state.log_history) if is_number(entry.get("reward")))
        view.rewards = tuple(islice(rewards, NUM_REWARDS))[::-1]
        view.steps_in_log = max(1, state.global_step - view.logged_step)
        view.logged_step, view.logs = state.global_step, logs

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.stack.close()


def rollout_so_far(attachment: Attachment | None) -> str | None:
    """Of a rollout that is being made by another thread: only reads, and nothing that it could not change meanwhile."""
    engine = attachment.engine if attachment is not None else None
    if engine is None:
        return None
    stats, scheduler = engine.stats, engine.scheduler
    if not stats.num_completions or "total" in stats.seconds:  # none yet, or it is over
        return None
    what = "rollout" if attachment.in_step else "rollout of the evaluation"
    if scheduler is None:
        return f"before a {what}: weights and drafters"
    tokens = stats.row_steps + sum(stats.accepted_by_depth)
    return f"{what}: {tokens:,} tokens, {len(scheduler.running)} of {stats.num_completions} completions running"


def is_number(value: Any) -> bool:
    """A reward is None or NaN where no reward function applied to any sample of a step."""
    return value is not None and math.isfinite(value)


def sparkline(values: tuple[float, ...]) -> str:
    """One block per value, from the smallest to the largest; nothing where there is no course to show."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if not high > low:
        return ""
    return "".join(BLOCKS[int((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in values)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
