"""What drafters have learned, saved with the trainer's checkpoints: safetensors and JSON, no pickle.

    <checkpoint>/atlas/state.json             numbers: controller, budget, calibration, generators
    <checkpoint>/atlas/<drafter>/             the head, as `atlas-rl drafter train` writes it
    <checkpoint>/atlas/optimizer.safetensors  moments of the adaptive head's optimizer, counts of the draft vocabulary, and such

The folder is written beside and renamed into place. What is not saved (the suffix drafter's counts, captured hidden states) is
learned again; in deterministic runs it is dropped at the checkpoint too, so that a resumed run goes on as this one does.

On several ranks rank 0 writes for all of them, once all have come that far: where the folder is, every rank has written its part
of the trainer's checkpoint. What differs by rank is in state.json for each of them, rank 0's where a single process has its own.
A run of another number of ranks takes what there is in turn. All ranks resume from a checkpoint, or none of them does.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from atlas_rl.adapt.adaptation import Adaptation
from atlas_rl.checkpoints import FOLDER
from atlas_rl.drafters.checkpoints import load_head, replace_folder, save_head
from atlas_rl.drafters.heads import DraftHead
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.engine.engine import RolloutEngine

logger = logging.getLogger(__name__)

STATE, TENSORS = "state.json", "optimizer.safetensors"
EXTRA = "extra."
VERSION = 2
OF_RANK = ("calibration", "controller", "trust", "retrainer")
"""Numbers that each rank has of its own."""


def save_state(
    checkpoint: Path,
    adaptation: Adaptation,
    engine: RolloutEngine | None,
    extra: dict[str, np.ndarray] | None = None,
) -> None:
    """Write the folder; a disk's fault costs one warning and nothing else. Collective.

    Args:
        extra: arrays to keep beside, the same on all ranks.
    """
    mine = {name: numbers for name, numbers in _numbers(adaptation, engine).items() if name in OF_RANK}
    of_ranks = adaptation.ranks.meet("saving the drafters", mine)
    adaptation.add_up_words()
    if adaptation.ranks.rank == 0:
        _write(checkpoint / FOLDER, Saved.of(adaptation, engine, of_ranks[1:], extra))


def save_nothing(checkpoint: Path) -> None:
    """An empty folder, of a run that has no drafters: the checkpoint is complete."""
    try:
        (checkpoint / FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("%s cannot be made (%s)", checkpoint / FOLDER, error)


def _write(target: Path, saved: Saved) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=target.parent))
    except OSError as error:
        logger.warning("the drafters' state is not saved: %s cannot be written (%s)", target, error)
        return
    try:
        saved.write(scratch)
        scratch.chmod(0o755)  # mkdtemp's is private
        replace_folder(scratch, target)
    except (OSError, SafetensorError) as error:  # what safetensors makes of a full disk is its own
        logger.warning("the drafters' state is not saved: %s cannot be written (%s)", target, error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_state(
    checkpoint: Path, adaptation: Adaptation, engine: RolloutEngine, extra: dict[str, np.ndarray] | None = None
) -> bool:
    """Take over what a checkpoint holds, or with one warning nothing of it, if it is damaged or another policy's. Collective.

    Args:
        extra: takes the arrays that were kept beside.
    """
    folder, ranks = checkpoint / FOLDER, adaptation.ranks
    ranks.meet("reading the drafters' state")
    found: tuple[Saved | None, str | None] = (None, None)
    if ranks.rank == 0 and folder.exists():  # other machines may not have it
        found = _tried(lambda: Saved.read(folder, adaptation.trained))
    saved, fault = ranks.from_first(found)
    if saved is None and fault is None:
        return False
    adaptation.add_up_words()
    before = Saved.of(adaptation, engine)
    faults = [fault]
    if saved is not None:
        saved.take_numbers_of(ranks.rank)
        faults = ranks.meet("resuming the drafters", _tried(lambda: saved.apply(adaptation, engine))[1])
    if any(faults):
        before.apply(adaptation, engine)
        if ranks.rank == 0:
            told = dict.fromkeys(fault for fault in faults if fault)
            logger.warning("the drafters start anew: %s cannot be used (%s)", folder, "; ".join(told))
        return False
    adaptation.is_joined = False
    if extra is not None:
        extra.update(saved.extra)
    return True


def _tried(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it returns, or what it raised: damage comes in all kinds."""
    try:
        return work(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


@dataclass(frozen=True, slots=True)
class Saved:
    """What is saved, in the form of its files."""

    numbers: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    heads: dict[str, DraftHead]

    @classmethod
    def of(
        cls,
        adaptation: Adaptation,
        engine: RolloutEngine | None,
        of_others: Iterable[dict[str, Any]] = (),
        extra: dict[str, np.ndarray] | None = None,
    ) -> Saved:
        """
        Args:
            of_others: numbers of rank 1, 2, …
        """
        retrainer, drafters = adaptation.retrainer, adaptation.trained
        numbers = _numbers(adaptation, engine) | {"ranks": list(of_others)}
        tensors = {"empty": torch.zeros(1)}  # safetensors refuses a file of nothing
        for name, drafter in drafters.items():
            if drafter.vocabulary is not None:
                tensors[f"vocabulary.{name}.counts"] = torch.from_numpy(drafter.vocabulary.counts_V.copy())
                tensors[f"vocabulary.{name}.ids"] = torch.from_numpy(drafter.vocabulary.ids.copy())
        if retrainer is not None:
            for index, moments in retrainer.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{key}": value.cpu().clone() for key, value in moments.items()}
        for name, array in (extra or {}).items():
            tensors[EXTRA + name] = torch.from_numpy(array.copy())
        return cls(numbers, tensors, {name: copy.deepcopy(d.head) for name, d in drafters.items()})

    @classmethod
    def read(cls, folder: Path, drafters: Iterable[str]) -> Saved:
        numbers = json.loads((folder / STATE).read_text())
        if numbers["version"] != VERSION:
            raise ValueError(f"it is of version {numbers['version']}, this is {VERSION}")
        heads = {name: load_head(folder / name) for name in drafters if name in numbers["heads"]}
        return cls(numbers, load_file(folder / TENSORS), heads)

    def take_numbers_of(self, rank: int) -> None:
        of_ranks = [{name: self.numbers[name] for name in OF_RANK}, *self.numbers["ranks"]]
        self.numbers.update(of_ranks[rank % len(of_ranks)])

    @property
    def extra(self) -> dict[str, np.ndarray]:
        return {n.removeprefix(EXTRA): t.numpy() for n, t in self.tensors.items() if n.startswith(EXTRA)}

    def write(self, folder: Path) -> None:
        for name, head in self.heads.items():
            save_head(head, folder / name)
        save_file(self.tensors, folder / TENSORS)
        (folder / STATE).write_text(json.dumps(self.numbers))

    def apply(self, adaptation: Adaptation, engine: RolloutEngine) -> None:
        """Give everything back to its owner; raises, and has changed a part of it, where something does not fit."""
        numbers, drafters = self.numbers, adaptation.trained
        if missing := {d.name for d in adaptation.drafters.of_new_head} - self.heads.keys():
            raise ValueError(f"it holds no head for {', '.join(sorted(missing))}")
        for name, head in self.heads.items():
            self._apply_drafter(name, head, drafters[name])
        for drafter in _calibrated(adaptation):
            if drafter.name in numbers["calibration"]:
                right_KM, total_KM = drafter.calibration.right_KM, drafter.calibration.total_KM
                right_KM[:] = np.reshape(numbers["calibration"][drafter.name]["right"], right_KM.shape)
                total_KM[:] = np.reshape(numbers["calibration"][drafter.name]["total"], total_KM.shape)
        adaptation.distill_steps_left = numbers["distill_steps_left"]
        adaptation.num_updates = numbers["num_updates"]
        if adaptation.retrainer is not None and numbers["retrainer"] is not None:
            _take_optimizer(adaptation.retrainer.optimizer, self.tensors)
            adaptation.retrainer.load_state_dict(numbers["retrainer"])
        if numbers["controller"] is not None:
            engine.controller.load_state_dict(numbers["controller"])
        for name, (accepted, expected) in numbers["trust"].items():
            if name in engine.speculator.trust:
                trust = engine.speculator.trust[name]
                trust.accepted, trust.expected = float(accepted), float(expected)
        if not adaptation.distill_steps_left:
            for drafter in adaptation.drafters.of_new_head:
                engine.speculator.reinstate(drafter.name)
        for name in self.heads:
            engine.speculator.weights_updated(name)

    def _apply_drafter(self, name: str, head: DraftHead, drafter: RecurrentDrafter) -> None:
        if head.config_dict() != drafter.head.config_dict():
            raise ValueError(f"the head of {name} is another policy's: {head.config_dict()}")
        if not head.is_finite:
            raise ValueError(f"the weights of {name} are NaN or infinite")
        drafter.head.load_state_dict(head.state_dict())
        counts_V = self.tensors[f"vocabulary.{name}.counts"].numpy()
        ids = self.tensors[f"vocabulary.{name}.ids"].numpy()
        if counts_V.shape != (drafter.vocabulary.size,) or not (0 <= ids.min() <= ids.max() < len(counts_V)):
            raise ValueError(
                f"{name} drafts from another vocabulary: the policy's has {drafter.vocabulary.size} tokens"
            )
        drafter.vocabulary.load(counts_V, ids)


def _numbers(adaptation: Adaptation, engine: RolloutEngine | None) -> dict[str, Any]:
    """As this rank has them."""
    drafters, retrainer = adaptation.trained, adaptation.retrainer
    return {
        "version": VERSION,
        "distill_steps_left": adaptation.distill_steps_left,
        "num_updates": adaptation.num_updates,
        "calibration": {
            d.name: {"right": d.calibration.right_KM.tolist(), "total": d.calibration.total_KM.tolist()}
            for d in _calibrated(adaptation)
        },
        "controller": None if engine is None else engine.controller.state_dict(),
        "trust": {} if engine is None else {n: [t.accepted, t.expected] for n, t in engine.speculator.trust.items()},
        "retrainer": None if retrainer is None else retrainer.state_dict(),
        "heads": sorted(drafters),
    }


def _calibrated(adaptation: Adaptation) -> list[Any]:
    """Drafters that know how often which of their drafts is right; also one whose weights are not saved, as they never change."""
    return [drafter for drafter in adaptation.drafters.all if hasattr(drafter, "calibration")]


def _take_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor.clone()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if moments:  # none before the first step
        shapes = {i: {key: value.shape for key, value in of_one.items()} for i, of_one in moments.items()}
        expected = {i: {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape} for i, p in enumerate(parameters)}
        if shapes != expected:
            raise ValueError("the optimizer's moments are incomplete, or another head's")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
