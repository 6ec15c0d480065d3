"""What drafters have learned, saved with the trainer's checkpoints: safetensors and JSON, no pickle.

    <checkpoint>/atlas/state.json             numbers: controller, budget, calibration, generators
    <checkpoint>/atlas/<drafter>/             the head, as `atlas-rl drafter train` writes it
    <checkpoint>/atlas/optimizer.safetensors  moments of the adaptive head's optimizer, and counts of the draft vocabulary

The folder is written beside and renamed into place. What is not saved (the suffix drafter's counts, captured hidden states) is
learned again; in deterministic runs it is dropped at the checkpoint too, so that a resumed run goes on as this one does.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from atlas_rl.adapt.adaptation import Adaptation
from atlas_rl.drafters.checkpoints import load_head, save_head
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
        _write(scratch, adaptation, engine)
        if target.exists():
            shutil.rmtree(target)
        scratch.chmod(0o755)  # mkdtemp's is private
        scratch.rename(target)
    except (OSError, SafetensorError) as error:  # what safetensors makes of a full disk is its own
        logger.warning("the drafters' state is not saved: %s cannot be written (%s)", target, error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_state(checkpoint: Path, adaptation: Adaptation, engine: RolloutEngine) -> bool:
    """Take over what a checkpoint holds; False, with a warning if it is damaged or another policy's, where that is nothing."""
    folder = checkpoint / FOLDER
    if not folder.exists():
        return False
    try:
        state = json.loads((folder / STATE).read_text())
        tensors = load_file(folder / TENSORS)
        if state["version"] != VERSION:
            raise ValueError(f"it is of version {state['version']}, this is {VERSION}")
        _take(folder, state, tensors, adaptation, engine)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        logger.warning("the drafters start anew: %s cannot be used (%s: %s)", folder, type(error).__name__, error)
        return False
    return True


def _write(folder: Path, adaptation: Adaptation, engine: RolloutEngine | None) -> None:
    retrainer, heads = adaptation.retrainer, _heads(adaptation)
    state: dict[str, Any] = {
        "version": VERSION,
        "distill_steps_left": adaptation.distill_steps_left,
        "num_updates": adaptation.num_updates,
        "calibration": {
            name: {"right": d.calibration.right_KM.tolist(), "total": d.calibration.total_KM.tolist()}
            for name, d in heads.items()
        },
        "controller": None if engine is None else engine.controller.state_dict(),
        "trust": {} if engine is None else {n: [t.accepted, t.expected] for n, t in engine.speculator.trust.items()},
        "retrainer": None if retrainer is None else retrainer.state_dict(),
        "heads": sorted(heads),
    }
    tensors = {"empty": torch.zeros(1)}  # safetensors refuses a file of nothing
    for name, drafter in heads.items():
        save_head(drafter.head, folder / name)
        if drafter.vocabulary is not None:
            tensors[f"vocabulary.{name}.counts"] = torch.from_numpy(drafter.vocabulary.counts_V.copy())
            tensors[f"vocabulary.{name}.ids"] = torch.from_numpy(drafter.vocabulary.ids.copy())
    if retrainer is not None:
        for index, moments in retrainer.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value.cpu().clone() for key, value in moments.items()}
    save_file(tensors, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(state))


def _take(
    folder: Path, state: dict[str, Any], tensors: dict[str, torch.Tensor], adaptation: Adaptation, engine: RolloutEngine
) -> None:
    heads = _heads(adaptation)
    loaded = {name: load_head(folder / name).state_dict() for name in heads if name in state["heads"]}
    for name, weights in loaded.items():
        drafter = heads[name]
        drafter.head.load_state_dict(weights)
        counts = state["calibration"][name]
        drafter.calibration.right_KM[:] = counts["right"]
        drafter.calibration.total_KM[:] = counts["total"]
        if f"vocabulary.{name}.counts" in tensors:
            drafter.vocabulary.counts_V = tensors[f"vocabulary.{name}.counts"].numpy().copy()
            drafter.vocabulary.ids = tensors[f"vocabulary.{name}.ids"].numpy().astype(np.int64)
    adaptation.distill_steps_left = state["distill_steps_left"]
    adaptation.num_updates = state["num_updates"]
    if adaptation.retrainer is not None and state["retrainer"] is not None:
        _take_optimizer(adaptation.retrainer.optimizer, tensors)
        adaptation.retrainer.load_state_dict(state["retrainer"])
    if state["controller"] is not None:
        engine.controller.load_state_dict(state["controller"])
    for name, (accepted, expected) in state["trust"].items():
        if name in engine.speculator.trust:
            engine.speculator.trust[name].accepted, engine.speculator.trust[name].expected = accepted, expected
    if not adaptation.distill_steps_left:
        for drafter in adaptation.drafters.of_new_head:
            engine.speculator.reinstate(drafter.name)
    for name in loaded:
        engine.speculator.weights_updated(name)


def _take_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})


def _heads(adaptation: Adaptation) -> dict[str, RecurrentDrafter]:
    """Drafters whose heads this run makes or trains; a static one that was loaded is where it was."""
    adaptive = [] if adaptation.drafters.adaptive is None else [adaptation.drafters.adaptive]
    return {drafter.name: drafter for drafter in {*adaptive, *adaptation.drafters.of_new_head}}
