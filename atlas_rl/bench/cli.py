"""Compare ways of making rollouts, side by side: same policy, prompts and lengths, all arms interleaved in one run.

  atlas-rl bench --config configs/bench.yaml --json bench.json
  atlas-rl bench --config configs/bench.yaml --arms hf_generate,atlas_plain

Arms: hf_generate (transformers, TRL's default), atlas_plain (the engine without speculation), atlas_suffix (with the suffix
drafter). Ratios are medians over pairs of runs within a round; lowest and highest stand beside them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

ARM_NAMES = ("hf_generate", "atlas_plain", "atlas_suffix")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML of the bench (see configs/bench.yaml)")
    parser.add_argument("--json", metavar="OUT", help="write all figures here")
    parser.add_argument("--arms", default=",".join(ARM_NAMES), help="comma-separated (default: all)")


def run(args: argparse.Namespace) -> int:
    arm_names = [name for name in args.arms.split(",") if name]
    unknown = [name for name in arm_names if name not in ARM_NAMES]
    if unknown or not arm_names:
        raise ValueError(f"--arms names {', '.join(unknown) or 'nothing'}: known are {', '.join(ARM_NAMES)}")
    from atlas_rl.config import read_yaml

    values = read_yaml(args.config)
    if args.json is not None:
        check_writable(Path(args.json))
    from rich.console import Console

    from atlas_rl.bench.runner import run_bench
    from atlas_rl.bench.workload import BenchConfig

    config = BenchConfig.from_dict(values)
    console = Console()
    with console.status("starting") as status:
        results = run_bench(config, arm_names, status.update)
    for result in results:
        console.print(table(result))
    if args.json is not None:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
        console.print(f"figures: {args.json}")
    return 0


def check_writable(path: Path) -> None:
    """Find out before minutes of measuring, not after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise ValueError(f"--json {path} cannot be written: {error}") from None


def table(result: dict[str, Any]) -> Any:
    """The medians of one workload, and each arm's speed over the first one."""
    from rich.table import Table

    workload = result["workload"]
    title = f"{workload['name']}: {workload['sequences']} sequences, {workload['completion_tokens']} tokens"
    grid = Table(title=title, title_justify="left")
    first = next(iter(result["arms"]))
    for column in ("arm", "tokens/s", "tokens/step", f"speed over {first}"):
        grid.add_column(column, justify="left" if column == "arm" else "right")
    for name, row in result["arms"].items():
        ratio = result["ratios"].get(f"{name}/{first}")
        over_first = f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})" if ratio else ""
        per_step = f"{row['tokens_per_decode_step']:.2f}" if "tokens_per_decode_step" in row else ""
        grid.add_row(name, f"{median(row['tokens_per_s']):.0f}", per_step, over_first)
    return grid
