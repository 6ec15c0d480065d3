"""While plain decoding is settled, drafters are told nothing and no layer is tapped; they are back in time to draft."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import make_engine, make_requests, recurrent, tiny_llama, tokens_of

from atlas_rl.config import AtlasConfig, EngineConfig
from atlas_rl.control.contest import Contest
from atlas_rl.drafters.base import Drafter, Drafts
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import SamplingParams

SAMPLING = SamplingParams()


class Probe(Drafter):
    """Notes what it is told, by forward."""

    name, layers, can_rest = "probe", (0,), True

    def __init__(self) -> None:
        self.events: list[str] = []

    def rest(self):
        self.events.append("rest")

    def verified(self, rows, batch, num_right):
        assert len(batch.tapped[0]) == batch.num_tokens
        self.events.append("verified")

    def propose(self, rows, max_lens, min_prob=0.0):
        self.events.append("propose")
        return Drafts(np.full((len(rows), 1), 5, np.int64), np.where(max_lens[:, None] > 0, 0.9, 0.0))


def engine_with(*drafters: Drafter, best: dict[int, tuple[str, ...]], next_trial: int = 10, **options) -> RolloutEngine:
    """Where contests at so many rows begin with these arms, and every drafter promises most."""
    engine = make_engine(tiny_llama(), AtlasConfig(engine=EngineConfig(**options)), list(drafters))
    engine.controller.contests = {size: Contest(best=arm, next_trial=next_trial) for size, arm in best.items()}
    engine.controller.predicted_rate = lambda arm, *_: 2.0 if arm else 1.0
    return engine


def test_a_drafter_rests_up_to_the_step_before_a_trial():
    probe = Probe()
    engine = engine_with(probe, best={0: ()})
    forward = engine.view.hidden_states
    engine.view.hidden_states = lambda batch: (
        probe.events.append("tapped" if batch.is_tapped else "bare") or forward(batch)
    )
    (rollout,) = engine.generate(make_requests(1, 1, 14), SAMPLING)
    begun = probe.events.index("rest")
    assert probe.events[begun : begun + 14] == ["rest", *["bare"] * 9, "tapped", "verified", "propose", "tapped"]
    assert tokens_of([rollout]) == tokens_of(make_engine(tiny_llama()).generate(make_requests(1, 1, 14), SAMPLING))


def test_all_drafters_that_look_at_states_rest_or_none():
    awake, probe = Probe(), Probe()
    awake.name, awake.can_rest = "awake", False
    engine = engine_with(awake, probe, best={0: ()})
    engine.generate(make_requests(1, 1, 8), SAMPLING)
    assert probe.events == awake.events == ["verified"] * 8


@pytest.mark.parametrize(
    "best, next_trial, options",
    [
        ({0: (), 1: (), 2: ()}, 10, {}),
        ({0: ("recurrent",), 1: (), 2: ()}, 100, {}),
        ({0: (), 1: ("recurrent",), 2: ()}, 100, {}),
        ({0: (), 1: (), 2: ()}, 10, {"max_num_seqs": 3}),
    ],
    ids=["a trial", "few rows are drafted for", "a size between is", "rows come while it rests"],
)
def test_who_drafts_after_a_rest_has_every_rows_features(best, next_trial, options):
    view = PolicyView(tiny_llama())
    drafter, missing = recurrent(view), []
    propose = drafter.propose

    def noted(rows, *args):
        missing.append(int((drafter._places_of(rows) < 0).sum()))
        return propose(rows, *args)

    drafter.propose = noted
    requests = [
        request.__class__(prompt_ids=request.prompt_ids, seed=request.seed, max_new_tokens=8 + 8 * i)
        for i, request in enumerate(make_requests(2, 2))
    ]
    engine = engine_with(drafter, best=best, next_trial=next_trial, **options)
    rollouts = engine.generate(requests, SAMPLING)
    assert len(missing) >= 2 and not any(missing)
    assert tokens_of(rollouts) == tokens_of(make_engine(tiny_llama()).generate(requests, SAMPLING))
