"""Between arms, at batches of about one size: who is the best, and trials of the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from atlas_rl.control.arms import PLAIN, Arm

HYSTERESIS = 1.03
PLAIN_BONUS = 1.05
"""What a plain step is worth beyond what it emits: rows stay together to the end, and nothing has to be tried or learned."""
TRIAL_STEPS = 4
"""Steps of either arm in a trial; an arm that seems to beat plain decoding has to do so over twice as many."""
TRIAL_EVERY = 32
"""Steps at least between trials."""
FIRST_WAIT, LONGEST_WAIT = 64, 1536
"""Steps between trials of one arm; doubled each time that it loses."""
LONGEST_PLAIN_WAIT = 192
"""Plain decoding is the floor: it is never out of sight for long."""
HOPELESS = 0.85
"""An arm that shows less than this share of the best one's rate, and was not expected to show more, waits longest."""


@dataclass(slots=True)
class Trial:
    arm: Arm
    promised: float = 1.0
    """Its rate over the best arm's, as predicted."""
    steps: int = TRIAL_STEPS
    """Of either arm."""
    rates: list[float] = field(default_factory=list)
    rates_of_best: list[float] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return min(len(self.rates), len(self.rates_of_best)) >= self.steps

    @property
    def shown(self) -> float:
        """Its rate over the best arm's. Medians: one long step decides nothing."""
        return median(self.rates) / median(self.rates_of_best)


@dataclass(slots=True)
class Waiting:
    """Of an arm that is not the best."""

    until: int = 0
    """Step of the contest at which it may be tried."""
    next_wait: int = FIRST_WAIT
    num_passes: int = 0
    """Times that it was passed over since its last trial."""
    kept: float = 1.0
    """Share of what it promised that it showed in its last trial: acceptance is counted where there are drafts, and promises too
    much for rows that get none."""


@dataclass(slots=True)
class Contest:
    best: Arm
    rate: float | None = None
    """Tokens per row and second of the best arm's steps, decayed."""
    step: int = 0
    next_trial: int = TRIAL_STEPS
    trial: Trial | None = None
    waiting: dict[Arm, Waiting] = field(default_factory=dict)
    min_probs: dict[Arm, float] = field(default_factory=dict)
    """By arm; made anew after every trial and policy update."""

    def waits(self, arm: Arm) -> Waiting:
        return self.waiting.setdefault(arm, Waiting())

    def begin(self, trial: Trial | None) -> None:
        self.trial, self.next_trial = trial, self.step + TRIAL_EVERY

    def record(self, arm: Arm, rate: float) -> None:
        """A step of the trial, if there is one."""
        trial = self.trial
        if trial is None:
            return
        if arm == trial.arm:
            trial.rates.append(rate)
        elif arm == self.best:
            trial.rates_of_best.append(rate)
        if trial.is_over:
            self._judge(trial)

    def _judge(self, trial: Trial) -> None:
        ratio = trial.shown
        if PLAIN in (trial.arm, self.best):
            ratio *= PLAIN_BONUS if trial.arm == PLAIN else 1 / PLAIN_BONUS
        if ratio > HYSTERESIS and self.best == PLAIN and trial.steps == TRIAL_STEPS:
            trial.steps *= 2
            return
        self.trial = None
        self.min_probs.clear()
        if ratio > HYSTERESIS:
            self.waiting[self.best] = Waiting(until=self.step + FIRST_WAIT)
            self.best, self.rate = trial.arm, median(trial.rates)
            return
        waiting = self.waits(trial.arm)
        longest = LONGEST_PLAIN_WAIT if trial.arm == PLAIN else LONGEST_WAIT
        # on a busy machine trials may err: an arm that should have won is tried again soon
        is_hopeless = ratio < HOPELESS and trial.promised * waiting.kept <= 1
        waiting.until = self.step + (longest if is_hopeless else waiting.next_wait)
        waiting.next_wait = min(longest, 2 * waiting.next_wait)
        waiting.kept = min(1.0, trial.shown / trial.promised)


@dataclass(slots=True)
class Rest:
    """Plain steps at batches of one size, up to the one before a trial may begin: they need no decision."""

    size: int
    contest: Contest | None

    def lasts(self, num_rows: int) -> bool:
        """Whether a step over so many rows, chosen now, is one of them."""
        contest = self.contest
        if contest is None or contest.best != PLAIN or contest.trial is not None or size_of(num_rows) != self.size:
            return False
        return contest.step + 1 < contest.next_trial

    def record(self) -> None:
        """One of them is over."""
        self.contest.step += 1


def size_of(num_rows: int) -> int:
    """Batches of 1, 2, 3–4, 5–8, … rows are of one size."""
    return (num_rows - 1).bit_length()
