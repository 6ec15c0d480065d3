"""Drafters guess the policy's next tokens. The engine verifies the guesses: a drafter can cost time, never change a token."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from atlas_rl.config import AtlasConfig
from atlas_rl.drafters.base import Drafter
from atlas_rl.drafters.suffix import SuffixDrafter

if TYPE_CHECKING:
    from atlas_rl.drafters.recurrent import RecurrentDrafter
    from atlas_rl.engine.policy_view import PolicyView

logger = logging.getLogger(__name__)

TEXTUAL = ("suffix",)
"""Drafters that look at tokens alone, and go together with a neural one."""
ADAPTIVE = "recurrent"
"""The one that is retrained."""
BESIDE_POLICY = "drafter"
"""Folder within a policy's own that holds its static drafter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafters:
    """Of one served model."""

    all: tuple[Drafter, ...] = ()
    adaptive: RecurrentDrafter | None = None
    """The one that is retrained."""
    of_new_head: tuple[RecurrentDrafter, ...] = ()
    """Drafters whose head has random weights: to be used once it has been trained. Empty where the head was loaded."""

    starts_as_static: bool = False
    """Whether the adaptive drafter has the static one's weights."""

    @property
    def is_new(self) -> bool:
        return bool(self.of_new_head)


def arms_of(drafters: Sequence[Drafter]) -> list[tuple[str, ...]]:
    """Each drafter by itself, and each neural one together with the textual ones."""
    names = [drafter.name for drafter in drafters]
    textual = [name for name in names if name in TEXTUAL]
    together = [(name, *textual) for name in names if name not in TEXTUAL] if textual else []
    return [(name,) for name in names] + together


def build_drafters(config: AtlasConfig, view: PolicyView) -> Drafters:
    """The drafters that a config asks for, for a policy; none for plain decoding.

    The adaptive drafter starts as the static one is, where that is a recurrent head. Where there is no static drafter, both start
    from a new head, that has to be trained before it is used.

    Raises:
        ValueError: the config names a drafter that cannot run on this machine or with this policy.
    """
    names = config.drafter_names
    drafters: list[Drafter] = []
    if "suffix" in names:
        reason = SuffixDrafter.unavailable_reason()
        if reason is None:
            drafters.append(SuffixDrafter())
        elif config.drafters == "auto":
            logger.warning("drafting without counts: the suffix drafter needs a C++ compiler (set CXX): %s", reason)
        else:
            raise ValueError(f"drafters names suffix, which needs a C++ compiler (set CXX): {reason}")
    if not {"recurrent", "static"} & set(names):
        return Drafters(all=tuple(drafters))

    from atlas_rl.drafters.recurrent import RecurrentDrafter, RecurrentHead
    from atlas_rl.drafters.vocab import DraftVocabulary

    path = static_path(config, view)
    static = load_drafter(path) if path is not None else None
    adapts = "recurrent" in names and (config.retrain != "never" or config.drafters != "auto")
    if config.retrain == "never" and static is None:
        if config.drafters != "auto":
            named = " and ".join(name for name in ("recurrent", "static") if name in names)
            raise ValueError(
                f"drafters names {named}, but static_drafter is not given, and with retrain: never none is made: name its folder"
            )
        return Drafters(all=tuple(drafters))
    new: tuple[RecurrentDrafter, ...] = ()
    adaptive = None
    if isinstance(static, RecurrentDrafter):
        if adapts:
            static.vocabulary = DraftVocabulary(view.vocab_size)
            shared = static.vocabulary if "static" in names else None
            adaptive = RecurrentDrafter(copy.deepcopy(static.head), vocabulary=shared)
    elif adapts:
        head = RecurrentHead.for_policy(view, intermediate_size=config.adapt.intermediate_size)
        adaptive = RecurrentDrafter(head)
        new = (adaptive,)
        if static is None and "static" in names:
            static = RecurrentDrafter(copy.deepcopy(head))
            new = (adaptive, static)
    if static is not None and "static" in names:
        static.name = "static"
        drafters.append(static)
    if adaptive is not None:
        drafters.append(adaptive)
    starts_as_static = isinstance(static, RecurrentDrafter) and "static" in names and adaptive is not None and not new
    return Drafters(all=tuple(drafters), adaptive=adaptive, of_new_head=new, starts_as_static=starts_as_static)


def static_path(config: AtlasConfig, view: PolicyView) -> str | None:
    """Where the static drafter is: where the config says, or beside the policy."""
    if config.static_drafter is not None:
        return config.static_drafter
    if not view.model.name_or_path:
        return None
    beside = Path(view.model.name_or_path) / BESIDE_POLICY
    return str(beside) if (beside / "config.json").exists() else None


def load_drafter(path: str) -> Drafter:
    """The drafter of a checkpoint, whatever its kind.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    from atlas_rl.drafters.checkpoints import is_head, load_head
    from atlas_rl.drafters.draft_model import DraftModelDrafter
    from atlas_rl.drafters.eagle import EagleDrafter, EagleHead
    from atlas_rl.drafters.recurrent import RecurrentDrafter

    folder = local_folder(path)
    if not is_head(folder):
        return DraftModelDrafter.load(str(folder))
    head = load_head(folder)
    return EagleDrafter(head) if isinstance(head, EagleHead) else RecurrentDrafter(head)


def local_folder(path: str) -> Path:
    """A folder as it is, or a model id fetched from the hub."""
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or path.startswith((".", "/", "~")):
        raise ValueError(f"static_drafter {path} is no folder: name one that holds config.json and model.safetensors")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path))
    except Exception as error:  # the hub's errors are of many kinds; what they say is for the user
        raise ValueError(f"static_drafter {path} is no folder, and cannot be fetched from the hub: {error}") from None
