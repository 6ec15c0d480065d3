"""The drafters of one served model, and what keeps them up to date: called by the engine between rollouts."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable

from atlas_rl.adapt.retrainer import JUDGED_LOOKAHEAD, Retrainer
from atlas_rl.config import AtlasConfig
from atlas_rl.drafters import Drafters
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.telemetry.stats import RetrainStats

logger = logging.getLogger(__name__)

DISTILL_STEPS = 800
"""Optimizer steps after which a new head guesses well enough to be used, and a frozen copy of it becomes the static drafter."""
DISTILL_SHARE = 0.25
"""Of the time between two updates, while a new head is being made."""
EXPECTED_SAVING = 0.15
"""Of decoding, that a new head is taken to bring: what it has to earn back is known only when it is there."""
MIN_SHOWN = 500
"""Drafts from which on their acceptance says something."""
MIN_RETURN = 2.0
"""Projected savings over cost from which on a head is made."""


class Adaptation:
    """Between rollouts: makes a head where there is none and one would pay, retrains it at each policy update, and without
    updates after some traffic.

    Args:
        remaining: policy updates to come; None where nobody knows: then as much is expected as has been.
    """

    def __init__(
        self, config: AtlasConfig, drafters: Drafters, *, remaining: Callable[[], float] | None = None, seed: int = 0
    ) -> None:
        self.config, self.drafters = config, drafters
        self.remaining = remaining
        self.retrainer: Retrainer | None = None
        if drafters.adaptive is not None and config.retrain != "never":
            self.retrainer = Retrainer(
                drafters.adaptive, config.adapt, config.retrain, deterministic=config.deterministic, seed=seed
            )
        self.distill_steps_left = DISTILL_STEPS if drafters.is_new else 0
        self.last_update = time.perf_counter()
        self.num_updates = 0
        self.is_distilling = False
        self.has_failed = False

    def attach(self, engine: RolloutEngine) -> None:
        """Serve an engine that was built with these drafters."""
        engine.between_rollouts = self.refreshed
        if self.distill_steps_left:
            engine.controller.benched.update(d.name for d in self.drafters.of_new_head)
        elif self.retrainer is not None and self.drafters.starts_as_static and not self.retrainer.totals.kept:
            # until it is another one than the static drafter
            engine.controller.benched.add(self.drafters.adaptive.name)
        self._listen(engine)

    def _listen(self, engine: RolloutEngine) -> None:
        wants = self.retrainer is not None and (bool(self.distill_steps_left) or self.retrainer.wants_material)
        engine.speculator.listener = self.retrainer.capture if wants else None

    def refreshed(self, engine: RolloutEngine, has_changed: bool) -> None:
        """The view has the policy's current weights, which may be other than they were."""
        if self.retrainer is None:
            return
        traffic = engine.traffic
        if not (has_changed or traffic.tokens >= self.config.adapt.tokens_per_update):
            return
        if not traffic.tokens:
            return
        try:
            self._update(engine, has_changed)
        except Exception as error:  # a drafter is never worth a rollout
            if self.distill_steps_left:
                logger.warning("no draft head is made: its training raised %s: %s", type(error).__name__, error)
                self.retrainer = None
            else:
                self.retrainer.restore()
                if not self.has_failed:
                    name, what = self.drafters.adaptive.name, f"{type(error).__name__}: {error}"
                    logger.warning("retraining of drafter %s failed, it goes on as it was before: %s", name, what)
                self.has_failed = True
        finally:
            traffic.clear()
            self._listen(engine)

    def _update(self, engine: RolloutEngine, has_changed: bool) -> None:
        traffic = engine.traffic
        now = time.perf_counter()
        interval, self.last_update = now - self.last_update, now
        self.num_updates += 1
        remaining = self.remaining() if self.remaining is not None else float(self.num_updates)
        is_damaged = not self.retrainer.is_sound  # an update puts the last good weights back, whatever it learns
        if self.distill_steps_left:
            stats = self._distill(engine, interval, traffic.seconds, remaining)
        else:
            self._look_at_drafts(engine)
            stats = self.retrainer.update(
                engine.view,
                interval_seconds=interval,
                rollout_seconds=traffic.seconds,
                remaining=remaining,
            )
        engine.stats.retrain = stats
        if stats is None and not is_damaged:
            return
        if (is_damaged or (stats.kept and stats.steps)) and not self.distill_steps_left:
            engine.speculator.reinstate(self.drafters.adaptive.name)
        if not has_changed:  # or else all drafters take over the policy's new weights anyway
            engine.speculator.weights_updated(self.drafters.adaptive.name)

    def _look_at_drafts(self, engine: RolloutEngine) -> None:
        """Tell the budget what the head has shown, or the frozen one that it is still equal to."""
        name = self.drafters.adaptive.name
        if name in engine.controller.benched and self.drafters.starts_as_static:
            name = "static"
        shown = engine.controller.acceptance[name]
        if shown.total_K[0] > MIN_SHOWN:
            self.retrainer.budget.notice("shown", 1 + float(shown.survival_K[:JUDGED_LOOKAHEAD].sum()))

    def forget_unsaved(self) -> None:
        """Drop what a checkpoint does not hold: captured rollouts, and the counts of the suffix drafter."""
        if self.retrainer is not None:
            self.retrainer.capture.begin()
            self.retrainer.kept.clear()
        for drafter in self.drafters.all:
            drafter.reset()

    # ---- a head of our own -----------------------------------------------------------------------------------------------

    def _distill(
        self, engine: RolloutEngine, interval: float, rollout_seconds: float, remaining: float
    ) -> RetrainStats | None:
        """Train the new head a little more, if it is going to pay."""
        retrainer = self.retrainer
        deterministic = self.config.deterministic
        if not self.is_distilling:
            cost = self.distill_steps_left * (retrainer.budget.step_seconds or 0.0)
            saving = EXPECTED_SAVING * rollout_seconds * remaining
            if not deterministic and retrainer.budget.step_seconds is not None and saving < MIN_RETURN * cost:
                retrainer.capture.begin()
                return None
            self.is_distilling = retrainer.budget.step_seconds is not None or deterministic
        steps = retrainer.budget.deterministic_steps or 1
        if self.is_distilling and not deterministic:
            steps = max(1, int(DISTILL_SHARE * interval / retrainer.budget.step_seconds))
        stats = retrainer.train(engine.view, min(steps, self.distill_steps_left))
        if stats is None:
            return None
        self.distill_steps_left -= stats.steps
        if not self.distill_steps_left:
            self._adopt(engine)
        return stats

    def _adopt(self, engine: RolloutEngine) -> None:
        """The head is made: it goes on as the adaptive drafter, and a frozen copy of it as the static one."""
        logger.info(
            "a static drafter was distilled from the policy's own rollouts in %.1f s", self.retrainer.totals.seconds
        )
        weights = copy.deepcopy(self.drafters.adaptive.head.state_dict())
        for drafter in self.drafters.of_new_head:
            drafter.head.load_state_dict(weights)
            engine.speculator.reinstate(drafter.name)
            engine.speculator.weights_updated(drafter.name)
