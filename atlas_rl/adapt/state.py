"""What drafters have learned, saved with the trainer's checkpoints: safetensors and JSON, no pickle.

    <checkpoint>/atlas/state.json             numbers: controller, budget, calibration, generators
    <checkpoint>/atlas/<drafter>/             the head, as `atlas-rl drafter train` writes it
    <checkpoint>/atlas/optimizer.safetensors  moments of the adaptive head's optimizer, and counts of the draft vocabulary

The folder is written beside and renamed into place. What is not saved (the suffix drafter's counts, captured hidden states) is
learned again; in deterministic runs it is dropped at the checkpoint too, so that a resumed run goes on as this one does.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from atlas_rl.adapt.adaptation import Adaptation
from atlas_rl.drafters.checkpoints import load_head, replace_folder, save_head
from atlas_rl.drafters.heads import DraftHead
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.engine.engine import RolloutEngine

logger = logging.getLogger(__name__)

FOLDER, STATE, TENSORS = "atlas", "state.json", "optimizer.safetensors"
VERSION = 1


def save_state(checkpoint: Path, adaptation: Adaptation, engine: RolloutEngine | None) -> None:
    """Write the folder; a disk's fault costs one warning and nothing else."""
    target = checkpoint / FOLDER
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=target.parent))
    except OSError as error:
        logger.warning("the drafters' state is not saved: %s cannot be written (%s)", target, error)
        return
    try:
        Saved.of(adaptation, engine).write(scratch)
        scratch.chmod(0o755)  # mkdtemp's is private
        replace_folder(scratch, target)
    except (OSError, SafetensorError) as error:  # what safetensors makes of a full disk is its own
        logger.warning("the drafters' state is not saved: %s cannot be written (%s)", target, error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_state(checkpoint: Path, adaptation: Adaptation, engine: RolloutEngine) -> bool:
    """Take over what a checkpoint holds, or with one warning nothing of it, if it is damaged or another policy's."""
    folder = checkpoint / FOLDER
    if not folder.exists():
        return False
    before = Saved.of(adaptation, engine)
    try:
        Saved.read(folder, _heads(adaptation)).apply(adaptation, engine)
    except Exception as error:  # damage comes in all kinds
        before.apply(adaptation, engine)
        logger.warning("the drafters start anew: %s cannot be used (%s: %s)", folder, type(error).__name__, error)
        return False
    return True


@dataclass(frozen=True, slots=True)
class Saved:
    """What is saved, in the form of its files."""

    numbers: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    heads: dict[str, DraftHead]

    @classmethod
    def of(cls, adaptation: Adaptation, engine: RolloutEngine | None) -> Saved:
        retrainer, drafters = adaptation.retrainer, _heads(adaptation)
        numbers: dict[str, Any] = {
            "version": VERSION,
            "distill_steps_left": adaptation.distill_steps_left,
            "num_updates": adaptation.num_updates,
            "calibration": {
                name: {"right": d.calibration.right_KM.tolist(), "total": d.calibration.total_KM.tolist()}
                for name, d in drafters.items()
            },
            "controller": None if engine is None else engine.controller.state_dict(),
            "trust": {}
            if engine is None
            else {n: [t.accepted, t.expected] for n, t in engine.speculator.trust.items()},
            "retrainer": None if retrainer is None else retrainer.state_dict(),
            "heads": sorted(drafters),
        }
        tensors = {"empty": torch.zeros(1)}  # safetensors refuses a file of nothing
        for name, drafter in drafters.items():
            if drafter.vocabulary is not None:
                tensors[f"vocabulary.{name}.counts"] = torch.from_numpy(drafter.vocabulary.counts_V.copy())
                tensors[f"vocabulary.{name}.ids"] = torch.from_numpy(drafter.vocabulary.ids.copy())
        if retrainer is not None:
            for index, moments in retrainer.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{key}": value.cpu().clone() for key, value in moments.items()}
        return cls(numbers, tensors, {name: copy.deepcopy(d.head) for name, d in drafters.items()})

    @classmethod
    def read(cls, folder: Path, drafters: Iterable[str]) -> Saved:
        numbers = json.loads((folder / STATE).read_text())
        if numbers["version"] != VERSION:
            raise ValueError(f"it is of version {numbers['version']}, this is {VERSION}")
        heads = {name: load_head(folder / name) for name in drafters if name in numbers["heads"]}
        return cls(numbers, load_file(folder / TENSORS), heads)

    def write(self, folder: Path) -> None:
        for name, head in self.heads.items():
            save_head(head, folder / name)
        save_file(self.tensors, folder / TENSORS)
        (folder / STATE).write_text(json.dumps(self.numbers))

    def apply(self, adaptation: Adaptation, engine: RolloutEngine) -> None:
        """Give everything back to its owner; raises, and has changed a part of it, where something does not fit."""
        numbers, drafters = self.numbers, _heads(adaptation)
        if missing := {d.name for d in adaptation.drafters.of_new_head} - self.heads.keys():
            raise ValueError(f"it holds no head for {', '.join(sorted(missing))}")
        for name, head in self.heads.items():
            self._apply_drafter(name, head, drafters[name])
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
        if not all(p.isfinite().all() for p in head.parameters()):
            raise ValueError(f"the weights of {name} are NaN or infinite")
        drafter.head.load_state_dict(head.state_dict())
        right_KM, total_KM = drafter.calibration.right_KM, drafter.calibration.total_KM
        right_KM[:] = np.reshape(self.numbers["calibration"][name]["right"], right_KM.shape)
        total_KM[:] = np.reshape(self.numbers["calibration"][name]["total"], total_KM.shape)
        counts_V = self.tensors[f"vocabulary.{name}.counts"].numpy()
        ids = self.tensors[f"vocabulary.{name}.ids"].numpy()
        if counts_V.shape != (drafter.vocabulary.size,) or not (0 <= ids.min() <= ids.max() < len(counts_V)):
            raise ValueError(
                f"{name} drafts from another vocabulary: the policy's has {drafter.vocabulary.size} tokens"
            )
        drafter.vocabulary.counts_V, drafter.vocabulary.ids = counts_V.copy(), ids.copy()


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


def _heads(adaptation: Adaptation) -> dict[str, RecurrentDrafter]:
    """Drafters whose heads this run makes or trains; a static one that was loaded is where it was."""
    adaptive = [] if adaptation.drafters.adaptive is None else [adaptation.drafters.adaptive]
    return {drafter.name: drafter for drafter in (*adaptive, *adaptation.drafters.of_new_head)}
