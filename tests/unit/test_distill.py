"""Learning ahead of a run: heads get better on held-out prompts, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import make_requests, tiny_llama, tiny_qwen3

from atlas_rl.adapt import distill as distill_module
from atlas_rl.adapt.distill import DistillConfig, distill, fresh_head
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import SamplingParams

PROMPTS = [request.prompt_ids for request in make_requests(40, 1)]
SAMPLING = SamplingParams(max_new_tokens=24)


def config(**options) -> DistillConfig:
    defaults = {"steps": 60, "sampling": SAMPLING, "starts_per_step": 128, "warmup_steps": 5, "prompts_per_round": 16}
    return DistillConfig(**defaults | options)


@pytest.mark.parametrize("kind", ["recurrent", "eagle"])
def test_a_head_learns_to_go_on_as_the_policy_does(kind):
    model = tiny_qwen3(initializer_range=0.4)
    before = copy.deepcopy(model.state_dict())
    view = PolicyView(model)
    random_state = torch.random.get_rng_state()
    with torch.inference_mode():  # as some callers are
        head = fresh_head(kind, view, seed=0)
        result = distill(view, PROMPTS, head, config(starts_per_window=8))
    gains = [a - b for a, b in zip(result.acceptance.overlap, result.acceptance_before.overlap, strict=False)]
    assert min(gains) > 0.03
    assert result.steps == 60 and result.rollout_tokens > 0 and not result.interrupted
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_same_seed_same_head():
    view, heads = PolicyView(tiny_llama()), []
    for seed in (1, 1, 2):
        heads.append(fresh_head("recurrent", view, seed))
        distill(view, PROMPTS, heads[-1], config(steps=5, seed=seed))
    first, again, other = (torch.cat([p.flatten() for p in head.parameters()]) for head in heads)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_interrupt_keeps_the_best_head(monkeypatch):
    view, head = PolicyView(tiny_llama()), None
    head = fresh_head("recurrent", view, 0)
    step, states = distill_module._Distillation._step, []

    def step_or_interrupt(self, material, progress):
        if self.steps == 30:
            raise KeyboardInterrupt
        states.append(copy.deepcopy(head.state_dict()))
        return step(self, material, progress)

    monkeypatch.setattr(distill_module._Distillation, "_step", step_or_interrupt)
    result = distill(view, PROMPTS, head, config())
    assert result.interrupted and result.steps == 30
    assert result.acceptance.coupled[0] > result.acceptance_before.coupled[0]
    assert not any(torch.equal(head.fc.weight, state["fc.weight"]) for state in states[:2])


def test_divergence_ends_training_with_the_best_head(monkeypatch, caplog):
    view = PolicyView(tiny_llama())
    head = fresh_head("recurrent", view, 0)
    result = distill(view, PROMPTS, head, config(learning_rate=float("nan")))
    assert "not finite" in caplog.text
    assert all(p.isfinite().all() for p in head.parameters()) and result.steps < 60


def test_the_held_out_prompts_are_not_learned_from(monkeypatch):
    asked = []
    answer = distill_module.RolloutSource.answer

    def listening(self, prompts, num_samples):
        asked.append(set(prompts))
        return answer(self, prompts, num_samples)

    monkeypatch.setattr(distill_module.RolloutSource, "answer", listening)
    view = PolicyView(tiny_llama())
    distill(view, PROMPTS * 2, fresh_head("recurrent", view, 0), config(steps=20, reuse=0.2))
    held_out, *rounds = asked
    assert len(held_out) == 4 and len(rounds) > 1
    assert not held_out & set.union(*rounds) and held_out | set.union(*rounds) == set(PROMPTS)


def test_bad_input():
    view = PolicyView(tiny_llama())
    with pytest.raises(ValueError, match="at least two"):
        distill(view, PROMPTS[:1] * 5, fresh_head("recurrent", view, 0), config())
    with pytest.raises(ValueError, match="minutes or steps"):
        DistillConfig(minutes=1.0, steps=1)
    with pytest.raises(ValueError, match="positive"):
        DistillConfig(minutes=0.0)
