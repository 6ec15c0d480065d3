"""The panel and the plain line of a training run, from given figures; and lines that are printed above the panel."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from queue import SimpleQueue

import pytest
from rich.console import Console
from rich.live import Live
from terminal import screen_of

from atlas_rl.cli.above import LinesAbove, printed_above
from atlas_rl.cli.panel import RunView, clock, sparkline
from atlas_rl.cli.progress import to_line

RETRAINED = {
    "rollout/retrain_updates": 1,
    "rollout/retrain_steps": 2,
    "rollout/retrain_seconds": 0.1,
    "rollout/retrain_acceptance_before": 3.1,
    "rollout/retrain_acceptance_after": 3.25,
    "rollout/retrain_kept": 1,
}
LOGS = RETRAINED | {
    "loss": 0.1,
    "reward": 0.4125,
    "completions/mean_length": 79.4,
    "completions/clipped_ratio": 0.125,
    "rollout/tokens_per_s": 4321.0,
    "rollout/speedup_estimate": 1.254,
    "rollout/tokens_per_decode_step": 1.3,
    "rollout/seconds": 2.0,
    "rollout/seconds_retrain": 0.5,
    "rollout/step_seconds": 10.0,
    "rollout/static_acceptance": 0.8,
    "rollout/suffix_acceptance": 0.4,
    "rollout/arm_plain": 0.2,
    "rollout/arm_static_and_suffix": 0.8,
}


def rendered(width: int, **fields: object) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, record=True, _environ={})
    console.print(RunView(title="atlas-rl · runs/mine", **fields))
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [100, 60])
def test_a_panel_has_every_figure_within_its_width(width):
    full = {
        "step": 3,
        "max_steps": 6,
        "logs": LOGS,
        "steps_in_log": 2,
        "rewards": (0.1, 0.2, 0.4),
        "retrained": (3, LOGS),
    }
    lines = rendered(width, **full, evaluated=(2, {"reward": 0.5}))
    assert {len(line) for line in lines} == {width}
    text = " ".join(" ".join(line.strip("│ ") for line in lines).split())
    for figure in (
        "step 3 of 6",
        "0.412 ▁▃█",
        "79 tokens on average, 12% clipped",
        "4,321 tokens/s, 1.25x plain decoding",
        "5.0 s ███▓░░░░░░░░░░░░░░░░ rollout 15%, retraining 5%, the rest 80%",
        "1.30 tokens",
        "static+suffix 80%, plain 20%",
        "static 80%, suffix 40%",
        "3.10 → 3.25 tokens per step, kept (2 steps, 0.10 s, at step 3)",
        "reward 0.500 at step 2",
    ):
        assert figure in text, figure


def test_figures_that_a_step_has_not_are_left_out():
    lines = rendered(100, step=1, max_steps=6, logs={"reward": None, "completions/mean_length": 7.0})
    assert len(lines) == 6 and "completions" in lines[4], "two borders, progress, activity, a gap, one figure"


def test_remaining_time_is_counted_from_where_the_run_began_and_down():
    now = time.monotonic()
    (line,) = (
        line
        for line in rendered(100, first_step=10, step=12, max_steps=20, start=now - 25, step_end=now - 5)
        if "step 12" in line
    )
    assert "step 12 of 20 · 0:25 · 1:1" in line, "8 steps of 10 s, 5 s ago"


def test_clock_and_sparkline():
    assert [clock(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
    assert [sparkline(v) for v in ((), (1.0,), (1.0, 1.0), (0.0, 1.0, 0.5))] == ["", "", "", "▁█▄"]


def test_plain_line():
    assert to_line(3, LOGS) == (
        "step    3  reward 0.412  tokens 79  clipped 12%  rollout tok/s 4,321  speed-up 1.25x  tokens/decode step 1.30  "
        "accepted static 80% suffix 40%  retrained 3.10 -> 3.25 kept"
    )
    undone = LOGS | {"rollout/retrain_kept": 0, "reward": None}
    assert to_line(3, undone).endswith("undone") and "reward" not in to_line(3, undone)
    evaluated = {"eval_reward": 0.5, "eval_loss": 1.0, "eval_rollout/tokens_per_s": 10.0, "epoch": 1.0}
    assert to_line(4, evaluated) == "step    4  evaluation  reward 0.500  rollout tok/s 10"
    assert to_line(4, {"train_runtime": 3.0}) == ""


# ---- what else is printed ------------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """A terminal, which returns its carriage at a line's end."""

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        return [line for line in screen_of(self.getvalue().replace("\n", "\r\n"), 80) if line]


def on_screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """stdout and stderr, from now on. (pytest sets its own between a fixture and its test.)"""
    screen = Screen()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, screen)
    return screen


def panel_on(screen: Screen, transient: bool) -> Live:
    console = Console(file=screen, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    options = {"auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}
    return Live("the panel", console=console, transient=transient, **options)


def test_whole_lines_above_and_one_panel_below(monkeypatch):
    screen = on_screen(monkeypatch)
    handler = logging.StreamHandler(screen)
    logger = logging.getLogger("a library")
    logger.addHandler(handler)
    live = panel_on(screen, transient=False)
    with printed_above(live, 0.01):
        print("a line")
        logger.warning("a warning")
        for share in (0, 50, 100):  # as tqdm does
            sys.stderr.write(f"\r{share}%")
            sys.stderr.flush()
        sys.stderr.write("\n")
        Console().print("[red]another console")
        print("a prompt", end="", flush=True)
        time.sleep(0.1)
        shown = screen.lines
    logger.removeHandler(handler)
    assert shown == ["a line", "a warning", "100%", "another console", "a prompt", "the panel"]
    assert sys.stdout is screen and handler.stream is screen, "everything is as it was"


def test_who_keeps_a_stream_writes_through_once_the_panel_is_gone(monkeypatch):
    screen = on_screen(monkeypatch)
    live = panel_on(screen, transient=True)
    with printed_above(live, 0.01):
        kept = sys.stdout
    kept.write("afterwards")
    assert screen.lines == ["afterwards"]


def test_a_forked_process_writes_to_the_stream_itself():
    above = LinesAbove(screen := Screen(), lines := SimpleQueue())
    above.process = os.getpid() + 1
    above.write("from a worker\n")
    assert screen.getvalue() == "from a worker\n" and lines.empty()
