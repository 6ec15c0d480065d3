"""Compare ways of making rollouts, side by side: same policy, prompts and lengths, all arms interleaved in one run.

  atlas-rl bench --config configs/bench.yaml --json bench.json
  atlas-rl bench --config configs/bench.yaml --arms hf_generate,atlas_plain
  atlas-rl bench --config configs/bench_27m.yaml --max_seconds 3600       # until the last ratio is decided

Arms: hf_generate (transformers, TRL's default), hf_continuous_batching (transformers, its KV cache sized to the batch), vllm (its
CPU build, in an environment that `python -m atlas_rl.bench.make_vllm_venv` makes), atlas_plain (the engine without
speculation), atlas_static, atlas_adaptive and atlas_suffix (with one drafter each), atlas (all automatic). static@4, and the
like, drafts 4 tokens at every step with one drafter: what the controller is to be measured against.

Ratios are medians over pairs of runs within a round. Rounds go on until their 95 % confidence intervals are within 1.5 %, or
until the time is spent: what is still open then is called undecided.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from atlas_rl.bench import ARM_NAMES, is_arm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML of the bench (see configs/bench.yaml)")
    parser.add_argument("--json", metavar="OUT", help="write all figures here")
    parser.add_argument("--arms", default=",".join(ARM_NAMES), help="comma-separated (default: all)")
    parser.add_argument("--max_seconds", type=float, metavar="S", help="instead of the config's")


def run(args: argparse.Namespace) -> int:
    arm_names = [name for name in args.arms.split(",") if name]
    unknown = [name for name in arm_names if not is_arm(name)]
    if unknown or not arm_names:
        raise ValueError(f"--arms names {', '.join(unknown) or 'nothing'}: known are {', '.join(ARM_NAMES)}")
    from atlas_rl.config import find_config, read_yaml

    values = read_yaml(find_config(args.config))
    if args.json is not None:
        check_writable(Path(args.json))
    from rich.console import Console

    from atlas_rl.bench.runner import run_bench
    from atlas_rl.bench.workload import BenchConfig

    config = BenchConfig.from_dict(values)
    if args.max_seconds is not None:
        config = replace(config, max_seconds=args.max_seconds)
    console = Console()
    with console.status("starting") as status:
        results = run_bench(config, arm_names, status.update)
    for result in results:
        console.print(table(result))
        for line in remarks(result):
            console.print(line, highlight=False, markup=False)
        console.print()
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
    lens = "lengths as recorded" if workload["new_tokens"] is None else f"{workload['new_tokens']} tokens each"
    title = f"{workload['name']} ({workload['sequences']} completions, {lens})"
    grid = Table(title=title, title_justify="left")
    measured = {name: row for name, row in result["arms"].items() if row["seconds"]}
    first = next(iter(measured), "")
    for column in ("arm", "n", "tokens/s", "per step", f"over {first}"):
        grid.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for name, row in measured.items():
        ratio = result["ratios"].get(f"{name}/{first}")
        per_step = f"{row['tokens_per_decode_step']:.2f}" if "tokens_per_decode_step" in row else ""
        speed = f"{median(row['tokens_per_s']):.0f}"
        grid.add_row(name, str(len(row["seconds"])), speed, per_step, in_words(ratio) if ratio else "")
    return grid


def remarks(result: dict[str, Any]) -> Iterator[str]:
    """What stands below a table: skipped arms, the machine's limits, what was expected."""
    for name, row in result["arms"].items():
        if row["skipped"]:
            yield f"{name}: skipped, {row['skipped']}"
    limits = result["limits"]
    if limits:
        yield (
            f"decode step of atlas_plain {1e3 * limits['decode_step_s']:.2f} ms = {in_words(limits['step_over_linears'])} x its "
            f"linears ({1e3 * limits['linears_s']:.2f} ms); limits: memory {1e3 * limits['memory_s']:.2f} ms, "
            f"arithmetic {1e3 * limits['arithmetic_s']:.2f} ms"
        )
    for key, judged in result["expectations"].items():
        bound = "at least" if "/" in key else "at most"
        by = f" by {judged['missed_by']:.1%}" if "missed_by" in judged else ""
        yield f"{key}, {bound} {judged['target']:g}: {judged['verdict']}{by}"


def in_words(ratio: dict[str, Any]) -> str:
    """The median with its confidence interval, which fewer than six repeats do not have."""
    half_width = "" if ratio["half_width"] is None else f" ±{ratio['half_width']:.1%}"
    return f"{ratio['median']:.3f}{half_width}{'' if ratio['decided'] else ' undecided'}"
