"""One of several ranks whose drafter learns, each from rollouts of its own."""

from __future__ import annotations

import torch
from helpers import make_engine, make_requests

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


class LearningRank:
    def __init__(self, policy, ranks: Ranks) -> None:
        torch.manual_seed(0)
        self.drafter = RecurrentDrafter(RecurrentHead.for_policy(PolicyView(policy)))
        config = AtlasConfig(lookahead=3, deterministic=True, adapt=ADAPT)
        self.adaptation = Adaptation(config, Drafters(all=(self.drafter,), adaptive=self.drafter), ranks=ranks)
        self.retrainer: Retrainer = self.adaptation.retrainer
        self.ranks = ranks
        self.engine = make_engine(policy, config, self.drafter)
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
