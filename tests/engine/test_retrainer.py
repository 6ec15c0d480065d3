"""Retraining between rollouts: it makes drafts better, undoes what does not, and touches nothing but the head."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import make_engine, make_requests, tiny_llama

from atlas_rl import AtlasConfig, AtlasRolloutGenerator
from atlas_rl.adapt import retrainer as module
from atlas_rl.adapt.adaptation import Adaptation
from atlas_rl.adapt.retrainer import Retrainer
from atlas_rl.config import AdaptConfig
from atlas_rl.drafters import Drafters
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import SamplingParams

SAMPLING = SamplingParams(temperature=0.5)
UPDATE = {"interval_seconds": 10.0, "drafted_seconds": 5.0, "remaining": 50.0}


def learnable_policy():
    """Close to a Markov chain: what comes next is mostly the last token's to say, which a head can learn in seconds."""
    policy = tiny_llama()
    with torch.no_grad():
        for layer in policy.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.05)
            layer.mlp.down_proj.weight.mul_(0.05)
    return policy


def make_retrainer(policy, when: str = "every_update", deterministic: bool = True, **options):
    """An engine whose recurrent drafter learns."""
    torch.manual_seed(0)
    drafter = RecurrentDrafter(RecurrentHead.for_policy(PolicyView(policy)))
    config = AdaptConfig(**{"learning_rate": 3e-3, "deterministic_steps": 10} | options)
    retrainer = Retrainer(drafter, config, when, deterministic=deterministic)
    engine = make_engine(policy, AtlasConfig(lookahead=4), drafter)
    engine.speculator.listener = retrainer.capture
    return retrainer, engine


def rollout(engine: RolloutEngine, seed: int = 0):
    return engine.generate(make_requests(8, 4, max_new_tokens=40, seed=seed), SAMPLING)


def snapshot(retrainer: Retrainer):
    return copy.deepcopy((retrainer.drafter.head.state_dict(), retrainer.optimizer.state_dict()["state"]))


def equal(one, other) -> bool:
    """Nested dictionaries of tensors."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)


def test_it_makes_drafts_better():
    retrainer, engine = make_retrainer(learnable_policy(), deterministic_steps=60, learning_rate=1e-2)
    before, served = [], []
    for i in range(5):
        rollout(engine, seed=i)
        counts = engine.stats.drafters["recurrent"]
        served.append(counts.accepted / counts.proposed)
        stats = retrainer.update(engine.view, **UPDATE)
        assert stats.steps == 60 and stats.updates == 1 and stats.seconds > 0
        before.append(stats.acceptance_before)
        engine.speculator.weights_updated("recurrent")
    # each is measured on completions that were not learned from before
    assert before[-1] > before[0] + 0.15
    assert served[-1] > 2 * served[0]


@pytest.mark.parametrize(
    "fault", [{"learning_rate": 100.0}, {"learning_rate": 1e30}, {"learning_rate": float("inf")}, {"nan": True}]
)
def test_an_update_that_makes_it_worse_is_undone(fault, caplog, monkeypatch):
    retrainer, engine = make_retrainer(learnable_policy(), deterministic_steps=20)
    for i in range(3):
        rollout(engine, seed=i)
        retrainer.update(engine.view, **UPDATE)
    head, moments = snapshot(retrainer)
    assert equal(head, retrainer.good_head) and moments
    rollout(engine, seed=9)
    if "nan" in fault:
        loss = module.unrolled_loss

        def nan_loss(*args, **kwargs):
            value, alpha = loss(*args, **kwargs)
            return value * torch.nan, alpha

        monkeypatch.setattr(module, "unrolled_loss", nan_loss)
    else:
        retrainer.optimizer.param_groups[0]["lr"] = fault["learning_rate"]
    stats = retrainer.update(engine.view, **UPDATE)
    assert stats.kept == 0 and stats.steps == 20 and stats.acceptance_after == stats.acceptance_before
    diverged = sum("diverged" in record.message for record in caplog.records)
    assert diverged == (fault.get("learning_rate") != 100.0)
    assert equal(retrainer.drafter.head.state_dict(), head)
    assert diverged or equal(retrainer.optimizer.state_dict()["state"], moments), "the optimizer's moments too"
    monkeypatch.undo()
    rollout(engine, seed=10)
    again = retrainer.update(engine.view, **UPDATE)
    assert again.acceptance_after > 1 and retrainer.is_sound, "it goes on"


def test_weights_damaged_from_outside_are_replaced_by_the_last_good_ones():
    retrainer, engine = make_retrainer(tiny_llama())
    rollout(engine)
    retrainer.update(engine.view, **UPDATE)
    good = copy.deepcopy(retrainer.good_head)
    with torch.no_grad():
        retrainer.drafter.head.down.weight.fill_(torch.nan)
    assert retrainer.update(engine.view, **UPDATE) is not None, "on what older rollouts left"
    assert retrainer.is_sound
    retrainer.kept.clear()
    retrainer.good_head = good
    with torch.no_grad():
        retrainer.drafter.head.down.weight.fill_(torch.inf)
    assert retrainer.update(engine.view, **UPDATE) is None, "nothing to learn from"
    assert equal(retrainer.drafter.head.state_dict(), good)


def test_a_failure_within_an_update_leaves_the_head_as_it_was(monkeypatch):
    retrainer, engine = make_retrainer(tiny_llama())
    rollout(engine)
    head, _ = snapshot(retrainer)
    measure, calls = module.measure, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return measure(*args, **kwargs)

    monkeypatch.setattr(module, "measure", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        retrainer.update(engine.view, **UPDATE)
    assert equal(retrainer.drafter.head.state_dict(), head)
    assert not any(p.requires_grad for p in retrainer.drafter.head.parameters())


@pytest.mark.parametrize("mode", ["plain", "inference", "no_grad", "autocast"])
def test_nothing_but_the_head_is_touched(mode):
    policy = tiny_llama()
    gradients = [torch.randn_like(p) for p in policy.parameters()]
    for p, gradient in zip(policy.parameters(), gradients, strict=True):
        p.grad = gradient.clone()
    policy.lm_head.weight.requires_grad_(False)
    weights = [p.detach().clone() for p in policy.parameters()]
    requires_grad = [p.requires_grad for p in policy.parameters()]
    retrainer, engine = make_retrainer(policy)
    contexts = {
        "plain": torch.enable_grad(),
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    rollout(engine)
    rng, grad_mode = torch.get_rng_state(), None
    with contexts[mode]:
        grad_mode = torch.is_grad_enabled()
        stats = retrainer.update(engine.view, **UPDATE)
        assert torch.is_grad_enabled() == grad_mode and torch.is_inference_mode_enabled() == (mode == "inference")
    assert stats.steps == 10 and torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(policy.parameters(), gradients, strict=True))
    assert all(torch.equal(p, weight) for p, weight in zip(policy.parameters(), weights, strict=True))
    assert [p.requires_grad for p in policy.parameters()] == requires_grad
    assert not any(p.requires_grad for p in retrainer.drafter.head.parameters())


def test_updates_are_the_same_under_autocast():
    heads = []
    for context in (torch.enable_grad(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        retrainer, engine = make_retrainer(tiny_llama())
        rollout(engine)
        with context:
            retrainer.update(engine.view, **UPDATE)
        heads.append(snapshot(retrainer)[0])
    assert equal(heads[0], heads[1]) and equal(heads[0], heads[2])


def test_on_drift_trains_only_where_acceptance_fell():
    retrainer, engine = make_retrainer(tiny_llama(), "on_drift", deterministic_steps=40)
    rollout(engine)
    assert retrainer.update(engine.view, **UPDATE).steps == 0, "the first one is the reference"
    rollout(engine)
    assert retrainer.update(engine.view, **UPDATE).steps == 0
    retrainer.drift_reference *= 1.1
    rollout(engine)
    stats = retrainer.update(engine.view, **UPDATE)
    assert stats.steps == 40
    assert not stats.kept or retrainer.drift_reference == retrainer.judged_tokens


def test_completions_of_one_token_teach_nothing_and_break_nothing():
    """Half of the rows end at once."""
    retrainer, engine = make_retrainer(tiny_llama())
    requests = [
        type(r)(prompt_ids=r.prompt_ids, seed=r.seed, max_new_tokens=1 if i % 2 else 20)
        for i, r in enumerate(make_requests(8, 4))
    ]
    engine.generate(requests, SAMPLING)
    assert retrainer.update(engine.view, **UPDATE).steps == 10
    engine.generate([type(r)(prompt_ids=r.prompt_ids, seed=r.seed, max_new_tokens=1) for r in requests], SAMPLING)
    assert retrainer.update(engine.view, **UPDATE) is None


def test_memory_of_older_rollouts_is_bounded():
    retrainer, engine = make_retrainer(tiny_llama(), rollouts_kept=2, max_tokens=100, deterministic_steps=1)
    for i in range(5):
        rollout(engine, seed=i)
        retrainer.update(engine.view, **UPDATE)
    assert len(retrainer.kept) == 2 and all(replay.num_tokens <= 150 for replay in retrainer.kept)


# ---- between rollouts -----------------------------------------------------------------------------------------------------


def attached(policy, **options):
    config = AtlasConfig(**{"deterministic": True, "drafters": ("recurrent", "static")} | options)
    return AtlasRolloutGenerator(config).attach(policy)


def generate(atlas: AtlasRolloutGenerator, seed: int, num: int = 8) -> list[list[int]]:
    prompts = [list(range(3, 5 + i)) for i in range(4)]
    return [r.token_ids for r in atlas.generate(prompts, SamplingParams(max_new_tokens=32), num, seed=seed)]


@pytest.mark.parametrize("retrain", ["every_update", "on_drift"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_head_is_made_of_the_traffic_and_a_copy_of_it_frozen(monkeypatch, retrain, inference):
    monkeypatch.setattr("atlas_rl.adapt.adaptation.DISTILL_STEPS", 60)
    policy = tiny_llama()
    plain = attached(policy, speculate=False)
    expected = [generate(plain, seed) for seed in range(6)]
    plain.detach()
    adapt = AdaptConfig(tokens_per_update=900, deterministic_steps=20, learning_rate=3e-3)
    rng = torch.get_rng_state()
    with attached(policy, adapt=adapt, retrain=retrain) as atlas, torch.inference_mode(inference):
        benched, updates = [], []
        for seed in range(6):
            assert generate(atlas, seed) == expected[seed]
            benched.append(set(atlas.attachment.engine.controller.benched))
            updates.append(None if atlas.stats.retrain is None else atlas.stats.retrain.steps)
        adaptation = atlas.attachment.adaptation
        assert updates[:4] == [None, 20, 20, 20]
        assert updates[4] in ([20] if retrain == "every_update" else [0, 20]), "other prompts, other figures"
        assert benched[:3] == [{"recurrent", "static"}] * 3 and benched[3:] == [set()] * 3
        static, adaptive = adaptation.drafters.all
        assert static.name == "static" and adaptive is adaptation.drafters.adaptive
        moved = not torch.equal(static.head.fc.weight, adaptive.head.fc.weight)
        kept = adaptation.retrainer.totals.kept
        assert kept >= 2 and (retrain == "on_drift" or moved or updates[4:] == [None] * 2)
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_head_is_made_only_where_it_would_pay(monkeypatch):
    """Rollouts of milliseconds, few of them to come: no."""
    policy = tiny_llama()
    with attached(policy, deterministic=False, adapt=AdaptConfig(tokens_per_update=900)) as atlas:
        generate(atlas, 0)
        adaptation = atlas.attachment.adaptation
        adaptation.remaining = lambda: 1.0
        for seed in range(1, 4):
            generate(atlas, seed)
        assert adaptation.retrainer.totals.steps == 1, "one step, to know what it costs"
        assert not adaptation.is_distilling and adaptation.distill_steps_left
        adaptation.remaining = lambda: 1e9
        generate(atlas, 5)
        generate(atlas, 6)
        assert adaptation.is_distilling and adaptation.retrainer.totals.steps > 1


def test_never_captures_nothing():
    policy = tiny_llama()
    config = AtlasConfig(retrain="never")
    with AtlasRolloutGenerator(config).attach(policy) as atlas:
        generate(atlas, 0)
        assert atlas.attachment.engine.speculator.listener is None
        assert atlas.attachment.adaptation.retrainer is None


def adapting_engine(policy, drafter: RecurrentDrafter, tokens_per_update: int = 500):
    adapt = AdaptConfig(tokens_per_update=tokens_per_update, deterministic_steps=5, learning_rate=3e-3, tolerance=0.9)
    config = AtlasConfig(lookahead=3, deterministic=True, adapt=adapt)
    adaptation = Adaptation(config, Drafters(all=(drafter,), adaptive=drafter))
    engine = make_engine(policy, config, drafter)
    adaptation.attach(engine)
    return adaptation, engine


class Failing(RecurrentDrafter):
    """Raises at its n-th proposal."""

    fails_at: int | None = None
    num_asked = 0

    def propose(self, rows, max_lens, min_prob=0.0):
        self.num_asked += 1
        if self.num_asked == self.fails_at:
            raise RuntimeError("no luck")
        return super().propose(rows, max_lens, min_prob)


@pytest.mark.parametrize("fault", ["raises", "weights", "both copies"])
def test_a_benched_drafter_comes_back_with_its_next_good_update(fault, caplog):
    policy = tiny_llama()
    plain = make_engine(policy, AtlasConfig(speculate=False))
    torch.manual_seed(0)
    drafter = Failing(RecurrentHead.for_policy(PolicyView(policy)))
    adaptation, engine = adapting_engine(policy, drafter)
    assert [r.token_ids for r in rollout(engine)] == [r.token_ids for r in rollout(plain)]
    if fault == "raises":
        drafter.fails_at = drafter.num_asked + 5
    else:  # found when the weights are taken over: as after a policy update
        with torch.no_grad():
            drafter.head.fc.weight.fill_(torch.nan)
        if fault == "both copies":
            engine.speculator.weights_updated("recurrent")
        else:
            adaptation.retrainer.capture.begin()
    assert [r.token_ids for r in rollout(engine, 1)] == [r.token_ids for r in rollout(plain, 1)]
    assert ("recurrent" in engine.controller.benched) == (fault == "raises")
    assert [r.token_ids for r in rollout(engine, 2)] == [r.token_ids for r in rollout(plain, 2)]
    assert not engine.controller.benched and engine.stats.drafters["recurrent"].proposed
    assert adaptation.retrainer.is_sound
    assert sum("benched" in r.message for r in caplog.records) == (fault != "weights")


def test_a_retraining_that_raises_changes_nothing_with_one_warning(monkeypatch, caplog):
    policy = tiny_llama()
    plain = make_engine(policy, AtlasConfig(speculate=False))
    drafter = RecurrentDrafter(RecurrentHead.for_policy(PolicyView(policy)))
    adaptation, engine = adapting_engine(policy, drafter)
    monkeypatch.setattr(module, "measure", lambda *args, **kwargs: 1 / 0)
    for seed in range(4):
        assert [r.token_ids for r in rollout(engine, seed)] == [r.token_ids for r in rollout(plain, seed)]
    assert not engine.controller.benched, "the head is what it was"
    assert sum("ZeroDivisionError" in r.message for r in caplog.records) == 1
    monkeypatch.undo()
    rollout(engine, 5)
    assert not engine.controller.benched and engine.stats.retrain.kept


def test_making_a_head_that_raises_is_given_up_with_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(module, "measure", lambda *args, **kwargs: 1 / 0)
    with attached(tiny_llama(), adapt=AdaptConfig(tokens_per_update=500)) as atlas:
        for seed in range(4):
            generate(atlas, seed)
        assert atlas.attachment.engine.speculator.listener is None
    assert sum("ZeroDivisionError" in r.message for r in caplog.records) == 1


def test_a_policy_update_retrains_too():
    policy = tiny_llama()
    torch.manual_seed(0)
    drafter = RecurrentDrafter(RecurrentHead.for_policy(PolicyView(policy)))
    adaptation, engine = adapting_engine(policy, drafter, tokens_per_update=10**9)
    rollout(engine)
    assert rollout(engine) and engine.stats.retrain is None, "nothing has changed"
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.01)
    rollout(engine)
    assert engine.stats.retrain.steps == 5 and adaptation.num_updates == 1
    assert engine.stats.seconds["retrain"] > 0
