"""The engine's side of speculation: asks drafters, decides what to verify, keeps their counts, benches one that fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Rows
from contextlib import suppress
from typing import Any

import numpy as np

from atlas_rl.control.arms import PLAIN, Arm, arm_name
from atlas_rl.control.contest import Rest
from atlas_rl.control.controller import Controller
from atlas_rl.control.lookahead import choose_draft_lens
from atlas_rl.control.trust import Trust
from atlas_rl.drafters.base import Drafter, Drafts
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.plan import Listener, Plan
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.scheduler import PrefillChunk, Scheduler
from atlas_rl.engine.sequence import Sequence
from atlas_rl.telemetry.stats import DrafterStats, RolloutStats
from atlas_rl.types import SamplingParams

logger = logging.getLogger(__name__)
MAX_DRAFT_LEN = 16
"""Longest draft asked for when the lookahead is automatic."""
FEW_ROWS = 2
"""Up to this many rows what drafters propose is verified as it is: they have been told what pays, and choosing takes time."""
COUNT_EVERY = 16
"""Steps whose drafts are counted together."""


class Speculator:
    """Wraps any number of drafters. Its methods never raise for a drafter's fault: the rollout goes on without it."""

    def __init__(
        self, drafters: Rows[Drafter], controller: Controller, view: PolicyView, *, lookahead: int | None = None
    ) -> None:
        """Raises ValueError if a drafter was made for another policy."""
        self.drafters = {drafter.name: drafter for drafter in drafters}
        assert len(self.drafters) == len(drafters), "drafters' names are unique"
        self.controller = controller
        self.lookahead = lookahead
        self.vocab_size = view.vocab_size
        self.trust = {name: Trust() for name in self.drafters}
        self.plan = Plan()
        """Of the step that is launched, or observed, next."""
        self.num_cached = 0
        """Of the rows of the last step, in all."""
        self.uncounted: list[tuple[Arm, np.ndarray, np.ndarray, np.ndarray]] = []
        """Arm, sources, drafted and accepted tokens by row of the latest steps."""
        self.rest: Rest | None = None
        """While steps are plain, the next one too, and drafters are not told of them: that costs as much as a tenth of a small
        policy's step."""
        self.drafted_seconds = 0.0
        """That steps of this rollout took for which a neural drafter was asked."""
        self.behind: set[str] = set()
        """Drafters that have not been told of all that rows have emitted, because they are not asked."""
        self.listener: Listener | None = None
        self.alone: frozenset[str] = frozenset()
        """Drafters that can draft within captured steps, by themselves: no arm has them together with others."""
        self.within: frozenset[str] = frozenset()
        """Those that do in this rollout."""
        for drafter in drafters:
            self._bind(drafter, view)
        view.tap({layer for drafter in drafters for layer in drafter.layers or ()})

    @property
    def active(self) -> list[Drafter]:
        return [d for name, d in self.drafters.items() if name not in self.controller.benched]

    @property
    def readers(self) -> list[Drafter]:
        """Drafters that look at hidden states, and are not within captured steps to see them."""
        return [drafter for drafter in self.active if drafter.layers is not None and drafter.name not in self.within]

    @property
    def prefix_readers(self) -> list[Drafter]:
        """Those, and drafters within captured steps that have KV of prefixes."""
        return [d for d in self.active if d.layers is not None and (d.uses_blocks or d.name not in self.within)]

    def kv_block_bytes(self, block_size: int) -> int:
        """What drafters keep per block of the policy's KV."""
        return sum(drafter.kv_shape(block_size).block_bytes for drafter in self.active if drafter.uses_blocks)

    # ---- the life of a rollout -------------------------------------------------------------------------------------------

    def wake(self, sampling: SamplingParams, num_blocks: int, block_size: int) -> None:
        self.rest, self.drafted_seconds = None, 0.0
        self.behind.clear()
        for drafter in self.active:
            self._call(drafter, "wake", sampling, num_blocks, block_size)
        self._tell("wake", sampling)

    def describe(self, stats: RolloutStats) -> None:
        """A rollout is over: count its last drafts, and add what drafters have to say of themselves."""
        self._count(stats)
        for drafter in self.active:
            vocabulary = getattr(drafter, "vocabulary", None)
            if vocabulary is not None:
                stats.draft_vocabulary = {"size": len(vocabulary.ids), "coverage": round(vocabulary.coverage, 5)}

    def sleep(self) -> None:
        for drafter in self.active:
            self._call(drafter, "sleep")

    def prefilled(self, batch: ForwardBatch | None, chunks: list[PrefillChunk], copies: list[tuple[int, int]]) -> None:
        """After a prefill forward, before the engine copies blocks of its own cache."""
        if batch is not None and self.prefix_readers:
            following = [c.group.token_after(c.end) for c in chunks if c.end > c.start]
            for drafter in self.prefix_readers:
                self._call(drafter, "prefilled", batch, np.array(following, np.int64))
        for drafter in self.active:
            if drafter.uses_blocks:
                self._call(drafter, "copy_blocks", copies)

    def admit(self, sequences: list[Sequence], batch: ForwardBatch | None, places: np.ndarray) -> None:
        """Rows start to decode; the last token of row i's prefix is at places[i] of the prefilled batch, -1: there was none."""
        if not sequences:
            return
        for drafter in self.active:
            self._call(drafter, "admit", sequences)
        for drafter in () if self.rest is not None else self.readers:
            self._call(drafter, "started", sequences, batch, places)

    def release(self, sequences: list[Sequence], finished: bool) -> None:
        if sequences:
            for drafter in self.active:
                self._call(drafter, "release", sequences, finished)
            self._tell("release", sequences, finished)

    def policy_updated(self) -> None:
        self.controller.policy_updated()
        for drafter in self.active:
            self._call(drafter, "policy_updated")

    def weights_updated(self, name: str) -> None:
        """A drafter's own weights have changed."""
        self._call(self.drafters[name], "weights_updated")

    def reinstate(self, name: str) -> None:
        """A benched drafter has got good weights: it takes part again, from the next rollout on."""
        self.controller.benched.discard(name)

    # ---- one step --------------------------------------------------------------------------------------------------------

    def draft(self, scheduler: Scheduler, stats: RolloutStats) -> list[list[int]]:
        """Draft tokens to verify for each running sequence, with blocks reserved for them."""
        self.choose(scheduler, stats)
        return self.propose(scheduler, stats) if self.plan.arm else [[] for _ in scheduler.running]

    def choose(self, scheduler: Scheduler, stats: RolloutStats) -> None:
        """Decide who drafts in the next step."""
        self.plan = Plan()
        if not self.drafters:
            return
        sequences = scheduler.running
        if self.rest is None or not self.rest.lasts(len(sequences)):
            self._choose(sequences)
        self.plan.rest = self.rest
        stats.arms[arm_name(self.plan.asked)] += 1

    def _choose(self, sequences: list[Sequence]) -> None:
        arm = self.controller.choose(len(sequences), self.num_cached)
        if arm != PLAIN:
            self.num_cached = sum(seq.num_computed for seq in sequences)
            if all(seq.num_remaining == 1 for seq in sequences) or self.lookahead == 0:
                arm = PLAIN  # a row's last token needs no draft after it
            if self.rest is not None:
                arm = PLAIN  # drafters know nothing of the rows: this step is for them to look
        self.plan.arm = self.plan.asked = arm
        may_rest = arm == PLAIN and self.listener is None and all(drafter.can_rest for drafter in self.readers)
        rest = self.controller.rest(len(sequences)) if may_rest else None
        if rest is not None and self.rest is None:
            self.behind.update(self.drafters)
            for drafter in self.readers:
                self._call(drafter, "rest")
        self.rest = rest

    @property
    def wants_hidden(self) -> bool:
        """Whether anyone looks at the hidden states of a step after it."""
        return self.plan.rest is None and (self.listener is not None or bool(self.readers))

    def promise(self, sequences: list[Sequence]) -> int:
        """Draft tokens that the arm, which drafts within the step, shall make for each row; the plan says what they promise."""
        (name,) = self.plan.arm
        num_rows = len(sequences)
        num_drafts = self.lookahead or self.controller.best_depth(self.plan.arm, num_rows, self.num_cached)
        survival_K = self.controller.acceptance[name].survival_K[:num_drafts]
        self.plan.sources = np.zeros(num_rows, np.int64)
        self.plan.expected = np.array([num_rows * survival_K.sum()])
        return num_drafts

    def must_rejoin(self, drafter_before: str) -> bool:
        """Whether the arm drafts within the step and its drafter has to be told what others, such as that one, have drafted."""
        name = self.plan.arm[0] if self.plan.arm else ""
        return name in self.within and name != drafter_before and not self.drafters[name].keeps_up

    def rejoin(self, sequences: list[Sequence], stats: RolloutStats) -> float:
        """Tell it; returns the seconds that it took."""
        start = time.perf_counter()
        self._call(self.drafters[self.plan.arm[0]], "rejoin", sequences)
        seconds = time.perf_counter() - start
        stats.seconds["draft"] += seconds
        return seconds

    def propose(self, scheduler: Scheduler, stats: RolloutStats) -> list[list[int]]:
        """The drafts of the arm that was chosen; it leaves the plan where there are none."""
        start = time.perf_counter()
        drafts = self._drafts_of(scheduler)
        stats.seconds["draft"] += time.perf_counter() - start
        return drafts

    def observe(
        self,
        sequences: list[Sequence],
        batch: ForwardBatch,
        num_right: np.ndarray,
        num_accepted: list[int],
        stats: RolloutStats,
    ) -> None:
        """Report a step to the drafters and count its drafts."""
        if not self.drafters:
            return
        if self.plan.rest is not None:
            self.num_cached = batch.num_cached
            return
        start = time.perf_counter()
        for drafter in self.readers:
            self._call(drafter, "verified", sequences, batch, num_right)
        self._tell("verified", sequences, batch, num_right)
        self.num_cached = batch.num_cached
        if self.plan.arm == PLAIN:
            self.behind.update(self.drafters)
            stats.seconds["draft"] += time.perf_counter() - start
            return
        drafted, accepted = batch.query_lens - 1, np.array(num_accepted, np.int64)
        if self.plan.arm and drafted.any():
            self._trust(drafted, accepted)
            self.uncounted.append((self.plan.arm, self.plan.sources, drafted, accepted))
            if len(self.uncounted) >= COUNT_EVERY:
                self._count(stats)
        for drafter in self.active:
            if drafter.name in self.within and drafter.name in self.plan.arm:
                self._call(drafter, "drafted_within", sequences)
            elif drafter.name in self.plan.arm:
                mine = 1 if len(self.plan.arm) == 1 else self.plan.sources == self.plan.arm.index(drafter.name)
                self._call(drafter, "observe", sequences, drafted * mine, accepted * mine)
            else:  # told in one go, before it is asked again
                self.behind.add(drafter.name)
        stats.seconds["draft"] += time.perf_counter() - start

    def settle(self, num_rows: int, seconds: float) -> None:
        """A step is over, and took so long, drafting and observing included.

        What it emitted is taken from what drafts promised, as far as their drafter keeps its promises: that varies less than
        what single steps emit.
        """
        if self.plan.rest is not None:
            self.plan.rest.record()
        elif self.drafters:
            if any(self.drafters[name].layers is not None for name in self.plan.asked):
                self.drafted_seconds += seconds
            kept = sum(self.trust[name].factor * e for name, e in zip(self.plan.arm, self.plan.expected.tolist()))
            self.controller.record(self.plan.arm, num_rows, seconds, 1 + kept / num_rows)

    # ---- parts of a step -------------------------------------------------------------------------------------------------

    def _drafts_of(self, scheduler: Scheduler) -> list[list[int]]:
        """Drafts of the plan's arm, with blocks reserved for them; an arm that proposes nothing leaves the plan."""
        sequences, plan = scheduler.running, self.plan
        # a row's last token needs no draft after it: K drafts emit up to K + 1 tokens
        longest = MAX_DRAFT_LEN if self.lookahead is None else self.lookahead
        max_lens = np.minimum(longest, np.array([seq.num_remaining for seq in sequences]) - 1)
        chosen: list[list[int]] = [[] for _ in sequences]
        proposals = self._propose(scheduler, max_lens, self.num_cached)
        if not proposals:
            plan.arm = PLAIN
            return chosen
        drafts = self._combine(proposals)
        lens = drafts.lens
        if self.lookahead is None and len(sequences) > FEW_ROWS:
            lens = choose_draft_lens(drafts.probs, lambda n: self.controller.step_cost.seconds(n, self.num_cached))
        for row in np.flatnonzero(lens).tolist():
            fitting = scheduler.reserve_draft(sequences[row], int(lens[row]))
            chosen[row] = drafts.token_ids[row, :fitting].tolist()
        promised = drafts.probs * (np.arange(drafts.probs.shape[1]) < lens[:, None])
        if len(plan.arm) == 1:
            plan.expected = promised.sum(keepdims=True)[0]
        else:
            plan.expected = np.bincount(plan.sources, weights=promised.sum(1), minlength=len(plan.arm))
        return chosen

    def _propose(self, scheduler: Scheduler, max_lens: np.ndarray, num_cached: int) -> list[Drafts]:
        """The arm's drafts; a drafter that fails leaves the arm."""
        sequences, proposals, names = scheduler.running, [], []
        min_prob = (
            self.controller.min_prob(self.plan.arm, len(sequences), num_cached) if self.lookahead is None else 0.0
        )
        for name in self.plan.arm:
            drafter, start, wanted = self.drafters[name], time.perf_counter(), max_lens
            if drafter.uses_blocks:
                wanted = np.array([scheduler.reserve_draft(s, n) for s, n in zip(sequences, max_lens.tolist())])
            if name in self.behind:
                nobody = np.zeros(len(sequences), np.int64)
                self._call(drafter, "observe", sequences, nobody, nobody)
                self.behind.discard(name)
            drafts = self._call(drafter, "propose", sequences, wanted, min_prob / max(0.2, self.trust[name].factor))
            drafts = None if drafts is None else self._checked(drafter, drafts, wanted)
            if drafts is not None:
                proposals.append(drafts)
                names.append(name)
                depth = int((drafts.probs > 0).any(0).sum())
                self.controller.record_draft_seconds(name, len(sequences), max(1, depth), time.perf_counter() - start)
        self.plan.arm = tuple(names)
        return proposals

    def _combine(self, proposals: list[Drafts]) -> Drafts:
        """For each row the draft that promises most, as far as its drafter is to be trusted."""
        trusted = [p.probs * self.trust[name].factor for name, p in zip(self.plan.arm, proposals, strict=True)]
        if len(proposals) == 1:
            self.plan.sources = np.zeros(len(trusted[0]), np.int64)
            return Drafts(proposals[0].token_ids, trusted[0])
        self.plan.sources = np.argmax([probs.sum(1) for probs in trusted], axis=0)
        width = max(probs.shape[1] for probs in trusted)
        padding = [((0, 0), (0, width - probs.shape[1])) for probs in trusted]
        rows = np.arange(len(self.plan.sources))
        tokens = np.stack([np.pad(p.token_ids, pad) for p, pad in zip(proposals, padding, strict=True)])
        probs = np.stack([np.pad(p, pad) for p, pad in zip(trusted, padding, strict=True)])
        return Drafts(tokens[self.plan.sources, rows], probs[self.plan.sources, rows])

    def _trust(self, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """Compare what drafters promised with what was accepted."""
        for index, name in enumerate(self.plan.arm):
            trust, promised = self.trust[name], float(self.plan.expected[index])
            if not promised:
                trust.idle()
                continue
            mine = accepted if len(self.plan.arm) == 1 else accepted[self.plan.sources == index]
            trust.record(int(mine.sum()), promised / trust.factor)  # it was discounted already

    def _count(self, stats: RolloutStats) -> None:
        """Count the drafts of the latest steps."""
        if not self.uncounted:
            return
        for arm in {step[0] for step in self.uncounted}:
            steps = [step for step in self.uncounted if step[0] == arm]
            sources, drafted, accepted = (np.concatenate([step[i] for step in steps]) for i in (1, 2, 3))
            depths = np.arange(drafted.max())[:, None]
            stats.add_depths((drafted > depths).sum(1).tolist(), (accepted > depths).sum(1).tolist())
            for index, name in enumerate(arm):
                mine = sources == index
                num_drafted, num_accepted = drafted[mine], accepted[mine]
                self.controller.record_drafts(name, num_drafted, num_accepted)
                counts = stats.drafters.setdefault(name, DrafterStats())
                counts.steps += sum(bool(step[2][step[1] == index].any()) for step in steps)
                counts.proposed += int(num_drafted.sum())
                counts.accepted += int(num_accepted.sum())
        self.uncounted.clear()

    def _bind(self, drafter: Drafter, view: PolicyView) -> None:
        try:
            drafter.bind(view)
        except ValueError:  # made for another policy: the user's to know
            raise
        except Exception as error:
            self.bench(drafter, f"bind raised {type(error).__name__}: {error}")

    def _tell(self, method: str, *args: Any) -> None:
        if self.listener is None:
            return
        try:
            getattr(self.listener, method)(*args)
        except Exception as error:
            logger.warning("rollouts teach no drafter any more: %s raised %s: %s", method, type(error).__name__, error)
            self.listener = None

    def _call(self, drafter: Drafter, method: str, *args: Any) -> Any:
        if drafter.name in self.controller.benched:
            return None
        try:
            return getattr(drafter, method)(*args)
        except Exception as error:  # a drafter is never worth a rollout
            self.bench(drafter, f"{method} raised {type(error).__name__}: {error}")
            return None

    def _checked(self, drafter: Drafter, drafts: Drafts, max_lens: np.ndarray) -> Drafts | None:
        """The drafts, cut to their limits; a drafter that proposes nonsense is benched."""
        fault = drafts.fault(len(max_lens), self.vocab_size)
        if fault is not None:
            self.bench(drafter, f"it proposed {fault}")
            return None
        token_ids, probs = drafts
        if probs.shape[1] > max_lens.min():
            return Drafts(token_ids, probs * (np.arange(probs.shape[1]) < max_lens[:, None]))
        return drafts

    def bench(self, drafter: Drafter, reason: str) -> None:
        """Decode without a drafter that has failed, until it is reinstated; one warning."""
        if drafter.name in self.controller.benched:
            return
        logger.warning("drafter %s is benched, decoding goes on without it: %s", drafter.name, reason)
        self.controller.benched.add(drafter.name)
        with suppress(Exception):  # it is called no more: what memory it holds would be held for good
            drafter.sleep()
