"""Show a training run: one page of charts with what they say in words, made from the run's rollouts.jsonl.

example:
  atlas-rl train --config configs/quickstart.yaml
  atlas-rl report runs/quickstart                    # writes runs/quickstart/report/index.html; open it in a browser
  atlas-rl report runs/quickstart --out /tmp/report

The page needs no network and no other file: send it, or keep it with the run. Its charts lie beside it as PNG. A run that still
goes on, or was stopped, can be shown too: make the report again to see more of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of a run, or its rollouts.jsonl")
    parser.add_argument("--out", metavar="DIR", help="where the page goes (default: RUN_DIR/report)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from atlas_rl.report.page import write_report
    from atlas_rl.report.run import read_run

    console = Console()
    with console.status("reading the log") as status:
        log = read_run(args.run_dir)
        page, *pictures = write_report(log, Path(args.out or log.path.parent / "report"), status.update)
    print(f"Report: {page}")
    print(f"Its {len(pictures)} charts as pictures: {', '.join(path.name for path in pictures)}")
    return 0
