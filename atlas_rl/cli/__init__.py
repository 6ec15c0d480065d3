"""The `atlas-rl` command. Nothing but the standard library is imported until a command runs, so `--help` is instant.

A command is a module with `add_arguments(parser)` and `run(args) -> int`; its docstring is its help text.
Exit codes: 0 done, 1 failure (with a traceback), 2 bad input (one line, no traceback), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from atlas_rl import __version__

COMMANDS = {
    "train": ("atlas_rl.cli.train", "train a policy with TRL, its rollouts made by Atlas"),
    "bench": ("atlas_rl.bench.cli", "compare ways of making rollouts, side by side on this machine"),
    "report": ("atlas_rl.report.cli", "show a training run: one page of charts, made from its log"),
    "drafter": ("atlas_rl.cli.drafter", "train a draft head for a policy, or measure one"),
    "doctor": ("atlas_rl.cli.doctor", "what works on this machine, what does not, and why"),
}

OVERVIEW = """usage: atlas-rl COMMAND [arguments]

Fast, exact rollouts for reinforcement learning of language models with TRL.

{commands}

  atlas-rl COMMAND --help    explains a command, with an example
  atlas-rl --version

Start here:  atlas-rl train --config quickstart"""


class Parser(argparse.ArgumentParser):
    """Reports bad input like the rest of Atlas-RL does, and accepts no abbreviated option."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def command() -> int:
    """`main` as a process of its own, which ends with it."""
    code = main()
    if code == 0 and "LOCAL_RANK" in os.environ:
        from atlas_rl.cli.launched import leave

        leave()
    return code


def main(argv: list[str] | None = None) -> int:
    try:
        return _dispatch(sys.argv[1:] if argv is None else list(argv))
    except ValueError as error:
        if os.environ.get("ATLAS_RL_TRACEBACK"):
            raise
        _complain(" ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:
        print("atlas-rl: interrupted", file=sys.stderr)
        return 130


def _dispatch(argv: list[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(OVERVIEW.format(commands="\n".join(f"  {name:<8} {about}" for name, (_, about) in COMMANDS.items())))
        return 0
    if name == "--version":
        print(f"atlas-rl {__version__}")
        return 0
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)} (commands: {', '.join(COMMANDS)})")
    # OpenMP threads that spin for milliseconds at every barrier slow a run down up to 40-fold as soon as another process wants a
    # core; a short spin costs 3 % on a quiet machine. Read once, when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    module = import_module(COMMANDS[name][0])
    parser = Parser(prog=f"atlas-rl {name}", description=module.__doc__)
    module.add_arguments(parser)
    if name == "train":  # takes TRL's fields too, which no parser here knows
        return module.run(*parser.parse_known_args(module.with_trainer_name(argv[1:])))
    return module.run(parser.parse_args(argv[1:]))


def _complain(line: str) -> None:
    """Once: of several processes that found the same, the first one speaks, and the launcher ends the others meanwhile."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(5)
    print(f"atlas-rl: {line}" if rank == "0" else f"atlas-rl: rank {rank}: {line}", file=sys.stderr)


def did_you_mean(name: str, known) -> str:
    """`: did you mean x?`, or nothing where no known name is close."""
    close = get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]!r}?" if close else ""
