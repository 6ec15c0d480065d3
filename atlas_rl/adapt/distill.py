"""Training a draft head ahead of a run, on the policy's own rollouts.

The policy answers prompts, a teacher-forced forward gives the features of its answers, and the head learns to go on from them as
the policy does. Rollouts are cheap here and heads learn by heart: once each place has been learned from `reuse` times on average,
the policy answers more prompts.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from atlas_rl.adapt.acceptance import MAX_DEPTH, Acceptance, measure
from atlas_rl.adapt.losses import PolicyEnds, low_precision, unrolled_loss
from atlas_rl.adapt.optimizer import HeadOptimizer
from atlas_rl.adapt.replay import Replay, replay
from atlas_rl.config import AtlasConfig
from atlas_rl.drafters.eagle_head import EagleHead
from atlas_rl.drafters.heads import DraftHead
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import RolloutRequest, SamplingParams

logger = logging.getLogger(__name__)

MAX_HELD_OUT_PROMPTS = 64
FIRST_ROUND = 32
"""Prompts; rounds double from there."""
EVALUATIONS = 20
"""Over the whole budget."""
STEPS_OVER_EVALUATIONS = 15
"""Time between evaluations, in times that one takes, at least."""
EVALUATION_WINDOWS = 96
"""For the evaluations on the way; the last one takes all."""
JUDGED_LOOKAHEAD = 6
"""The best head is the one with the most tokens per step at this lookahead."""
EVALUATION_STARTS = 16
"""Of a held-out window."""
DEEPER_FROM = 0.6
LR_POWER = 0.7
"""The learning rate falls as (1 - progress)^this."""
BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    minutes: float | None = None
    """Budget in time, rollouts and evaluations included; or else `steps`."""
    steps: int | None = None
    sampling: SamplingParams = SamplingParams(max_new_tokens=512)
    completions_per_prompt: int = 2
    seed: int = 0
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    starts_per_step: int = 512
    starts_per_window: int = 1
    """Neighbours share what is computed per token; a head with attention needs windows as wide as what it is to see."""
    depths: tuple[int, int] = (4, 6)
    """Of the drafts that it learns from: up to DEEPER_FROM of the budget, and then. Deeper ones teach less per second."""
    prompts_per_round: int = 256
    """Answered at once, when more is needed; the first rounds are smaller, so that learning starts soon."""
    reuse: float = 10.0
    """Times that each place is learned from, on average, before there are more rollouts."""
    max_gib: float = 2.0
    """Of replayed features in memory, the newest."""
    patience: int = 8
    """Evaluations without a new best after which training ends."""

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("give either minutes or steps: one of them bounds the training")
        if (self.minutes if self.steps is None else self.steps) <= 0:
            raise ValueError("minutes and steps must be positive")

    @classmethod
    def for_kind(cls, kind: str, **options: Any) -> DistillConfig:
        """What has been found good for heads of this kind."""
        return cls(**KINDS[kind] | options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """What came of it; the head itself has been trained in place."""

    acceptance: Acceptance
    """Of the head as it is now, the best one, on all held-out prompts."""
    acceptance_before: Acceptance
    steps: int
    seconds: float
    rollout_seconds: float
    rollout_tokens: int
    interrupted: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "rollout_seconds": round(self.rollout_seconds, 1),
            "rollout_tokens": self.rollout_tokens,
            "interrupted": self.interrupted,
            "held_out": self.acceptance.to_dict(),
            "held_out_before": self.acceptance_before.to_dict(),
        }


class RolloutSource:
    """Rollouts of a policy on some prompts, a round at a time, never the same completion twice."""

    def __init__(self, view: PolicyView, layers: Sequence[int], sampling: SamplingParams, seed: int) -> None:
        self.view, self.layers, self.sampling = view, layers, sampling
        self.engine = RolloutEngine(view, AtlasConfig(speculate=False))
        self.next_seed = seed << 32
        self.seconds, self.num_tokens = 0.0, 0

    def answer(self, prompts: Sequence[tuple[int, ...]], num_samples: int) -> Replay:
        start = time.perf_counter()
        requests = [
            RolloutRequest(prompt_ids=prompt, seed=self.next_seed + i, max_new_tokens=self.sampling.max_new_tokens)
            for i, prompt in enumerate(p for p in prompts for _ in range(num_samples))
        ]
        self.next_seed += len(requests)
        rollouts = self.engine.generate(requests, self.sampling)
        replayed = replay(self.view, self.layers, rollouts, [request.seed for request in requests])
        self.seconds += time.perf_counter() - start
        self.num_tokens += sum(len(rollout.token_ids) for rollout in rollouts)
        return replayed


KINDS: dict[str, dict[str, Any]] = {
    "recurrent": {},
    # the guesses at the end of a window have seen all of it, as in a rollout; those at its start have not
    "eagle": {"starts_per_window": 64, "starts_per_step": 1024},
}


def fresh_head(kind: str, view: PolicyView, seed: int, **options: Any) -> DraftHead:
    """A head of this kind for the policy, with random weights that leave the global random state alone; `options` are the
    recurrent head's."""
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "recurrent":
            return RecurrentHead.for_policy(view, **options)
        return EagleHead.for_policy(view.model.config).to(view.device)


def distill(view: PolicyView, prompts: Sequence[tuple[int, ...]], head: DraftHead, config: DistillConfig) -> Distilled:
    """Train a head in place for the policy that `view` serves; an interrupt ends training early and keeps the best so far.

    Raises:
        ValueError: fewer than two different prompts (one is held out), or completions too short to guess anything.
    """
    # a caller may be under inference mode, whose tensors autograd does not take
    with torch.inference_mode(False), torch.enable_grad():
        return _Distillation(view, prompts, head, config).run()


class _Distillation:
    def __init__(
        self, view: PolicyView, prompts: Sequence[tuple[int, ...]], head: DraftHead, config: DistillConfig
    ) -> None:
        self.head, self.config = head, config
        self.ends = PolicyEnds.of(view.model)
        self.temperature = config.sampling.temperature or 1.0
        self.generator = torch.Generator().manual_seed(config.seed)
        self.start = time.perf_counter()
        self.steps = 0
        self.source = RolloutSource(view, head.layers, config.sampling, config.seed)
        self.prompts, held_out = self._split(list(dict.fromkeys(prompts)))
        self.queue: list[tuple[int, ...]] = []
        self.rounds = 0
        replayed = self.source.answer(held_out, config.completions_per_prompt)
        if not replayed.num_starts_R.sum():
            raise ValueError("the policy's completions are a token long or less: there is nothing to learn from")
        windows = replayed.tiles(EVALUATION_STARTS + MAX_DEPTH, MAX_DEPTH)
        self.held_out = windows.rows(torch.randperm(len(windows), generator=self.generator))
        self.optimizer = HeadOptimizer(head, config.weight_decay)

    def run(self) -> Distilled:
        before = self._measure(EVALUATION_WINDOWS)
        best, best_state, since_best = before, copy.deepcopy(self.head.state_dict()), 0
        interrupted = False
        with tqdm(total=100, desc="training the head", unit="%", bar_format=BAR) as bar:
            try:
                for acceptance in self._train(bar):
                    since_best += 1
                    if _tokens(acceptance) > _tokens(best):
                        best, best_state, since_best = acceptance, copy.deepcopy(self.head.state_dict()), 0
                    bar.set_postfix_str(f"{_tokens(best):.3f} tokens per step")
                    if since_best >= self.config.patience:
                        break
            except KeyboardInterrupt:
                interrupted = True
        self.head.load_state_dict(best_state)
        return Distilled(
            acceptance=self._measure(len(self.held_out), MAX_DEPTH),
            acceptance_before=before,
            steps=self.steps,
            seconds=time.perf_counter() - self.start,
            rollout_seconds=self.source.seconds,
            rollout_tokens=self.source.num_tokens,
            interrupted=interrupted,
        )

    def _train(self, bar: tqdm) -> Iterator[Acceptance]:
        """Steps until the budget is spent; yields an evaluation now and then, and in the end."""
        config = self.config
        token_bytes = self.held_out.hidden_BWD[0, 0].nbytes + self.held_out.tapped_BWLD[0, 0].nbytes
        max_tokens = int(config.max_gib * 2**30 / token_bytes)
        material, budget, next_evaluation = None, 0.0, 1 / EVALUATIONS
        while (progress := self._progress()) < 1:
            if budget <= 0:
                fresh = self._more_rollouts()
                material = fresh if material is None else (material + fresh).newest(max_tokens)
                budget = config.reuse * int(fresh.num_starts_R.sum())
                continue  # that took time
            budget -= config.starts_per_step
            if not self._step(material, progress):
                logger.warning("the loss is not finite: training ends here, with the best head so far")
                return
            bar.update(100 * progress - bar.n)
            if progress >= next_evaluation:
                yield self._measure(EVALUATION_WINDOWS)
                cost = self._progress() - progress
                next_evaluation = progress + max(1 / EVALUATIONS, cost * STEPS_OVER_EVALUATIONS)
        bar.update(100 - bar.n)
        yield self._measure(EVALUATION_WINDOWS)

    def _step(self, material: Replay, progress: float) -> bool:
        """One optimizer step; False if the loss is not finite."""
        config, depth = self.config, self.config.depths[progress >= DEEPER_FROM]
        num_windows = max(1, config.starts_per_step // config.starts_per_window)
        windows = material.sample(num_windows, config.starts_per_window + depth, depth, self.generator)
        with low_precision(windows.hidden_BWD.device):
            loss, _ = unrolled_loss(self.head, windows, depth, self.ends, temperature=self.temperature)
        self.steps += 1
        warmup = min(1.0, self.steps / config.warmup_steps)
        return self.optimizer.step(loss, config.learning_rate * warmup * (1 - progress) ** LR_POWER)

    def _progress(self) -> float:
        """Share of the budget that is spent."""
        if self.config.steps is not None:
            return self.steps / self.config.steps
        return (time.perf_counter() - self.start) / (60 * self.config.minutes)

    def _split(self, prompts: list[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Prompts to learn from, and a tenth that is held out."""
        if len(prompts) < 2:
            raise ValueError(f"there are {len(prompts)} different prompts: give at least two, one is held out")
        order = torch.randperm(len(prompts), generator=self.generator).tolist()
        num_held_out = min(MAX_HELD_OUT_PROMPTS, max(1, len(prompts) // 10))
        return [prompts[i] for i in order[num_held_out:]], [prompts[i] for i in order[:num_held_out]]

    def _more_rollouts(self) -> Replay:
        """Another round, of prompts in an order that is shuffled anew once all have had their turn."""
        if not self.queue:
            order = torch.randperm(len(self.prompts), generator=self.generator)
            self.queue = [self.prompts[i] for i in order.tolist()]
        count = min(self.config.prompts_per_round, FIRST_ROUND << self.rounds)
        self.rounds += 1
        taken, self.queue = self.queue[:count], self.queue[count:]
        return self.source.answer(taken, self.config.completions_per_prompt)

    def _measure(self, num_windows: int, depth: int = JUDGED_LOOKAHEAD) -> Acceptance:
        windows = self.held_out.rows(slice(num_windows))
        return measure(self.head, windows, self.ends, self.config.sampling, depth=depth)


def _tokens(acceptance: Acceptance) -> float:
    return acceptance.tokens_per_step[JUDGED_LOOKAHEAD - 1]
