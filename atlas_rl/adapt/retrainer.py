"""Keeps a draft head up to date with its policy: a few optimizer steps after each policy update, on what the last rollouts left.

An update trains on the newest rollouts and, for a part, on older ones; it is judged by how many tokens per step the head gets
right on completions held out from it, drawn with their own noise, and undone if that is fewer than before. How many steps an
update takes is the budget's to say: seconds that drafts save against seconds that training takes.

Nothing here touches the policy: its embeddings and output head are constants, gradients reach the head alone, the optimizer and
the random numbers are the retrainer's own.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import deque
from typing import Any

import torch

from atlas_rl.adapt.acceptance import Acceptance, measure
from atlas_rl.adapt.capture import Capture
from atlas_rl.adapt.losses import PolicyEnds, low_precision, unrolled_loss
from atlas_rl.adapt.replay import Replay
from atlas_rl.config import AdaptConfig
from atlas_rl.control.budget import RetrainBudget, blend
from atlas_rl.drafters.heads import Windows
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.telemetry.stats import RetrainStats

logger = logging.getLogger(__name__)

STARTS_PER_WINDOW = 8
WINDOWS_PER_STEP = 24
HELD_OUT_EVERY = 8
"""One prompt in so many is held out."""
HELD_OUT_WINDOWS = 12
HELD_OUT_STARTS = 16
JUDGED_LOOKAHEAD = 4
NEWEST_SHARE = 0.5
"""Of the windows of a step, the rest is drawn from all rollouts that are kept."""
DRIFT = 0.06
"""`on_drift` retrains where acceptance has fallen by so much (relatively) since the last update that was kept."""


class Retrainer:
    """Retrains one drafter's head. `update` is called between rollouts.

    Args:
        drafter: its head is trained in place, on what `capture` was told of.
        when: `every_update`, `on_drift`, or `never`.
        deterministic: take the number of steps from the configuration, not from clocks.
    """

    def __init__(
        self, drafter: RecurrentDrafter, config: AdaptConfig, when: str, *, deterministic: bool = False, seed: int = 0
    ) -> None:
        self.drafter, self.config, self.when = drafter, config, when
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
        rollout_seconds: float,
        remaining: float,
    ) -> RetrainStats | None:
        """After a policy update, or some traffic. None if nothing was done.

        Args:
            interval_seconds: since the last update. rollout_seconds: spent decoding since then. remaining: updates to come.
        """
        num_steps = self.budget.choose(interval_seconds, remaining)
        if num_steps < 1 and self.is_sound:
            if (replay := self._take()) is not None:
                self.kept.append(replay)
            return None
        stats = self.train(view, max(1, num_steps), only_if_drifted=self.when == "on_drift")
        if stats is not None and stats.steps:
            gain = stats.acceptance_after / stats.acceptance_before - 1 if stats.kept else 0.0
            costs = self.step_seconds / stats.steps, stats.seconds - self.step_seconds
            self.budget.record(stats.steps, *costs, gain, rollout_seconds, remaining)
            self.budget.notice("judged", self.judged_tokens)  # the head may not be drafting at all
        return stats

    def train(self, view: PolicyView, num_steps: int, *, only_if_drifted: bool = False) -> RetrainStats | None:
        """So many optimizer steps on the last rollouts, validated; None if there is nothing to learn from."""
        start = time.perf_counter()
        was_sound = self.is_sound
        if not was_sound:
            self.restore()
        # a drafter that was damaged learns again, from older rollouts if there are no others
        replay = self._take() or (self.kept.pop() if self.kept and not was_sound else None)
        if replay is None or int(replay.num_starts_R.sum()) < STARTS_PER_WINDOW:
            return None
        # the engine's caller may be under any of these
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(view.device.type, enabled=False):
            try:
                stats = self._update(view, replay, num_steps, start, only_if_drifted and was_sound)
            except Exception:
                self.restore()
                raise
        if stats.steps:
            self.budget.step_seconds = self.budget.step_seconds or self.step_seconds / stats.steps
        self.totals = RetrainStats.total([self.totals, stats])
        return stats

    def _update(
        self, view: PolicyView, replay: Replay, num_steps: int, start: float, only_if_drifted: bool
    ) -> RetrainStats:
        ends = PolicyEnds.of(view.model)
        newest, held_out = self._split(replay)
        judged = self._judged_windows(held_out)
        before = self._tokens(self._measure(judged, ends))
        self.judged_tokens = blend(self.judged_tokens, before)
        stats = RetrainStats(updates=1, acceptance_before=before, acceptance_after=before, kept=1)
        if only_if_drifted and not self._has_drifted():
            self.kept.append(newest)
            stats.seconds = time.perf_counter() - start
            return stats
        optimizer_state = copy.deepcopy(self.optimizer.state_dict())
        begun = time.perf_counter()
        is_finite = all(self._step(newest, ends) for _ in range(num_steps))
        self.step_seconds = time.perf_counter() - begun
        after = self._tokens(self._measure(judged, ends)) if is_finite else 0.0
        stats.steps, stats.acceptance_after = num_steps, after
        if after >= before * (1 - self.config.tolerance):
            self.good_head = copy.deepcopy(self.drafter.head.state_dict())
            self.judged_tokens *= after / before
            self.drift_reference = self.judged_tokens
        else:
            if not is_finite:
                logger.warning("retraining of drafter %s diverged: it goes on as it was before", self.drafter.name)
                optimizer_state = self._new_optimizer().state_dict()
            self.restore(optimizer_state)
            stats.kept, stats.acceptance_after = 0, before
        self.kept.append(newest)
        stats.seconds = time.perf_counter() - start
        return stats

    # ---- parts of an update ----------------------------------------------------------------------------------------------

    def _step(self, newest: Replay, ends: PolicyEnds) -> bool:
        """One optimizer step; False if the loss is not finite: nothing was changed then."""
        width = STARTS_PER_WINDOW + self.config.depth
        windows = [newest.sample(WINDOWS_PER_STEP, width, self.config.depth, self.generator)]
        if self.kept:
            older = self.kept[int(torch.randint(len(self.kept), (), generator=self.generator))]
            count = int(WINDOWS_PER_STEP * (1 - NEWEST_SHARE))
            windows = [
                windows[0].rows(slice(WINDOWS_PER_STEP - count)),
                older.sample(count, width, self.config.depth, self.generator),
            ]
        head = self.drafter.head
        head.requires_grad_(True)
        try:
            with low_precision(newest.hidden_ND.device):
                parts = [
                    unrolled_loss(
                        head, part, self.config.depth, ends, temperature=self.capture.sampling.temperature or 1.0
                    )[0]
                    * (len(part) / WINDOWS_PER_STEP)
                    for part in windows
                ]
                loss = torch.stack(parts).sum()
            if not loss.isfinite():
                return False
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), self.config.max_grad_norm)
            self.optimizer.step()
        finally:
            head.requires_grad_(False)
        return self.is_sound

    def _take(self) -> Replay | None:
        """The captured completions in which a draft can start: those of more than one token."""
        replay = self.capture.take()
        can_start = None if replay is None else replay.num_starts_R.nonzero()[:, 0]
        return replay.rows(can_start) if can_start is not None and len(can_start) else None

    def _split(self, replay: Replay) -> tuple[Replay, Replay]:
        """Completions to learn from, and those held out from this update: all of some prompts, as the next rollouts will be of
        other prompts too; or some of the only prompt's."""
        groups = replay.groups_R.unique()
        if len(groups) > 1:
            chosen = torch.randperm(len(groups), generator=self.generator)[: max(1, len(groups) // HELD_OUT_EVERY)]
            is_held_out = torch.isin(replay.groups_R, groups[chosen])
        else:
            is_held_out = torch.zeros(len(replay), dtype=torch.bool)
            order = torch.randperm(len(replay), generator=self.generator)
            is_held_out[order[: len(replay) // HELD_OUT_EVERY]] = True
        if not is_held_out.any():
            return replay, replay
        return replay.rows((~is_held_out).nonzero()[:, 0]), replay.rows(is_held_out.nonzero()[:, 0])

    def _judged_windows(self, held_out: Replay) -> Windows:
        """Some windows of any of the completions: neighbours are right or wrong together."""
        windows = held_out.tiles(HELD_OUT_STARTS + JUDGED_LOOKAHEAD, JUDGED_LOOKAHEAD)
        return windows.rows(torch.randperm(len(windows), generator=self.generator)[:HELD_OUT_WINDOWS])

    def _measure(self, windows: Windows, ends: PolicyEnds) -> Acceptance:
        return measure(self.drafter.head, windows, ends, self.capture.sampling, depth=JUDGED_LOOKAHEAD)

    @staticmethod
    def _tokens(acceptance: Acceptance) -> float:
        return acceptance.tokens_per_step[JUDGED_LOOKAHEAD - 1]

    def _has_drifted(self) -> bool:
        if self.drift_reference is None:
            self.drift_reference = self.judged_tokens
        return self.judged_tokens < self.drift_reference * (1 - DRIFT)

    @property
    def is_sound(self) -> bool:
        """Whether the head's weights are finite."""
        return all(p.isfinite().all() for p in self.drafter.head.parameters())

    def restore(self, optimizer_state: dict[str, Any] | None = None) -> None:
        """Give the head the last weights that passed, and the optimizer this state, or none."""
        self.drafter.head.load_state_dict(self.good_head)
        self.optimizer.load_state_dict(optimizer_state or self._new_optimizer().state_dict())

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
