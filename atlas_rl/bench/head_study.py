"""Which head to train for a policy: recurrent or EAGLE-style, and which of the policy's layers it is to read, at equal time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from atlas_rl.adapt.distill import DistillConfig, distill, fresh_head
from atlas_rl.bench.probe import Probe, speeds
from atlas_rl.drafters.base import Drafter
from atlas_rl.drafters.eagle import EagleDrafter, EagleHead
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import SamplingParams


def candidates(num_layers: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Kind and options of each head, by its name."""
    quarters = [num_layers * i // 4 for i in (1, 2, 3)]
    return {
        "recurrent": ("recurrent", {}),  # two layers from the first half
        "recurrent, no layer": ("recurrent", {"layers": ()}),
        "recurrent, middle layer": ("recurrent", {"layers": (num_layers // 2,)}),
        "recurrent, three layers": ("recurrent", {"layers": tuple(sorted(set(quarters)))}),
        "eagle": ("eagle", {}),
    }


def compare_heads(
    policy: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    probe: Probe,
    sampling: SamplingParams,
    budget: dict[str, Any],
    *,
    sizes: Sequence[int] = (1, 8, 64),
    repeats: int = 3,
) -> dict[str, Any]:
    """Each head from scratch, for the same time or steps (`budget`, of `distill`); then acceptance and tokens per step on the
    probe's prompts, and tokens per second beside plain decoding."""
    view = PolicyView(policy)
    probe.look()
    drafters: dict[str, Drafter | None] = {"plain": None}
    heads: dict[str, Any] = {}
    for name, (kind, options) in candidates(view.num_layers).items():
        head = fresh_head(kind, view, 0, **options)
        made = distill(view, prompts, head, DistillConfig.for_kind(kind, sampling=sampling, **budget))
        drafters[name] = EagleDrafter(head) if isinstance(head, EagleHead) else RecurrentDrafter(head)
        heads[name] = {
            "layers": list(head.layers),
            "parameters": sum(p.numel() for p in head.parameters()),
            "seconds": made.seconds,
            "optimizer_steps": made.steps,
            "held_out": made.acceptance.to_dict(),
            "probe": probe.measure(drafters[name]),
        }
    timed = speeds(policy, drafters, prompts, sampling, sizes=sizes, repeats=repeats)
    return {
        "plain": {"tokens_per_s": timed["plain"]},
        "heads": heads | {n: h | {"tokens_per_s": timed[n]} for n, h in heads.items()},
    }
