"""One of several ranks whose drafter learns, each from rollouts of its own."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from helpers import make_engine, make_requests
from thread_ranks import ThreadRanks

from atlas_rl import AtlasConfig
from atlas_rl.adapt.adaptation import Adaptation
from atlas_rl.adapt.retrainer import Retrainer
from atlas_rl.config import AdaptConfig
from atlas_rl.drafters import Drafters
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.ranks import Ranks
from atlas_rl.types import SamplingParams

SAMPLING = SamplingParams(temperature=0.5)
ADAPT = AdaptConfig(learning_rate=3e-3, deterministic_steps=4, tolerance=0.9, max_grad_norm=1e9)


class Group:
    """Ranks that are threads, and are asked for more than one thing."""

    def __init__(self, size: int) -> None:
        slots, barrier = [None] * size, threading.Barrier(size)
        self.ranks = [ThreadRanks(rank, slots, barrier) for rank in range(size)]

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What each rank returns or raises."""
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            futures = [pool.submit(work, rank) for rank in range(len(self.ranks))]
        return [future.exception() or future.result() for future in futures]


class LearningRank:
    """
    Args:
        is_new: whether its head has yet to be made, and a static drafter of it.
    """

    def __init__(self, policy, ranks: Ranks, *, is_new: bool = False, deterministic: bool = True) -> None:
        torch.manual_seed(0)
        self.drafter = RecurrentDrafter(RecurrentHead.for_policy(PolicyView(policy)))
        self.static = RecurrentDrafter(copy.deepcopy(self.drafter.head), name="static")
        drafters = (self.drafter, self.static) if is_new else (self.drafter,)
        of_run = Drafters(all=drafters, adaptive=self.drafter, of_new_head=drafters if is_new else ())
        config = AtlasConfig(lookahead=3, deterministic=deterministic, adapt=ADAPT)
        self.adaptation = Adaptation(config, of_run, ranks=ranks)
        self.retrainer: Retrainer = self.adaptation.retrainer
        self.ranks = ranks
        self.engine = make_engine(policy, config, drafters)
        self.adaptation.attach(self.engine)

    def rollout(self, seed: int, num_tokens: int = 24, *, meets: bool = False) -> None:
        """Where ranks meet, the policy counts as updated."""
        self.adaptation.may_update = self.engine.weights_changed = meets
        self.engine.generate(make_requests(4, 4, num_tokens, seed=100 * self.ranks.rank + seed), SAMPLING)
        self.adaptation.may_update = True

    def refresh(self) -> None:
        self.adaptation.refreshed(self.engine, True)
        self.engine.speculator.policy_updated()


def weights(rank: LearningRank) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in rank.drafter.head.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
