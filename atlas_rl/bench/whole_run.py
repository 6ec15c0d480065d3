"""Whole training runs side by side: the same trainer, config, data and reward, with TRL's own `generate` and with Atlas.

  python -m atlas_rl.bench.whole_run --json whole_run.json --png whole_run.png
  python -m atlas_rl.bench.whole_run --config my.yaml --seeds 0,1 --max_steps 20

Arms: trl_generate (no Atlas), atlas (all automatic), and on demand atlas_plain (without speculation). Each is a process that
trains as `atlas-rl train` does. They take their steps in turn, so that noise of the machine hits all of them, and which goes
first alternates; a waiting arm does nothing, and its clock stands still.

A step goes from its beginning to the next one's. Its rollout is the time inside the trainer's generation, by the same clock in
all arms: Atlas' retraining, refresh and first calibration are in it. How much faster a step can become follows from the
rollout's share of TRL's step and from how much less time Atlas takes per token (medians over pairs of steps); beside it stands
how much faster it became: as it is, and per token and per position of the longest completion, as lengths differ by chance.
Rewards are compared by the last fifth of the curves.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from atlas_rl.bench.cli import check_writable, machine_line, write
from atlas_rl.bench.whole_run_figures import TARGET, Runs, Step, summarize_runs
from atlas_rl.config import find_config, read_yaml

REFERENCE = "trl_generate"
ARMS = (REFERENCE, "atlas", "atlas_plain")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m atlas_rl.bench.whole_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", default="quickstart", metavar="FILE", help="as of `atlas-rl train` (default: quickstart)"
    )
    parser.add_argument("--seeds", default="0,1,2", metavar="S,…", help="a run of each arm per seed (default: 0,1,2)")
    parser.add_argument("--max_steps", type=int, metavar="N", help="instead of the config's")
    parser.add_argument("--arms", default="atlas", help="to compare with trl_generate (default: atlas)")
    parser.add_argument("--json", metavar="OUT", help="write all figures here, after each seed")
    parser.add_argument("--png", metavar="OUT", help="draw the reward curves (needs matplotlib)")
    args = parser.parse_args(words)
    args.arms = [name for name in args.arms.split(",") if name != REFERENCE]
    unknown = [name for name in args.arms if name not in ARMS]
    if unknown or not args.arms:
        parser.error(f"--arms names {', '.join(unknown) or 'nothing'}: known are {', '.join(ARMS[1:])}")
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds takes numbers, as in 0,1,2, got {args.seeds}")
    try:
        args.config_file = str(find_config(args.config))
    except ValueError as error:
        parser.error(f"--config: {error}")
    if args.png and find_spec("matplotlib") is None:
        parser.error("--png needs matplotlib: pip install 'atlas-rl[plots]'")
    return args


def main(words: list[str] | None = None) -> int:
    args = parse(words)
    # torch is not imported yet, here or in the arms
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `atlas-rl` sets it
    os.environ.update({str(name): str(value) for name, value in (read_yaml(args.config_file).get("env") or {}).items()})
    if args.json:
        check_writable(Path(args.json))
    console, runs, failure = Console(), [], None
    try:
        with progress_bar(console) as progress:
            for seed in args.seeds:
                runs.append({})
                run_seed(args, seed, runs[-1], progress)
                save(args, runs)
    except KeyboardInterrupt:
        failure = "interrupted: figures of the steps taken so far"
    except EOFError as error:
        failure = str(error)
    runs = [run for run in runs if run and all(run.values())]
    if runs:
        show(console, save(args, runs), args.seeds)
    if failure:
        print(failure, file=sys.stderr)
    return 1 if failure else 0


def progress_bar(console: Console) -> Progress:
    """Drawn between steps only: a thread that draws would disturb the measurement."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, auto_refresh=False)


def run_seed(args: argparse.Namespace, seed: int, run: dict[str, list[Step]], progress: Progress) -> None:
    """Fill `run` with each arm's steps, taken in turn."""
    names = [REFERENCE, *args.arms]
    run.update({name: [] for name in names})
    bar = progress.add_task(f"seed {seed}: loading", total=None)
    progress.refresh()
    arms: dict[str, ArmProcess] = {}
    try:
        for name in names:
            arms[name] = ArmProcess(name, args.config_file, seed, args.max_steps)
        num_steps = max(arm.answer()["max_steps"] for arm in arms.values())
        progress.update(bar, total=num_steps)
        for index in range(num_steps):
            for name in names if index % 2 else reversed(names):
                progress.update(bar, description=f"seed {seed}: {name:12}", refresh=True)
                run[name].append(arms[name].take_step())
            progress.update(bar, advance=1)
        progress.update(bar, description=f"seed {seed}", refresh=True)
    finally:
        for arm in arms.values():
            arm.close()


class ArmProcess:
    """A training run in a process of its own, waiting at the beginning of a step."""

    def __init__(self, name: str, config: str, seed: int, max_steps: int | None) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="atlas-whole-run-")
        self.log = Path(self.folder.name) / "log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "atlas_rl.bench.whole_run_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            start_new_session=True,  # Ctrl-C is for the bench, which ends its arms
        )
        fields = {
            "seed": seed,
            "output_dir": self.folder.name,
            "logging_strategy": "steps",
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": "none",
            "disable_tqdm": "true",
        }
        if max_steps is not None:
            fields["max_steps"] = max_steps
        flags = [word for field, value in fields.items() for word in (f"--{field}", str(value))]
        self.name = name
        self._tell(json.dumps({"arm": name, "config": config, "flags": flags}))

    def take_step(self) -> Step:
        self._tell("step")
        return self.answer()

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            last_words = self.log.read_text()[-2000:]
            raise EOFError(f"the process of {self.name} has ended, and these were its last words: {last_words}")
        return json.loads(line)

    def _tell(self, line: str) -> None:
        with suppress(BrokenPipeError):  # it has ended; `answer` says why
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.folder.cleanup()


def save(args: argparse.Namespace, runs: Runs) -> dict[str, Any]:
    """Everything so far, as JSON and as curves."""
    from atlas_rl.bench.runner import machine, versions

    result = {
        "machine": machine(),
        "versions": versions(),
        "config": args.config,
        "reference": REFERENCE,
        "runs": [{"seed": seed, "arms": run} for seed, run in zip(args.seeds, runs)],
        "summary": summarize_runs(runs, REFERENCE, args.arms),
    }
    if args.json:
        write(result, args.json)
    if args.png:
        from atlas_rl.telemetry.plots import plot_rewards

        plot_rewards(result, args.png)
    return result


def show(console: Console, result: dict[str, Any], seeds: list[int]) -> None:
    console.print(machine_line(result["machine"]), highlight=False)
    summary = dict(result["summary"])
    parts = summary.pop("parts")
    for arm, found in summary.items():
        overall, rewards = found["overall"], found["rewards"]
        console.print(speed_table(arm, found, seeds))
        for line in (*speed_lines(overall), *reward_lines(arm, rewards), ""):
            console.print(line, highlight=False, soft_wrap=True)
    console.print(parts_table(parts))


def speed_table(arm: str, found: dict[str, Any], seeds: list[int]) -> Table:
    """A column per seed, and one of all. Medians over pairs of steps, but means of tokens and of the longest completions."""
    columns = dict(zip([*(f"seed {seed}" for seed in seeds), "all"], [*found["by_seed"], found["overall"]]))
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "pairs of steps": lambda row: str(row["pairs"]),
        f"seconds per step, {REFERENCE}": lambda row: f"{row['seconds_per_step'][0]:.3f}",
        f"seconds per step, {arm}": lambda row: f"{row['seconds_per_step'][1]:.3f}",
        f"tokens per step, {REFERENCE}": lambda row: f"{row['tokens_per_step'][0]:,.0f}",
        f"tokens per step, {arm}": lambda row: f"{row['tokens_per_step'][1]:,.0f}",
        f"longest completion, {REFERENCE}": lambda row: f"{row['longest'][0]:.0f}",
        f"longest completion, {arm}": lambda row: f"{row['longest'][1]:.0f}",
        f"rollouts' share of {REFERENCE}'s step": lambda row: f"{row['rollout_share']:.1%}",
        "rollout ratio (seconds per token)": lambda row: f"{row['rollout_ratio']['median']:.2f}",
        "bound on a step's speed-up": lambda row: f"{row['bound']:.2f}",
        "a step's speed-up": lambda row: f"{row['per_step']['speedup']['median']:.2f}",
        "of the bound": lambda row: f"{row['per_step']['of_bound']['median']:.3f}",
        "of the bound, per token": lambda row: f"{row['per_token']['of_bound']['median']:.3f}",
        "of the bound, per position": lambda row: f"{row['per_position']['of_bound']['median']:.3f}",
    }
    grid = Table(title=f"{arm} against {REFERENCE}", title_justify="left")
    for name in ("", *columns):
        grid.add_column(name, justify="right" if name else "left", no_wrap=True)
    for label, line in lines.items():
        grid.add_row(label, *map(line, columns.values()))
    return grid


def speed_lines(overall: dict[str, Any]) -> Iterator[str]:
    for key in ("per_step", "per_token", "per_position"):
        found = overall[key]
        low_high = found["of_bound"]["interval"]
        interval = f"95 %: {low_high[0]:.3f} to {low_high[1]:.3f}" if low_high else "too few steps for an interval"
        speedup = f"{found['speedup']['median']:.2f} times as fast"
        share = f"{found['of_bound']['median']:.3f} of the bound ({interval})"
        yield f"seconds {key.replace('_', ' ')}: {speedup}, {share}, at least {TARGET:g}: {found['verdict']}"
    yield f"all steps together: {overall['speedup_of_sums']:.2f} times as fast"


def reward_lines(arm: str, rewards: dict[str, Any]) -> Iterator[str]:
    for name, firsts, lasts in zip((REFERENCE, arm), rewards["first"], rewards["last"]):
        curves = ", ".join(f"{first:.3f} → {last:.3f}" for first, last in zip(firsts, lasts))
        yield f"reward of {name}, first → last fifth, by seed: {curves}"
    width = rewards["half_width"]
    interval = "one seed has no interval" if width is None else f"±{width:.3f} at 95 %, by the spread between seeds"
    yield f"last fifths differ by {rewards['difference']:+.3f} ({interval}); within noise: {rewards['verdict']}"


def parts_table(parts: dict[str, dict[str, float]]) -> Table:
    grid = Table(title="A step's parts, milliseconds (medians)", title_justify="left")
    for name in ("", *parts):
        grid.add_column(name, justify="right" if name else "left", no_wrap=True)
    for part in dict.fromkeys(name for row in parts.values() for name in row):
        grid.add_row(part, *(f"{1e3 * row.get(part, 0.0):.1f}" for row in parts.values()))
    return grid


if __name__ == "__main__":
    sys.exit(main())
