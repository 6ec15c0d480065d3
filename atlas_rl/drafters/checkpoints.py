"""Draft heads in files: a folder with config.json and model.safetensors, nothing that runs code when it is read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from atlas_rl.drafters.eagle_checkpoint import CONFIG, WEIGHTS, Layout, is_eagle, read_eagle, write_eagle
from atlas_rl.drafters.eagle_head import EagleHead
from atlas_rl.drafters.heads import DraftHead


def save_head(
    head: DraftHead,
    folder: str | Path,
    *,
    output_head: torch.Tensor | None = None,
    policy_path: str = "",
    layout: Layout = "specforge",
) -> None:
    """Write a head, beside the folder first: what is in the folder is whole at any time.

    Args:
        output_head: the policy's output weights [V, D], for a head that has none of its own: without them, other engines cannot
            serve the checkpoint. policy_path: what a speculators checkpoint names as its verifier.
    """
    if isinstance(head, EagleHead):
        config, tensors = write_eagle(head, output_head, policy_path, layout)
    else:
        config, tensors = {"atlas_kind": head.kind, **head.config_dict()}, dict(head.state_dict())
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
        scratch.chmod(0o755)  # mkdtemp's is private
        replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_head(folder: str | Path) -> DraftHead:
    """The head in a folder: one of ours, or an EAGLE-3 checkpoint of SpecForge or speculators. In float32, on the CPU.

    Raises:
        ValueError: what is there cannot be read, or is nothing that we can run.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    with torch.random.fork_rng(devices=[]):  # modules draw weights before they are given any
        if "atlas_kind" in config:
            head = _own_head(folder, dict(config))
        elif is_eagle(config):
            head, tensors = read_eagle(folder, config, tensors)
        else:
            raise ValueError(
                f"{folder / CONFIG}: architectures {config.get('architectures')} is no draft head that can be read; known "
                "are Atlas-RL's own and EAGLE-3 (SpecForge, speculators)"
            )
    _load_strictly(head, tensors, folder / WEIGHTS)
    return head


def is_head(folder: str | Path) -> bool:
    """Whether a folder holds a draft head, and not a language model, as far as its config tells."""
    config = _read_config(Path(folder))
    return "atlas_kind" in config or is_eagle(config)


def _own_head(folder: Path, config: dict[str, Any]) -> DraftHead:
    kind = config.pop("atlas_kind")
    kinds = head_kinds()
    if kind not in kinds:
        raise ValueError(f"{folder / CONFIG}: atlas_kind {kind!r} is unknown; known are {', '.join(sorted(kinds))}")
    try:
        return kinds[kind](**config)
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG}: it does not describe a {kind} head ({error}): save it again") from None


def head_kinds() -> dict[str, type[DraftHead]]:
    from atlas_rl.drafters.recurrent_head import RecurrentHead

    return {EagleHead.kind: EagleHead, RecurrentHead.kind: RecurrentHead}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name a folder that holds a draft head") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): the checkpoint is damaged, fetch or save it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no object: the checkpoint is damaged, fetch or save it again")
    return config


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    if not path.exists():
        raise ValueError(f"{path} is missing (weights in other files, pickles among them, are not read): convert them")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): the checkpoint is damaged, fetch or save it again"
        ) from None


def _load_strictly(head: DraftHead, tensors: dict[str, torch.Tensor], where: Path) -> None:
    expected = {name: tensor.shape for name, tensor in head.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            said, is_there = (list(shapes[name]) if name in shapes else "none" for shapes in (expected, found))
            raise ValueError(
                f"{where}: tensor {name} has shape {is_there}, but {CONFIG} says {said}: the files do not belong together, "
                "or the head is of a variant that cannot be run"
            )
        if not tensors[name].isfinite().all():
            raise ValueError(f"{where}: tensor {name} holds NaN or infinity: the head diverged, use an earlier one")
    head.load_state_dict(tensors)


def replace_folder(source: Path, target: Path) -> None:
    """Rename, an older folder of that name out of the way first (a folder that is not empty cannot be renamed over)."""
    if not target.exists():
        os.rename(source, target)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    os.rename(target, retired / "head")
    os.rename(source, target)
    shutil.rmtree(retired, ignore_errors=True)
