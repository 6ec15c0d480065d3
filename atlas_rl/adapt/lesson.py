"""What an update of a draft head learns from, and what it is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atlas_rl.adapt.losses import PolicyEnds
from atlas_rl.adapt.replay import Replay
from atlas_rl.drafters.heads import Windows

STARTS_PER_WINDOW = 8
WINDOWS_PER_STEP = 24
HELD_OUT_EVERY = 8
"""One prompt in so many is held out."""
HELD_OUT_WINDOWS = 12
HELD_OUT_STARTS = 16
JUDGED_LOOKAHEAD = 4
NEWEST_SHARE = 0.5
"""Of the windows of a step, the rest is drawn from all rollouts that are kept."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What an update has to learn from on this rank, and to be judged by."""

    newest: Replay
    judged: Windows
    ends: PolicyEnds


def split(replay: Replay, generator: torch.Generator) -> tuple[Replay, Replay]:
    """Completions to learn from, and those held out from this update: all of some prompts, as the next rollouts will be of other
    prompts too; or some of the only prompt's."""
    groups = replay.groups_R.unique()
    if len(groups) > 1:
        chosen = torch.randperm(len(groups), generator=generator)[: max(1, len(groups) // HELD_OUT_EVERY)]
        is_held_out = torch.isin(replay.groups_R, groups[chosen])
    else:
        is_held_out = torch.zeros(len(replay), dtype=torch.bool)
        order = torch.randperm(len(replay), generator=generator)
        is_held_out[order[: len(replay) // HELD_OUT_EVERY]] = True
    if not is_held_out.any():
        return replay, replay
    return replay.rows((~is_held_out).nonzero()[:, 0]), replay.rows(is_held_out.nonzero()[:, 0])


def judged_windows(held_out: Replay, generator: torch.Generator) -> Windows:
    """Some windows of any of the completions: neighbours are right or wrong together."""
    windows = held_out.tiles(HELD_OUT_STARTS + JUDGED_LOOKAHEAD, JUDGED_LOOKAHEAD)
    return windows.rows(torch.randperm(len(windows), generator=generator)[:HELD_OUT_WINDOWS])


def draw_windows(newest: Replay, kept: Sequence[Replay], depth: int, generator: torch.Generator) -> list[Windows]:
    """Of one optimizer step: some of the newest rollouts, and of an older one, if there is any."""
    width = STARTS_PER_WINDOW + depth
    windows = newest.sample(WINDOWS_PER_STEP, width, depth, generator)
    if not kept:
        return [windows]
    older = kept[int(torch.randint(len(kept), (), generator=generator))]
    count = int(WINDOWS_PER_STEP * (1 - NEWEST_SHARE))
    return [windows.rows(slice(WINDOWS_PER_STEP - count)), older.sample(count, width, depth, generator)]
