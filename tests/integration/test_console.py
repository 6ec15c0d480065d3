"""What `atlas-rl train` shows: a live panel on a terminal, which nothing else that prints disturbs; plain lines elsewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from command_line_run import command, environment, prepare
from terminal import Terminal

SAID = ("printed", "logged", "shown", "counted")


@pytest.fixture
def folder(tiny_policy: Path, tmp_path: Path) -> Path:
    prepare(tmp_path, tiny_policy)
    return tmp_path


def has_panel(line: str) -> bool:
    return line.startswith(("╭─ atlas-rl", "│ step"))


def test_a_panel_leaves_the_screen_clean(folder):
    """It has been there, it is gone in the end; what was printed meanwhile stands above the table, once."""
    terminal = Terminal(command("--reward_funcs", "talking.slow", "--log_completions", "true"), folder, environment())
    terminal.read(until="drafted by")
    panel = "\n".join(terminal.screen)
    assert all(label in panel for label in ("step 1 of 3", "reward", "rollouts", "a step", "per decode step"))
    assert terminal.hides_cursor
    assert terminal.end() == 0
    screen = terminal.screen
    for said in [f"{verb} in call {call}." for verb in SAID for call in (1, 2, 3)]:
        assert sum(said in line for line in screen) == 1, said
    # log_completions' tables; TRL shows the last one again when it logs the run's summary
    assert [sum(f"─ Step {step} ─" in line for line in screen) for step in (1, 2, 3)] == [1, 1, 2]
    assert screen.count("Rollouts of this run") == 1
    assert not any(has_panel(line) for line in screen), "\n".join(screen)
    assert not any(line.startswith("step") or "'loss'" in line for line in screen), "the panel said it already"
    assert not terminal.hides_cursor
    assert screen[-2] == "Report of this run: atlas-rl report out"


def test_interrupt_takes_the_panel_down_and_prints_the_table(folder):
    terminal = Terminal(command("--reward_funcs", "talking.slow", "--max_steps", "99"), folder, environment())
    terminal.read(until="step 1 of 99")
    assert not terminal.echoes, "a ^C within a frame would break it"
    terminal.type("typed\n\n")
    terminal.read(until="step 2 of 99")
    terminal.type("\x03")
    assert terminal.end() == 130
    screen = terminal.screen
    assert terminal.left_with_echo and "typed" not in terminal.output
    assert screen.count("Rollouts of this run") == 1 and screen[-2] == "atlas-rl: interrupted"
    assert not any(has_panel(line) for line in screen), "\n".join(screen)
    assert not terminal.hides_cursor


def test_a_failure_leaves_the_panel_and_a_readable_traceback(folder):
    terminal = Terminal(command("--reward_funcs", "talking.failing"), folder, environment(), columns=60)
    assert terminal.end() == 1
    screen = terminal.screen
    once = sum(line.startswith("│ step 1 of 3") for line in screen) == 1
    assert once, "as it was last:\n" + "\n".join(screen)
    assert "RuntimeError: this reward is broken" in screen[-2]
    assert not terminal.hides_cursor


@pytest.mark.parametrize(
    "variables, flags", [({"TERM": "dumb"}, []), ({}, ["--disable_tqdm", "true"])], ids=["dumb", "disable_tqdm"]
)
def test_a_terminal_that_cannot_or_should_not_have_a_panel(folder, variables, flags):
    terminal = Terminal(command("--max_steps", "1", *flags), folder, environment(**variables), columns=200)
    assert terminal.end() == 0
    assert sum(line.startswith("step    1  reward") for line in terminal.screen) == 1
    assert not any(has_panel(line) for line in terminal.screen) and "'loss'" not in terminal.output


def test_a_log_file_gets_plain_lines(folder):
    """One for each logged step and evaluation; no bars, no escape codes, nothing twice."""
    flags = ("--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "4", "--logging_steps", "2")
    done = subprocess.run(command(*flags), cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    both = done.stdout + done.stderr
    assert "\r" not in both and "it/s" not in both and "'loss'" not in both
    assert not re.search(r"\x1b", done.stdout)
    lines = done.stdout.splitlines()
    assert [line[:18] for line in lines if line.startswith("step ")] == [
        "step    2  reward ",
        "step    2  evaluat",
        "step    4  reward ",
        "step    4  evaluat",
    ]
    assert sum("rollout tok/s" in line and "accepted" in line for line in lines) >= 1
    assert done.stdout.count("Rollouts of this run") == done.stdout.count("Report of this run:") == 1
