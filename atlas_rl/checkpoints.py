"""Which checkpoints a run can be resumed from, and which settings make such checkpoints.

transformers writes a checkpoint in place: weights, optimizer, the random state of every rank, and `trainer_state.json` last.
Atlas then writes what its drafters have learned beside it, and renames that folder to `atlas/` once every rank has saved. So a
checkpoint that holds both is whole, however the run ended. Nothing but the standard library is imported here.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

TRAINER_STATE, FOLDER = "trainer_state.json", "atlas"


def is_complete(checkpoint: str | Path) -> bool:
    return (Path(checkpoint) / TRAINER_STATE).is_file() and (Path(checkpoint) / FOLDER).is_dir()


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole `checkpoint-N` of a run's `output_dir`, for `trainer.train(resume_from_checkpoint=…)`; None without one.

    One warning names newer ones that it passes over, which a run left behind that ended while it was writing them.
    """
    passed_over: list[Path] = []
    for checkpoint in newest_first(output_dir):
        if is_complete(checkpoint):
            break
        passed_over.append(checkpoint)
    else:
        checkpoint = None
    if passed_over:
        names = ", ".join(path.name for path in passed_over)
        logger.warning("%s: %s is incomplete and passed over (%s)", output_dir, names, _what_is_missing(passed_over))
    return checkpoint


def newest_first(output_dir: str | Path) -> list[Path]:
    """Every `checkpoint-N`, whole or not."""
    folder = Path(output_dir)
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    steps = {path: int(named[1]) for path in found if (named := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def check_checkpoint(checkpoint: str | Path, deterministic: bool = False) -> None:
    """One that was named to resume from.

    Without Atlas' folder it may come from a run without Atlas: that is a warning, as drafters start anew.

    Raises:
        ValueError: it is not there or half-written; it lacks what a deterministic run must go on from.
    """
    path = Path(checkpoint)
    remedy = "name another, or `latest` for the newest complete one of output_dir"
    if not path.is_dir():
        raise ValueError(f"resume_from_checkpoint: the folder {path} does not exist: {remedy}")
    if not (path / TRAINER_STATE).is_file():
        raise ValueError(f"resume_from_checkpoint: {path} is incomplete, it holds no {TRAINER_STATE}: {remedy}")
    if (path / FOLDER).is_dir():
        return
    if deterministic:
        raise ValueError(
            f"resume_from_checkpoint: {path} holds no folder {FOLDER}/, so that the drafters' state is lost and the run would "
            f"not repeat: {remedy}, or set deterministic: false"
        )
    logger.warning("%s holds no folder %s/: the run goes on from it, its drafters start anew", path, FOLDER)


def check_saving(args: Any, deterministic: bool = False, save_steps: float | None = None) -> None:
    """That a deterministic run can be resumed from what the trainer's settings will save.

    GRPO drops what is left of a generation on resume, so checkpoints have to fall between two of them.

    Args:
        args: the trainer's. save_steps: as the trainer's state has it; None where there is none yet.
    Raises:
        ValueError: `deterministic`, and checkpoints would fall inside a generation.
    """
    if deterministic and _save_strategy(args) != "no" and args.save_only_model:
        raise ValueError(
            "save_only_model: with deterministic: true checkpoints need the optimizer and the random state, without which a "
            "resumed run does not repeat: set save_only_model: false"
        )
    # an epoch ends between two generations
    name = {"steps": "save_steps", "best": "eval_steps"}.get(_save_strategy(args))
    steps_per_generation = getattr(args, "steps_per_generation", None)
    if not deterministic or name is None or not steps_per_generation:
        return
    if save_steps is None or name == "eval_steps":
        save_steps = getattr(args, name) or args.logging_steps
    if save_steps < 1:  # a share of the run
        if args.max_steps <= 0:
            return
        save_steps = math.ceil(args.max_steps * save_steps)
    batches = steps_per_generation * getattr(args, "num_iterations", 1)
    period = batches // math.gcd(batches, args.gradient_accumulation_steps)  # in optimizer steps
    if int(save_steps) % period:
        raise ValueError(
            f"{name}: with deterministic: true a checkpoint must fall between two generations, which happens every {period} "
            f"optimizer steps (steps_per_generation {steps_per_generation} x num_iterations "
            f"{getattr(args, 'num_iterations', 1)} / gradient_accumulation_steps {args.gradient_accumulation_steps}), and "
            f"{int(save_steps)} is no multiple of {period}: set {name}: {math.ceil(save_steps / period) * period}"
        )


def warn_of_saving(args: Any) -> None:
    """transformers deletes older checkpoints before callbacks, and so Atlas, have saved theirs; or saves only weights."""
    if _save_strategy(args) == "no":
        return
    if args.save_only_model:
        logger.warning("save_only_model: a run that is resumed from such a checkpoint starts with a new optimizer")
    if args.save_total_limit == 1:
        logger.warning(
            "save_total_limit: 1 deletes the last checkpoint before the next is complete: a run that ends in between cannot be "
            "resumed. Set it to 2"
        )


def reopen(checkpoint: str | Path) -> None:
    """Before an older run's checkpoint is written over: it is not complete until that is done."""
    folder = Path(checkpoint) / FOLDER
    if folder.is_dir():
        retired = folder.with_name(f".{FOLDER}-old-{os.getpid()}")
        os.rename(folder, retired)  # in one go, unlike its removal
        shutil.rmtree(retired, ignore_errors=True)


def _save_strategy(args: Any) -> str:
    return str(getattr(args.save_strategy, "value", args.save_strategy))


def _what_is_missing(checkpoints: list[Path]) -> str:
    names = (TRAINER_STATE, f"{FOLDER}/")
    return "no " + " or ".join(name for name in names if any(not (path / name).exists() for path in checkpoints))
