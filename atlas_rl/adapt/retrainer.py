"""Keeps a draft head up to date with its policy: a few optimizer steps after each policy update, on what the last rollouts left.

An update trains on the newest rollouts and, for a part, on older ones; it is judged by how many tokens per step the head gets
right on completions held out from it, drawn with their own noise, and undone if that is fewer than before. How many steps an
update takes is the budget's to say: seconds that drafts save against seconds that training takes.

Nothing here touches the policy: its embeddings and output head are constants, gradients reach the head alone, the optimizer and
the random numbers are the retrainer's own.

On several ranks an update is one of all of them. Each draws as many windows per step as a single process does, from its own
rollouts, so that the batch grows with the ranks (the learning rate does not); gradients are the mean over all ranks' windows, the
judgement is over all held-out ones, and heads, moments and decisions are the same on all ranks. One that has nothing to learn
from goes through the steps of the others. Where one fails, all undo the update.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import deque
from typing import Any

import numpy as np
import torch

from atlas_rl.adapt.acceptance import measure
from atlas_rl.adapt.capture import Capture
from atlas_rl.adapt.joint import Joint
from atlas_rl.adapt.lesson import (
    JUDGED_LOOKAHEAD,
    STARTS_PER_WINDOW,
    WINDOWS_PER_STEP,
    Lesson,
    draw_windows,
    judged_windows,
    split,
)
from atlas_rl.adapt.losses import PolicyEnds, low_precision, unrolled_loss
from atlas_rl.adapt.replay import Replay
from atlas_rl.config import AdaptConfig
from atlas_rl.control.budget import RetrainBudget, blend
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.ranks import Ranks
from atlas_rl.telemetry.stats import RetrainStats

logger = logging.getLogger(__name__)

DRIFT = 0.06
"""`on_drift` retrains where acceptance has fallen by so much (relatively) since the last update that was kept."""


class Retrainer:
    """Retrains one drafter's head. `update` is called between rollouts, on all ranks with the same arguments.

    Args:
        drafter: its head is trained in place, on what `capture` was told of.
        when: `every_update`, `on_drift`, or `never`.
        deterministic: take the number of steps from the configuration, not from clocks.
    """

    def __init__(
        self,
        drafter: RecurrentDrafter,
        config: AdaptConfig,
        when: str,
        *,
        deterministic: bool = False,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.drafter, self.config, self.when = drafter, config, when
        self.ranks = ranks or Ranks.alone()
        self.joint = Joint(self.ranks, "retraining")
        if self.ranks.rank:
            seed = int(np.random.default_rng([seed, self.ranks.rank]).integers(2**63))
        self.capture = Capture(drafter.layers, config.max_tokens, seed)
        self.kept: deque[Replay] = deque(maxlen=config.rollouts_kept)
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = self._new_optimizer()
        self.budget = RetrainBudget(config.max_share, config.deterministic_steps if deterministic else None)
        self.good_head = copy.deepcopy(drafter.head.state_dict())
        """The last weights that passed."""
        self.drift_reference: float | None = None
        self.judged_tokens: float | None = None
        """Per step, of the head as updates found it, decayed: held-out prompts differ, so that one judgement tells little."""
        self.step_seconds = 0.0
        """That the optimizer steps of the last update took."""
        self.totals = RetrainStats()
        """Of all updates."""

    @property
    def wants_material(self) -> bool:
        """Whether the next rollout is likely to be learned from."""
        return self.when != "never" and self.budget.is_near

    def update(
        self,
        view: PolicyView,
        *,
        interval_seconds: float,
        drafted_seconds: float,
        remaining: float,
    ) -> RetrainStats | None:
        """After a policy update, or some traffic. None if nothing was done.

        Args:
            interval_seconds: since the last update. drafted_seconds: spent since then on decode steps that a head drafted for.
            remaining: updates to come.
        """
        num_steps = self.budget.choose(interval_seconds, remaining, drafted_seconds)
        if num_steps < 1 and self.is_sound:
            with self.joint:
                if (replay := self._take()) is not None:
                    self.kept.append(replay)
            self._close()
            return None
        stats = self.train(view, max(1, num_steps), only_if_drifted=self.when == "on_drift")
        if stats is not None and stats.steps:
            gain = stats.acceptance_after / stats.acceptance_before - 1 if stats.kept else 0.0
            costs = self.step_seconds / stats.steps, stats.seconds - self.step_seconds
            self.budget.record(stats.steps, *costs, gain, drafted_seconds, remaining)
            self.budget.notice("judged", self.judged_tokens)  # the head may not be drafting at all
        return stats

    def train(self, view: PolicyView, num_steps: int, *, only_if_drifted: bool = False) -> RetrainStats | None:
        """So many optimizer steps on the last rollouts, validated; None if there is nothing to learn from."""
        start = time.perf_counter()
        # the engine's caller may be under any of these
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(view.device.type, enabled=False):
            try:
                stats = self._update(view, num_steps, only_if_drifted)
                self.step_seconds, seconds = self._close(self.step_seconds, time.perf_counter() - start)
            except Exception:
                self.restore()
                raise
        if stats is None:
            return None
        stats.seconds = seconds
        if stats.steps:
            self.budget.step_seconds = self.budget.step_seconds or self.step_seconds / stats.steps
        self.totals = RetrainStats.total([self.totals, stats])
        return stats

    def _update(self, view: PolicyView, num_steps: int, only_if_drifted: bool) -> RetrainStats | None:
        was_sound = self.is_sound
        if not was_sound:
            self.restore()
        lesson, num_lessons = None, torch.zeros(1)
        with self.joint:
            lesson = self._lesson(view, was_sound)
            num_lessons += lesson is not None
        self.joint.add_up([num_lessons])
        if not num_lessons:
            return None
        before = self._tokens(lesson)
        self.judged_tokens = blend(self.judged_tokens, before)
        stats = RetrainStats(updates=1, acceptance_before=before, acceptance_after=before, kept=1)
        if not (only_if_drifted and was_sound) or self._has_drifted():
            self._learn(lesson, num_steps, int(num_lessons), stats)
        if lesson is not None:
            self.kept.append(lesson.newest)
        return stats

    def _learn(self, lesson: Lesson | None, num_steps: int, num_lessons: int, stats: RetrainStats) -> None:
        """The optimizer steps, kept or undone."""
        with self.joint:
            optimizer_state = copy.deepcopy(self.optimizer.state_dict())
        begun = time.perf_counter()
        is_finite = all(self._step(lesson, num_lessons) for _ in range(num_steps))
        self.step_seconds = time.perf_counter() - begun
        before, after = stats.acceptance_before, self._tokens(lesson) if is_finite else 0.0
        stats.steps, stats.acceptance_after = num_steps, after
        if after >= before * (1 - self.config.tolerance):
            for name, tensor in self.drafter.head.state_dict().items():
                self.good_head[name].copy_(tensor)
            self.judged_tokens *= after / before
            self.drift_reference = self.judged_tokens
            return
        if not is_finite:
            if self.ranks.rank == 0:
                logger.warning("retraining of drafter %s diverged: it goes on as it was before", self.drafter.name)
            optimizer_state = self._new_optimizer().state_dict()
        with self.joint:
            self.restore(optimizer_state)
        stats.kept, stats.acceptance_after = 0, before

    def _close(self, *seconds: float) -> list[float]:
        """The end of a joint stretch: rank 0's clock, which all go by."""
        clock = torch.tensor([*seconds, 0.0], dtype=torch.float64) * (self.ranks.rank == 0)
        self.joint.add_up([clock])
        return clock[:-1].tolist()

    # ---- parts of an update ----------------------------------------------------------------------------------------------

    def _lesson(self, view: PolicyView, was_sound: bool) -> Lesson | None:
        # a drafter that was damaged learns again, from older rollouts if there are no others
        replay = self._take() or (self.kept.pop() if self.kept and not was_sound else None)
        if replay is None or int(replay.num_starts_R.sum()) < STARTS_PER_WINDOW:
            return None
        newest, held_out = split(replay, self.generator)
        return Lesson(newest, judged_windows(held_out, self.generator), PolicyEnds.of(view.model))

    def _step(self, lesson: Lesson | None, num_lessons: int) -> bool:
        """One optimizer step; False if the loss is not finite: nothing was changed then."""
        head = self.drafter.head
        loss = torch.zeros((), device=next(head.parameters()).device)
        head.requires_grad_(True)
        try:
            self.optimizer.zero_grad(set_to_none=True)
            with self.joint:
                if lesson is not None:
                    mine = self._loss(lesson) / num_lessons
                    loss += mine.detach()
                    if loss.isfinite():
                        mine.backward()
            for p in head.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.joint.add_up([loss, *(p.grad for p in head.parameters())])
            if not loss.isfinite():
                return False
            with self.joint:
                torch.nn.utils.clip_grad_norm_(head.parameters(), self.config.max_grad_norm)
                self.optimizer.step()
        finally:
            head.requires_grad_(False)
        return self.is_sound

    def _loss(self, lesson: Lesson) -> torch.Tensor:
        """Of some new windows."""
        windows = draw_windows(lesson.newest, self.kept, self.config.depth, self.generator)
        temperature = self.capture.sampling.temperature or 1.0
        with low_precision(lesson.newest.hidden_ND.device):
            parts = [
                unrolled_loss(self.drafter.head, part, self.config.depth, lesson.ends, temperature=temperature)[0]
                * (len(part) / WINDOWS_PER_STEP)
                for part in windows
            ]
            return torch.stack(parts).sum()

    def _take(self) -> Replay | None:
        """The captured completions in which a draft can start: those of more than one token."""
        replay = self.capture.take()
        can_start = None if replay is None else replay.num_starts_R.nonzero()[:, 0]
        return replay.rows(can_start) if can_start is not None and len(can_start) else None

    def _tokens(self, lesson: Lesson | None) -> float:
        """Per step, on all ranks' held-out windows."""
        right_K, judged_K = torch.zeros(2, JUDGED_LOOKAHEAD, dtype=torch.float64)
        with self.joint:
            if lesson is not None:
                sampling = self.capture.sampling
                found = measure(self.drafter.head, lesson.judged, lesson.ends, sampling, depth=JUDGED_LOOKAHEAD)
                judged_K += torch.tensor(found.num_judged)
                right_K += (torch.tensor(found.runs, dtype=torch.float64) * judged_K).round()
        self.joint.add_up([right_K, judged_K])
        return 1 + sum((right_K / judged_K.clamp(min=1)).tolist())

    def _has_drifted(self) -> bool:
        if self.drift_reference is None:
            self.drift_reference = self.judged_tokens
        return self.judged_tokens < self.drift_reference * (1 - DRIFT)

    @property
    def is_sound(self) -> bool:
        """Whether the head's weights are finite."""
        return self.drafter.head.is_finite

    def restore(self, optimizer_state: dict[str, Any] | None = None) -> None:
        """Give the head the last weights that passed, and the optimizer this state, or none."""
        self.drafter.head.load_state_dict(self.good_head)
        self.optimizer.load_state_dict(optimizer_state or self._new_optimizer().state_dict())

    def take_from_first(self) -> None:
        """Go on with rank 0's moments, and its last weights that passed."""
        moments = self.optimizer.state
        has_moments = self.ranks.from_first(bool(moments))
        for p in self.drafter.head.parameters() if has_moments else ():
            zeros = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            moments[p] = moments.get(p) or zeros
        if not has_moments:
            moments.clear()
        kept = [moments[p][key] for p in self.drafter.head.parameters() for key in sorted(moments.get(p, ()))]
        self.ranks.take_from_first([*self.good_head.values(), *kept])

    def _new_optimizer(self) -> torch.optim.AdamW:
        parameters = self.drafter.head.parameters()
        return torch.optim.AdamW(parameters, lr=self.config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    # ---- what is kept ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists only; the weights and the optimizer's tensors are saved beside."""
        return {
            "budget": self.budget.state_dict(),
            "generator": self.generator.get_state().tolist(),
            "capture_rng": self.capture.rng.bit_generator.state,
            "capture_share": self.capture.share,
            "drift_reference": self.drift_reference,
            "judged_tokens": self.judged_tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.budget.load_state_dict(state["budget"])
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        self.capture.rng.bit_generator.state = state["capture_rng"]
        self.capture.share = state["capture_share"]
        self.drift_reference, self.judged_tokens = state["drift_reference"], state["judged_tokens"]
        self.good_head = copy.deepcopy(self.drafter.head.state_dict())
