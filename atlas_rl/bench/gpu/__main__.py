"""`python -m atlas_rl.bench.gpu`; see the package's own text, or --help."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import atlas_rl.bench.gpu as package
from atlas_rl.bench.gpu import decode, kernels, memory, policy, rates, training
from atlas_rl.bench.gpu.machine import Machine
from atlas_rl.bench.gpu.plan import DRY, FULL
from atlas_rl.bench.gpu.section import Section, last_lines, say

SECTIONS: dict[str, tuple[Callable[[Section], None], float]] = {
    "machine": (rates.run, 20),
    "kernels": (kernels.run, 150),
    "decode": (decode.run, 150),
    "policy": (policy.run, 140),
    "training": (training.run, 80),
    "memory": (memory.run, 30),
}
"""With their shares of the time. What one leaves is the later ones'."""
RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if not (args.dry_run or torch.cuda.is_available()):
        print(
            "python -m atlas_rl.bench.gpu: torch finds no CUDA device here, and there is nothing to measure without one. "
            "--dry-run exercises the same code on the CPU.",
            file=sys.stderr,
        )
        return 2
    machine = Machine(torch.device("cpu") if args.dry_run else torch.device("cuda", torch.cuda.current_device()))
    out = args.out or (RESULTS if machine.is_gpu else Path(tempfile.gettempdir())) / f"gpu_{_slug(machine)}.json"
    report = {
        "dry_run": args.dry_run,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **machine.describe(),
        "sections": {},
    }
    _write(out, report)
    logging.disable_progress_bar()  # of loading the small policy

    def save(sections: dict[str, Any]) -> None:
        _write(out, report | {"sections": sections})

    sections = run(machine, args.only, 60 * args.minutes, args.dry_run, save)
    save(sections)
    _print_table(sections)
    say(f"figures: {out}")
    return 1 if any(section["errors"] for section in sections.values()) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m atlas_rl.bench.gpu",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of all figures (default: see above)")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="SECTION,…", help="some sections (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="to be done in (default: 9)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU at tiny sizes")
    args = parser.parse_args(arguments)
    args.only = [name for name in args.only.split(",") if name]
    unknown = [name for name in args.only if name not in SECTIONS]
    if unknown or not args.only:
        parser.error(f"--only names {', '.join(unknown) or 'nothing'}: sections are {', '.join(SECTIONS)}")
    if not args.minutes > 0:
        parser.error(f"--minutes must be positive, got {args.minutes}")
    return args


def run(
    machine: Machine, names: list[str], seconds: float, dry_run: bool, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """By section, in the order of SECTIONS: results, checks, errors."""
    plan, end = DRY if dry_run else FULL, time.perf_counter() + seconds
    names = [name for name in SECTIONS if name in names]
    done: dict[str, Any] = {}

    @cache
    def copy_rate() -> float:
        return rates.copy_rate(machine, plan)

    for index, name in enumerate(names):
        start = time.perf_counter()
        if not machine.works():
            return done | _in_another_process(names[index:], end - start)
        share = SECTIONS[name][1] / sum(SECTIONS[later][1] for later in names[index:])
        deadline = start + share * (end - start)
        section = Section(
            name=name,
            machine=machine,
            plan=plan,
            deadline=deadline,
            copy_rate=copy_rate,
            save=lambda row, name=name: save(done | {name: row}),
        )
        say(f"{name}: up to {deadline - start:.0f} s")
        try:
            SECTIONS[name][0](section)
        except Exception as error:  # the others are worth their time
            section.errors["section"] = last_lines(error)
            say(f"  {name} raised {type(error).__name__}: {error}")
        done[name] = section.to_dict() | {"seconds": time.perf_counter() - start}
        save(done)
        machine.release()
    return done


def _in_another_process(names: list[str], seconds: float) -> dict[str, Any]:
    """The rest of the sections, where a kernel has left this process without a device."""
    say(f"the device is lost to this process: {', '.join(names)} in another one")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rest.json"
        options = ["--only", ",".join(names), "--minutes", str(max(seconds, 1.0) / 60), "--out", str(out)]
        subprocess.run([sys.executable, "-m", "atlas_rl.bench.gpu", *options], check=False)
        return json.loads(out.read_text())["sections"] if out.exists() else {}


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, default=str) + "\n")


def _slug(machine: Machine) -> str:
    return (
        "dry_run" if not machine.is_gpu else re.sub(r"[^a-z0-9]+", "_", machine.describe()["device"].lower()).strip("_")
    )


def _print_table(sections: dict[str, Any]) -> None:
    say("")
    for name, section in sections.items():
        for check in section["checks"]:
            measured = "-" if check["measured"] is None else f"{check['measured']:.4g}"
            say(f"{name:9s} {check['verdict']:12s} {check['target']:>9s} {measured:>10s}  {check['what']}")
        for part, reason in (section["errors"] | section["skipped"]).items():
            say(
                f"{name:9s} {'failed' if part in section['errors'] else 'skipped':12s} {part}: {reason.splitlines()[-1]}"
            )


if __name__ == "__main__":
    raise SystemExit(main())
