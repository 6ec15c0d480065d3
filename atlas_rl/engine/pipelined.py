"""Decoding by captured steps, of which the next one is launched before it is known what the last one emitted.

The device goes on from its own state (`decode_state`), so that it does not wait for the host; the host learns of a row's end one
step late, and that step does nothing for the row. Drafts that are the host's to make need the tokens before them: then a step is
waited for.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np

from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.captured import CapturedSteps, CaptureFailed
from atlas_rl.engine.decoding import Decoding
from atlas_rl.engine.in_flight import InFlight
from atlas_rl.engine.plan import Plan
from atlas_rl.engine.sequence import Sequence

logger = logging.getLogger(__name__)


class PipelinedDecoding(Decoding):
    """Falls back to steps that are not captured, with one warning, where steps cannot be captured."""

    def __init__(self, steps: CapturedSteps, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps = steps
        self.in_flight: InFlight | None = None
        self.last_done = 0.0
        """When the last step was known to be done."""
        self.last_drafter = ""
        """Within the step that was launched last."""

    def step(self) -> None:
        if self.steps.failure is None:
            try:
                return self._step()
            except CaptureFailed as error:
                self._give_up(str(error))
        return super().step()

    def started(self, sequences: list[Sequence], batch: ForwardBatch | None, places: np.ndarray) -> None:
        if sequences and self.steps.failure is None:
            try:
                self.steps.admit(sequences, batch, places)
            except Exception as error:  # a drafter is never worth a rollout
                self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        """Decode without captured steps from now on; drafters within them go on as the host's."""
        logger.warning("decode steps are not captured any more, decoding is slower: %s", reason)
        self.drain()  # what a step in flight has left is known to those within it alone
        self.steps.failure = reason
        self.speculator.within, self.speculator.rest = frozenset(), None  # some now have to be told of every step

    def drain(self) -> None:
        if self.in_flight is not None:
            step, self.in_flight = self.in_flight, None
            next_plan = self.speculator.plan
            self._collect(step)
            self.speculator.plan = next_plan

    def _step(self) -> None:
        speculator = self.speculator
        if self.in_flight is not None and all(seq.num_remaining <= 1 for seq in self.scheduler.running):
            return self.drain()  # the step in flight is the last one
        speculator.choose(self.scheduler, self.stats)
        if speculator.must_rejoin(self.last_drafter):
            self.drain()
            if not self.scheduler.running:
                return None
        num_drafts = self._drafts_within()
        if num_drafts is None:  # drafts are the host's to make
            self.drain()
            return self._draft_and_verify()
        num_ahead = self.in_flight.num_places if self.in_flight else 0
        if not self.scheduler.reserve_ahead(num_ahead + 1 + num_drafts):
            self.drain()
            self._leave(self.scheduler.reserve(), finished=False)
            num_drafts, speculator.plan = 0, Plan()
        if not self.scheduler.running:
            return None
        step = self._launch(num_drafts)
        self.drain()
        self.in_flight = step
        return None

    def _drafts_within(self) -> int | None:
        """Draft tokens per row that the step makes itself; None: its arm's drafts are the host's to make."""
        arm = self.speculator.plan.arm
        if not arm:
            return 0
        return self.speculator.promise(self.scheduler.running) if arm[0] in self.steps.drafters else None

    def _draft_and_verify(self) -> None:
        start, before = time.perf_counter(), self.stats.seconds["draft"]
        self._leave(self.scheduler.reserve(), finished=False)
        if not self.scheduler.running:
            return
        drafts = self.speculator.propose(self.scheduler, self.stats)
        longest = max(map(len, drafts))
        step = self._launch(longest and 1 << (longest - 1).bit_length(), drafts)  # few lengths to capture
        step.launched = start
        step.drafting = self.stats.seconds["draft"] - before
        self._collect(step)

    def _launch(self, num_drafts: int, drafts: list[list[int]] | None = None) -> InFlight:
        start, drafting = time.perf_counter(), 0.0
        speculator = self.speculator
        drafter = speculator.plan.arm[0] if num_drafts and drafts is None else ""
        if drafter and speculator.must_rejoin(self.last_drafter):
            drafting = speculator.rejoin(self.scheduler.running, self.stats)
        self.last_drafter = drafter
        step = self.steps.launch(
            self.scheduler.running, num_drafts, drafter=drafter, drafts=drafts, keep_hidden=speculator.wants_hidden
        )
        step.plan, step.launched, step.drafting = speculator.plan, start, drafting
        return step

    def _collect(self, step: InFlight) -> None:
        """Wait for a step and commit what it emitted."""
        emitted = step.collect()
        speculator, stats = self.speculator, self.stats
        stats.device_seconds += step.watch.seconds()
        sequences = [step.sequences[row] for row in emitted.rows.tolist()]
        if not sequences:
            return
        drafting_before = stats.seconds["draft"]
        num_cached = sum(seq.num_computed for seq in sequences)
        batch = step.batch(self.steps.kv_cache, sequences, emitted) if speculator.drafters else None
        places = np.full(len(sequences), step.num_places)
        outputs = (emitted.tokens_RQ.ravel(), emitted.logprobs_RQ.ravel(), emitted.num_right)
        finished, num_accepted = self._commit(sequences, places, *outputs)
        speculator.plan = step.plan
        if step.plan.arm:
            step.plan.sources = step.plan.sources[emitted.rows]
        if batch is not None:
            speculator.observe(sequences, batch, emitted.num_right, num_accepted, stats)
        self._leave(finished, finished=True)

        drafting = step.drafting + stats.seconds["draft"] - drafting_before
        done = time.perf_counter()
        # where the device did not wait for the host, a step takes what lies between two of them
        seconds = done - max(self.last_done, step.launched) - drafting
        self.last_done = done
        num_rows = len(sequences)
        if step.key.drafter:
            within = self._drafting_within(step, num_rows, num_cached, seconds)
            stats.seconds["draft"] += within
            seconds, drafting = seconds - within, drafting + within
        stats.seconds["verify"] += seconds
        num_emitted = num_rows + sum(num_accepted)
        self._record(num_rows, num_rows * step.num_places, num_cached, num_emitted, seconds, drafting)

    def _drafting_within(self, step: InFlight, num_rows: int, num_cached: int, seconds: float) -> float:
        """Seconds that a step drafted, of those that it took: what is beyond steps over as many tokens that do not draft."""
        verify = self.step_cost.seconds(num_rows * step.num_places, num_cached)
        drafting = 0.0 if verify is None else max(0.0, seconds - float(verify))
        self.speculator.controller.record_draft_seconds(step.key.drafter, num_rows, step.key.num_drafts, drafting)
        return drafting

    def _leave(self, sequences: list[Sequence], finished: bool) -> None:
        self.steps.state.release(sequences)
        if finished:
            self._retire(sequences)
        else:
            self.speculator.release(sequences, finished=False)
