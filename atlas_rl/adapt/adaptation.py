"""The drafters of one served model, and what keeps them up to date: called by the engine between rollouts.

On several ranks that is done together, where all of them meet. Each tells the others what it has seen, and rank 0's clock and
figures decide for all, so that drafters and their words are the same everywhere; where they are not, rank 0's are taken.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from atlas_rl.adapt.lesson import JUDGED_LOOKAHEAD
from atlas_rl.adapt.retrainer import Retrainer
from atlas_rl.config import AtlasConfig
from atlas_rl.drafters import Drafters
from atlas_rl.drafters.heads import DraftHead
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import INTEGERS
from atlas_rl.ranks import RankFailed, Ranks
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


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank has seen since the last update."""

    has_changed: bool
    tokens: int
    seconds: float
    """Of decoding."""
    drafted_seconds: float
    """Of these, in steps that a head drafted for."""
    interval: float
    """Seconds since the last update."""
    remaining: float
    shown: float | None
    """Tokens per step of the adaptive drafter's drafts, or of the frozen one that it is still equal to."""
    heads: dict[str, tuple[str, int]]
    """Each trained drafter's architecture, and the sum of its weights' bits; nothing where a process is alone."""
    benched: frozenset[str]


class Adaptation:
    """Between rollouts: makes a head where there is none and one would pay, retrains it at each policy update, and without
    updates after some traffic.

    Args:
        remaining: policy updates to come; None where nobody knows: then as much is expected as has been.
        ranks: who has the same policy, and calls this at the same time.
    """

    def __init__(
        self,
        config: AtlasConfig,
        drafters: Drafters,
        *,
        remaining: Callable[[], float] | None = None,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.drafters = config, drafters
        self.ranks = ranks or Ranks.alone()
        self.remaining = remaining
        self.may_update = True
        """Whether all ranks meet at this generate call. Where they do not, traffic waits for the next one where they do."""
        self.is_joined = False
        """Whether this rank's heads have been made rank 0's."""
        self.retrainer: Retrainer | None = None
        if drafters.adaptive is not None and config.retrain != "never":
            self.retrainer = Retrainer(
                drafters.adaptive,
                config.adapt,
                config.retrain,
                deterministic=config.deterministic,
                seed=seed,
                ranks=self.ranks,
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

    @property
    def trained(self) -> dict[str, RecurrentDrafter]:
        """Drafters whose heads this run makes or trains; a static one that was loaded is where it was."""
        adaptive = [] if self.drafters.adaptive is None else [self.drafters.adaptive]
        return {drafter.name: drafter for drafter in (*adaptive, *self.drafters.of_new_head)}

    def refreshed(self, engine: RolloutEngine, has_changed: bool) -> None:
        """The view has the policy's current weights, which may be other than they were. Collective, where it may update."""
        if not self.may_update or (self.retrainer is None and self.ranks.size == 1):
            return
        reports = self.ranks.meet("retraining", self._report(engine, has_changed))
        assert {report.has_changed for report in reports} == {has_changed}, (
            f"weights changed on some ranks only: {reports}"
        )
        self._agree(engine, reports)
        tokens = sum(report.tokens for report in reports) / len(reports)
        is_due = has_changed or tokens >= self.config.adapt.tokens_per_update
        if self.retrainer is not None and is_due and tokens:
            self._try_update(engine, reports[0])
        if has_changed and self.ranks.size > 1:
            self._choose_words(engine, reports)

    def _try_update(self, engine: RolloutEngine, report: Report) -> None:
        try:
            self._update(engine, report)
        except Exception as error:  # a drafter is never worth a rollout; all ranks come here if one does
            if self.ranks.size > 1 and not self.ranks.know(error):
                raise
            tells = self.ranks.rank == 0 or not isinstance(error, RankFailed)
            if self.distill_steps_left:
                if tells:
                    logger.warning("no draft head is made: its training raised %s: %s", type(error).__name__, error)
                self.retrainer = None
            else:
                self.retrainer.restore()
                if tells and not self.has_failed:
                    name, what = self.drafters.adaptive.name, f"{type(error).__name__}: {error}"
                    logger.warning("retraining of drafter %s failed, it goes on as it was before: %s", name, what)
                self.has_failed = True
        finally:
            engine.traffic.clear()
            self._listen(engine)

    def _update(self, engine: RolloutEngine, report: Report) -> None:
        self.last_update = time.perf_counter()
        self.num_updates += 1
        is_damaged = not self.retrainer.is_sound  # an update puts the last good weights back, whatever it learns
        if self.distill_steps_left:
            stats = self._distill(engine, report)
        else:
            if report.shown is not None:
                self.retrainer.budget.notice("shown", report.shown)
            stats = self.retrainer.update(
                engine.view,
                interval_seconds=report.interval,
                drafted_seconds=report.drafted_seconds,
                remaining=report.remaining,
            )
        engine.stats.retrain = stats
        if stats is None and not is_damaged:
            return
        if (is_damaged or (stats.kept and stats.steps)) and not self.distill_steps_left:
            engine.speculator.reinstate(self.drafters.adaptive.name)
        if stats is not None and stats.kept and stats.steps:
            engine.controller.improved(self.drafters.adaptive.name, stats.acceptance_after, JUDGED_LOOKAHEAD)
        if not report.has_changed:  # or else all drafters take over the policy's new weights anyway
            engine.speculator.weights_updated(self.drafters.adaptive.name)

    def _shown(self, engine: RolloutEngine) -> float | None:
        if self.drafters.adaptive is None or self.distill_steps_left:
            return None
        name = self.drafters.adaptive.name
        if name in engine.controller.benched and self.drafters.starts_as_static:
            name = "static"
        shown = engine.controller.acceptance[name]
        return shown.tokens_per_step(JUDGED_LOOKAHEAD) if shown.total_K[0] > MIN_SHOWN else None

    def forget_unsaved(self) -> None:
        """Drop what a checkpoint does not hold: captured rollouts, and the counts of the suffix drafter."""
        if self.retrainer is not None:
            self.retrainer.capture.begin()
            self.retrainer.kept.clear()
        for drafter in self.drafters.all:
            drafter.reset()

    # ---- on several ranks ------------------------------------------------------------------------------------------------

    def _report(self, engine: RolloutEngine, has_changed: bool) -> Report:
        return Report(
            has_changed=has_changed,
            tokens=engine.traffic.tokens,
            seconds=engine.traffic.seconds,
            drafted_seconds=engine.traffic.drafted_seconds,
            interval=time.perf_counter() - self.last_update,
            remaining=self.remaining() if self.remaining is not None else self.num_updates + 1.0,
            shown=self._shown(engine),
            heads={n: described(d.head) for n, d in self.trained.items()} if self.ranks.size > 1 else {},
            benched=frozenset(engine.controller.benched),
        )

    def _agree(self, engine: RolloutEngine, reports: list[Report]) -> None:
        """Have the same heads and the same counts of words as the other ranks."""
        first = reports[0]
        kinds = [{name: kind for name, (kind, _) in report.heads.items()} for report in reports]
        if any(kind != kinds[0] for kind in kinds):
            raise ValueError(f"ranks have different drafters: give all of them the same files and versions. {kinds}")
        others = [rank for rank, report in enumerate(reports) if report.heads != first.heads]
        if others and self.is_joined and self.ranks.rank == 0:
            logger.warning("draft heads on rank %s were not as on rank 0: all go on with rank 0's", others)
        if others or not self.is_joined:
            self._join(engine, first)
        if first.has_changed:
            self.add_up_words()

    def _join(self, engine: RolloutEngine, first: Report) -> None:
        """Go on with rank 0's drafters."""
        self.is_joined = True
        if self.ranks.size == 1:
            return
        with torch.inference_mode(False), torch.no_grad():
            if self.retrainer is not None:
                self.retrainer.take_from_first()
            for name, drafter in self.trained.items():
                self.ranks.take_from_first(list(drafter.head.state_dict().values()))
                if name not in first.benched:
                    engine.speculator.reinstate(name)
                engine.speculator.weights_updated(name)

    def add_up_words(self) -> None:
        """Count the words that any rank has used; collective."""
        for drafter in self.drafters.all:
            if getattr(drafter, "owns_vocabulary", False):
                drafter.vocabulary.add_up(self.ranks)

    def _choose_words(self, engine: RolloutEngine, reports: list[Report]) -> None:
        """Drafters choose their words when they are told of an update; one that is benched on this rank alone is not told."""
        benched_everywhere = frozenset.intersection(*(report.benched for report in reports))
        for name in engine.controller.benched - benched_everywhere:
            drafter = engine.speculator.drafters[name]
            if getattr(drafter, "owns_vocabulary", False):
                drafter.vocabulary.choose()

    # ---- a head of our own -----------------------------------------------------------------------------------------------

    def _distill(self, engine: RolloutEngine, report: Report) -> RetrainStats | None:
        """Train the new head a little more, if it is going to pay."""
        retrainer = self.retrainer
        deterministic = self.config.deterministic
        if not self.is_distilling:
            cost = self.distill_steps_left * (retrainer.budget.step_seconds or 0.0)
            saving = EXPECTED_SAVING * report.seconds * report.remaining
            if not deterministic and retrainer.budget.step_seconds is not None and saving < MIN_RETURN * cost:
                retrainer.capture.begin()
                return None
            self.is_distilling = retrainer.budget.step_seconds is not None or deterministic
        steps = retrainer.budget.deterministic_steps or 1
        if self.is_distilling and not deterministic:
            steps = max(1, int(DISTILL_SHARE * report.interval / retrainer.budget.step_seconds))
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


def described(head: DraftHead) -> tuple[str, int]:
    """Its architecture, and the sum of the bits of its weights, which shows where two are not the same."""
    sums = [p.detach().view(INTEGERS[p.element_size()]).sum(dtype=torch.int64) for p in head.parameters()]
    return f"{head.kind} {head.config_dict()}", int(torch.stack(sums).sum())
