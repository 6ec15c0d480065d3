"""Compare ways of making rollouts, side by side: same policy, prompts and lengths, all arms interleaved in one run.

  atlas-rl bench --config configs/bench_quick.yaml                        # five minutes
  atlas-rl bench --config configs/bench.yaml --json bench.json            # everything
  atlas-rl bench --config configs/bench.yaml --arms hf_generate,vllm,atlas_plain,atlas --workloads "draining GRPO batch"
  atlas-rl bench --config configs/bench_deep.yaml                         # a larger policy, where drafts pay
  atlas-rl bench --config configs/bench_27m.yaml --max_seconds 3600       # until the last ratio is decided

Arms: hf_generate (transformers, TRL's default), hf_continuous_batching (transformers, its KV cache sized to the batch),
hf_prompt_lookup (generate with its n-gram drafts, one sequence only), vllm, vllm_ngram and vllm_suffix (vLLM's CPU build, alone
and with its speculation that needs no trained drafter, in an environment that `python -m atlas_rl.bench.make_vllm_venv` makes),
atlas_plain (the engine without speculation), atlas_static, atlas_adaptive and atlas_suffix (with one drafter each), atlas (all
automatic). static@4, and the like, drafts 4 tokens at every step with one drafter: what the controller is to be measured against.

Ratios are medians over pairs of runs within a round. Rounds go on until their 95 % confidence intervals are within 1.5 % (within
5 % where a peer is part of it), or until the time is spent: what is still open then is called undecided. Figures are written
after every workload. Ctrl-C ends the bench and keeps what was measured; an arm that fails is left out from then on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from atlas_rl.bench import ARM_NAMES, FAILED, is_arm, is_engine

WIDE = 110
"""Columns of a terminal from which on a table shows the spread."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML of the bench (see configs/bench.yaml)")
    parser.add_argument("--json", metavar="OUT", help="write all figures here")
    parser.add_argument("--arms", default=",".join(ARM_NAMES), help="comma-separated (default: all)")
    parser.add_argument("--workloads", metavar="NAME,…", help="of the config's (default: all)")
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
    if args.workloads is not None:
        config = config.only([name.strip() for name in args.workloads.split(",")])
    if args.max_seconds is not None:
        config = replace(config, max_seconds=args.max_seconds)
    console = Console()

    def keep(results: list[dict[str, Any]]) -> None:
        if len(results) == 1:
            console.print(machine_line(results[-1]["machine"]), highlight=False)
        console.print(table(results[-1], console.width))
        for line in remarks(results[-1]):
            console.print(line, highlight=False, markup=False)
        console.print()
        if args.json is not None:
            write(results, args.json)

    with progress(console, config.max_seconds) as report:
        results = run_bench(config, arm_names, report, keep)
    if len(results) > 1:
        console.print(overview(results))
    if args.json is not None and write(results, args.json):
        console.print(f"figures: {args.json}")
    if results[-1]["interrupted"]:
        console.print("interrupted: this is what was measured until then")
        return 130
    return int(any((row["skipped"] or "").startswith(FAILED) for name, row in all_arms(results) if is_engine(name)))


def all_arms(results: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for result in results:
        yield from result["arms"].items()


@contextmanager
def progress(console: Any, max_seconds: float) -> Iterator[Callable[[str, float], None]]:
    """A line that says what is being done, and how much time is left at most. Drawn between runs only: a thread that draws would
    disturb the measurement."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TimeElapsedColumn(), BarColumn(20), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("starting", total=max_seconds)

        def report(what: str, spent: float) -> None:
            left = f"{max(0.0, max_seconds - spent) / 60:.0f} min left at most, " if spent else ""
            bar.update(task, completed=spent, description=left + what, refresh=True)

        yield report


def write(figures: Any, path: str) -> bool:
    """All or nothing: a bench that is killed leaves what it had written before, and a full disk costs a line, not the bench."""
    unfinished = Path(f"{path}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(figures, indent=1) + "\n")
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        print(f"{path} could not be written: {error}", file=sys.stderr)
        return False
    return True


def check_writable(path: Path) -> None:
    """Find out before minutes of measuring, not after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise ValueError(f"--json {path} cannot be written: {error}") from None


def machine_line(machine: dict[str, Any]) -> str:
    spincount = machine["gomp_spincount"] or "libgomp's default"
    where = machine["gpu"] or f"{machine['processor']} {machine['capability']}, {machine['cores']} cores"
    return f"machine: {where}, {machine['threads']} threads, GOMP_SPINCOUNT {spincount}"


def table(result: dict[str, Any], width: int) -> Any:
    """The medians of one workload with their spread, if there is room for it, and each arm's speed over the first one."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    grid = Table(title=title(result["workload"]), title_justify="left", box=SIMPLE_HEAD)
    measured = {name: row for name, row in result["arms"].items() if row["seconds"]}
    first = next(iter(measured), "")
    spread = ["min – max"] if width >= WIDE else []
    for column in ("arm", "n", "tokens/s", *spread, "per step", "KV MiB", f"over {first}"):
        grid.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for name, row in measured.items():
        ratio, speeds = result["ratios"].get(f"{name}/{first}"), row["tokens_per_s"]
        grid.add_row(
            name,
            str(len(speeds)),
            f"{median(speeds):.0f}",
            *([f"{min(speeds):.0f} – {max(speeds):.0f}"] if spread else []),
            f"{row['tokens_per_decode_step']:.2f}" if "tokens_per_decode_step" in row else "",
            f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "",
            in_words(ratio) if ratio else "",
        )
    return grid


def title(workload: dict[str, Any]) -> str:
    lens = "lengths as recorded" if workload["new_tokens"] is None else f"{workload['new_tokens']} tokens each"
    steps = f", {workload['batches']} steps of a run" if workload["training"] is not None else ""
    return f"{workload['name']} ({workload['sequences']} completions, {lens}{steps})"


def overview(results: list[dict[str, Any]]) -> Any:
    """All workloads side by side: speeds over the first arm, and the two ratios that are looked at first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    measured = {name for name, row in all_arms(results) if row["seconds"]}
    first, *others = [name for name in dict(all_arms(results)) if name in measured] or [""]
    pairs = [(name, first) for name in others]
    pairs += [("atlas", other) for other in ("atlas_plain", "vllm") if {"atlas", other} <= set(others)]
    grid = Table(f"speed over {first}", box=SIMPLE_HEAD)
    for result in results:
        grid.add_column(result["workload"]["name"], justify="right")
    for a, b in pairs:
        ratios = (result["ratios"].get(f"{a}/{b}") for result in results)
        name = a if b == first else f"{a}/{b}"
        grid.add_row(name, *(f"{ratio['median']:.2f}" if ratio else "–" for ratio in ratios))
    return grid


def remarks(result: dict[str, Any]) -> Iterator[str]:
    """What stands below a table: arms that made other completions or were skipped, what the time went into, the machine's limits,
    what was expected."""
    from atlas_rl.bench.vllm_arm import PRELOADED, TCMALLOC

    for name, row in result["arms"].items():
        if row.get("tokens_of_the_others"):
            own, others = fmean(row["tokens"]), fmean(row["tokens_of_the_others"])
            yield f"{name}: own samples of the same policy, {own:,.0f} tokens per repeat against {others:,.0f}"
        if row["skipped"]:
            yield f"{name}: {'' if row['skipped'].startswith(FAILED) else 'skipped, '}{row['skipped']}"
    preloaded = result["versions"].get(PRELOADED)
    if preloaded is not None and TCMALLOC not in preloaded:
        yield "vllm: without TCMalloc, which it asks for on CPU: apt-get install libtcmalloc-minimal4, then measure again"
    limits = result["limits"]
    if limits:
        yield (
            f"decode step of atlas_plain {1e3 * limits['decode_step_s']:.2f} ms = {in_words(limits['step_over_linears'])} x its "
            f"linears ({1e3 * limits['linears_s']:.2f} ms); limits: memory {1e3 * limits['memory_s']:.2f} ms, "
            f"arithmetic {1e3 * limits['arithmetic_s']:.2f} ms"
        )
    for name, bound in result["bounds"].items():
        parts = result["arms"][name]["parts"]
        shares = sorted(((seconds / sum(parts.values()), part) for part, seconds in parts.items()), reverse=True)
        yield (
            f"{name}: {bound['seconds']:.3f} s = {', '.join(f'{part} {share:.0%}' for share, part in shares if share >= 0.005)}; "
            f"its forwards take at least {bound['bound_s']:.3f} s here ({bound['bound_s'] / bound['seconds']:.0%}; memory "
            f"{bound['memory_s']:.3f} s, arithmetic {bound['arithmetic_s']:.3f} s)"
        )
    for key, judged in result["expectations"].items():
        bound = "at least" if "/" in key else "at most"
        by = f" by {judged['missed_by']:.1%}" if "missed_by" in judged else ""
        yield f"{key}, {bound} {judged['target']:g}: {judged['verdict']}{by}"


def in_words(ratio: dict[str, Any]) -> str:
    """The median with its confidence interval, which fewer than six repeats do not have."""
    half_width = "" if ratio["half_width"] is None else f" ±{ratio['half_width']:.1%}"
    return f"{ratio['median']:.3f}{half_width}{'' if ratio['decided'] else ' undecided'}"
