"""Which drafter to ask, before every step: the one whose steps emit most tokens per second, or none.

An arm is a drafter, a neural drafter together with a textual one, or plain decoding. Before an arm is tried at batches of some
size, its worth is predicted: rows · (1 + Σ P(accept ≥ i)) / (draft(K) + verify(K + 1)), at its best K, from the acceptance by
depth that it has shown at any size and from measured seconds. Once it has been tried, its worth is what it was: tokens over
seconds, its own included. The runner-up is tried again now and then; an arm has to be better by some per cent to take over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atlas_rl.control.acceptance import MAX_DEPTH, UPDATE_DECAY, Acceptance
from atlas_rl.control.cost_model import DraftCost, FixedStepCost, StepCost

Arm = tuple[str, ...]
PLAIN: Arm = ()

HYSTERESIS = 1.03
MIN_STEPS = 4
"""Steps of an arm before it is believed, and steps of a trial."""
DECAY = 0.93
"""Per step of an arm: about the last fifteen count."""
OUTLIER = 3.0
"""A step longer than this many average ones is cut to it: the machine was busy with something else."""
FIRST_WAIT, LONGEST_WAIT = 24, 768
"""Steps between trials of an arm at batches of one size; doubled each time that it loses."""
HOPELESS = 0.8
"""An arm predicted or measured to be worth less than this share of the best is tried at the longest wait only."""


@dataclass(slots=True)
class Tally:
    """Of an arm at batches of about one size."""

    steps: float = 0.0
    seconds: float = 0.0
    tokens: float = 0.0
    """Per row."""
    wait: int = 0
    next_wait: int = FIRST_WAIT

    @property
    def is_believed(self) -> bool:
        return self.steps >= MIN_STEPS - 1  # decayed, four steps count as 3.6

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def add(self, seconds: float, tokens: float) -> None:
        if self.is_believed:
            seconds = min(seconds, OUTLIER * self.seconds / self.steps)
        self.steps = DECAY * self.steps + 1
        self.seconds = DECAY * self.seconds + seconds
        self.tokens = DECAY * self.tokens + tokens


@dataclass(slots=True)
class Contest:
    """Between the arms, at batches of about one size."""

    tallies: dict[Arm, Tally] = field(default_factory=dict)
    best: Arm = PLAIN
    trial: Arm | None = None
    """The arm that is being tried."""
    trial_steps: int = 0


def size_of(num_rows: int) -> int:
    """Batches of 1, 2, 3–4, 5–8, … rows are of one size."""
    return (num_rows - 1).bit_length()


class Controller:
    """Knows numbers, not tensors. `choose` before each step, `record` after it.

    Args:
        arms: other than plain decoding. step_cost: of forwards of the policy. deterministic: never look at a clock; then
            `draft_costs` give what a guess of each drafter costs, in plain steps. may_decode_plainly: whether K = 0 is an arm.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        step_cost: StepCost | FixedStepCost,
        *,
        deterministic: bool = False,
        may_decode_plainly: bool = True,
        fixed_costs: dict[str, float] | None = None,
    ) -> None:
        self.arms = ([PLAIN] if may_decode_plainly else []) + list(arms)
        self.step_cost = step_cost
        self.deterministic = deterministic
        self.fixed_costs = fixed_costs or {}
        names = {name for arm in arms for name in arm}
        self.acceptance = {name: Acceptance() for name in sorted(names)}
        self.draft_cost = {name: DraftCost() for name in sorted(names)}
        self.contests: dict[int, Contest] = {}
        self.benched: set[str] = set()

    # ---- before a step ---------------------------------------------------------------------------------------------------

    def choose(self, num_rows: int, num_cached: int = 0) -> Arm:
        """The arm for a step over so many rows, which have so many cached tokens in all."""
        arms = [arm for arm in self.arms if not self.benched.intersection(arm)]
        if len(arms) < 2:
            return arms[0] if arms else PLAIN
        if self.deterministic:
            return max(arms, key=lambda arm: self.predicted_rate(arm, num_rows, num_cached))
        contest = self._contest(num_rows)
        if contest.trial is not None and self.benched.intersection(contest.trial):
            contest.trial = None
        if contest.trial is None:
            contest.trial = self._next_trial(contest, arms, num_rows, num_cached)
            contest.trial_steps = MIN_STEPS
        if contest.trial is not None:
            return contest.trial
        return contest.best

    def predicted_rate(self, arm: Arm, num_rows: int, num_cached: int = 0) -> float:
        """Tokens per row and second, at the best lookahead."""
        depths = np.arange(MAX_DEPTH + 1)
        verify = self.step_cost.seconds(num_rows * (depths + 1), num_cached)
        if verify is None:
            return 1.0 if arm == PLAIN else 1.0 + 0.01 * len(arm)  # nothing is known: try the drafters
        if arm == PLAIN:
            return 1 / float(verify[0])
        survival = np.max([self.acceptance[name].survival_K for name in arm], axis=0)
        draft = sum(self._draft_seconds(name, depths, num_rows, float(verify[0])) for name in arm)
        rates = np.concatenate([[1.0], 1 + survival.cumsum()]) / (draft + verify)
        return float(rates[1:].max())

    def min_prob(self, arm: Arm, num_rows: int, num_cached: int = 0) -> float:
        """Probability of being accepted from which on a draft token pays for being verified: its share of a longer step, at the
        rate at which the arm emits tokens."""
        cost = self.step_cost.seconds(np.array([num_rows, 2 * num_rows]), num_cached)
        if cost is None:
            return 0.1
        slope = float(cost[1] - cost[0]) / num_rows  # seconds per token more
        rate = num_rows * self.predicted_rate(arm, num_rows, num_cached) if self.deterministic else None
        if rate is None:
            tally = self._contest(num_rows).tallies.get(arm)
            rate = num_rows * (tally.rate if tally and tally.is_believed else 1.3 / float(cost[0]))
        return min(0.9, max(0.05, slope * rate))

    # ---- after a step ----------------------------------------------------------------------------------------------------

    def record(self, arm: Arm, num_rows: int, seconds: float, tokens_per_row: float) -> None:
        """A step of this arm took `seconds`, drafting included, and emitted so many tokens per row."""
        if self.deterministic:
            return
        contest = self._contest(num_rows)
        tally = contest.tallies.setdefault(arm, Tally())
        tally.add(seconds, tokens_per_row)
        for other, others in contest.tallies.items():
            if other not in (arm, contest.best):
                others.wait = max(0, others.wait - 1)
        if arm == contest.trial:
            contest.trial_steps -= 1
            if contest.trial_steps <= 0:
                contest.trial = None
                self._judge(contest, arm)
        elif arm == contest.best:
            self._check_best(contest)

    def record_drafts(self, name: str, num_drafted: np.ndarray, num_accepted: np.ndarray) -> None:
        """Of one drafter's verified draft tokens [R], how many were right [R]."""
        self.acceptance[name].record(num_drafted, num_accepted)

    def record_draft_seconds(self, name: str, num_rows: int, depth: int, seconds: float) -> None:
        self.draft_cost[name].record(num_rows, depth, seconds)

    def policy_updated(self) -> None:
        """What drafters have shown counts for less; those that lost get another chance sooner."""
        for acceptance in self.acceptance.values():
            acceptance.fade(UPDATE_DECAY)
        for contest in self.contests.values():
            for arm, tally in contest.tallies.items():
                if arm != PLAIN:
                    tally.wait, tally.next_wait = tally.wait // 2, max(FIRST_WAIT, tally.next_wait // 2)

    # ---- the contest -----------------------------------------------------------------------------------------------------

    def _contest(self, num_rows: int) -> Contest:
        return self.contests.setdefault(size_of(num_rows), Contest(best=self.arms[0]))

    def _next_trial(self, contest: Contest, arms: Sequence[Arm], num_rows: int, num_cached: int) -> Arm | None:
        """An arm to try now: one that has to be known, or one whose turn it is."""
        best = contest.tallies.get(contest.best)
        if best is None or not best.is_believed or self.benched.intersection(contest.best):
            if self.benched.intersection(contest.best):
                contest.best = arms[0]
            return contest.best
        candidate, highest = None, 0.0
        for arm in arms:
            tally = contest.tallies.setdefault(arm, Tally())
            if arm == contest.best or tally.wait:
                continue
            rate = tally.rate if tally.is_believed else self.predicted_rate(arm, num_rows, num_cached)
            if rate < HOPELESS * best.rate:
                tally.wait = LONGEST_WAIT
            elif rate > highest:
                candidate, highest = arm, rate
        if candidate is not None:
            tally = contest.tallies[candidate]
            if tally.is_believed:  # what it showed long ago weighs as much as one new step
                share = 1 / tally.steps
                tally.steps, tally.seconds, tally.tokens = 1.0, tally.seconds * share, tally.tokens * share
        return candidate

    def _judge(self, contest: Contest, arm: Arm) -> None:
        tally, best = contest.tallies[arm], contest.tallies.get(contest.best)
        if arm == contest.best or best is None:
            return
        if tally.rate > HYSTERESIS * best.rate:
            best.wait, best.next_wait = FIRST_WAIT, FIRST_WAIT
            contest.best = arm
            tally.next_wait = FIRST_WAIT
        else:
            tally.wait = LONGEST_WAIT if tally.rate < HOPELESS * best.rate else tally.next_wait
            tally.next_wait = min(LONGEST_WAIT, 2 * tally.next_wait)

    def _check_best(self, contest: Contest) -> None:
        """The best arm may get worse while it is used: the best of those that were measured takes over."""
        best = contest.tallies[contest.best]
        for arm, tally in contest.tallies.items():
            is_known = tally.is_believed and not self.benched.intersection(arm)
            if arm != contest.best and is_known and tally.rate > HYSTERESIS * best.rate:
                best.wait = best.next_wait
                best.next_wait = min(LONGEST_WAIT, 2 * best.next_wait)
                contest.best, best = arm, tally

    def _draft_seconds(self, name: str, depths: np.ndarray, num_rows: int, step_seconds: float) -> np.ndarray:
        if self.deterministic:
            return self.fixed_costs.get(name, 0.05) * depths * step_seconds
        seconds = self.draft_cost[name].seconds(num_rows, depths)
        return np.zeros(len(depths)) if seconds is None else seconds

    # ---- what is kept ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Acceptance of each drafter; seconds are measured anew, on whatever machine goes on."""
        return {"acceptance": {name: a.state_dict() for name, a in self.acceptance.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, acceptance in state["acceptance"].items():
            if name in self.acceptance:
                self.acceptance[name].load_state_dict(acceptance)
