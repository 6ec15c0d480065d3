"""Which drafter to ask, before every step: the one whose steps emit most tokens per second, or none.

An arm is a drafter, a neural drafter together with a textual one, or plain decoding. At batches of a size that is new, the arm
is taken that promises most: rows · (1 + Σ P(accept ≥ i)) / (draft(K) + verify(K + 1)), at its best K, from the acceptance by
depth that it has shown at any size and from measured seconds. Promises are checked by trials: now and then another arm takes
every second step for a while, and takes over if those steps emitted more per second than the ones between them, which had
the same rows and the same disturbances. An arm that loses waits longer for its next trial.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from atlas_rl.control.acceptance import MAX_DEPTH, PRIOR_TOKENS, UPDATE_DECAY, Acceptance
from atlas_rl.control.arms import PLAIN, Arm
from atlas_rl.control.contest import FIRST_WAIT, LONGEST_WAIT, PLAIN_BONUS, Contest, Rest, Trial, Waiting, size_of
from atlas_rl.control.cost_model import DraftCost, FixedStepCost, StepCost
from atlas_rl.control.parts import Parts

PROMISING = 0.95
"""An arm that promises less than this share of the best one's rate (with its bonus, if that is plain decoding) is passed over."""
MOST_PASSES = LONGEST_WAIT // FIRST_WAIT
"""Times in a row that it is: what it promises comes from drafts that may be long ago, and only new ones can tell."""
IMPROVED = 1.1
"""Tokens per step on held-out completions over those that drafts have shown, from which on a drafter is taken for a new one."""
RATE_DECAY = 0.9
DEPTHS = (1, 2, 3, 4, 6, 8)
"""Lookaheads of arms that draft within captured steps: each is captured by itself."""


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
        self.parts = Parts()

    # ---- before a step ---------------------------------------------------------------------------------------------------

    def choose(self, num_rows: int, num_cached: int = 0) -> Arm:
        """The arm for a step over so many rows, which have so many cached tokens in all."""
        if self.deterministic:
            return self._most_promising(num_rows, num_cached)
        contest = self._contest(num_rows, num_cached)
        if self.benched and (
            self.benched.intersection(contest.best) or contest.trial and self._is_out(contest.trial.arm)
        ):
            contest.best, contest.trial = self._most_promising(num_rows, num_cached), None
        if contest.trial is None and contest.step >= contest.next_trial:
            contest.begin(self._next_trial(contest, num_rows, num_cached))
        if contest.trial is not None and len(contest.trial.rates) <= len(contest.trial.rates_of_best):
            return contest.trial.arm
        return contest.best

    def rest(self, num_rows: int) -> Rest | None:
        """After `choose`: for how long plain steps go without saying, if they do."""
        rest = Rest(size_of(num_rows), self.contests.get(size_of(num_rows)))
        return rest if rest.lasts(num_rows) else None

    def predicted_rate(self, arm: Arm, num_rows: int, num_cached: int = 0) -> float:
        """Tokens per row and second, at the best lookahead."""
        rates = self._rates(arm, num_rows, num_cached)
        if rates is None:
            return 1.0 if arm == PLAIN else 1.0 - 0.01 * len(arm)  # nothing is known: plain steps are measured first
        return float(rates[0] if arm == PLAIN else rates[1:].max())

    def best_depth(self, arm: Arm, num_rows: int, num_cached: int = 0) -> int:
        """The lookahead, of those that steps are captured for, at which an arm emits most per second."""
        rates = self._rates(arm, num_rows, num_cached)
        return DEPTHS[1] if rates is None else max(DEPTHS, key=rates.__getitem__)

    def _rates(self, arm: Arm, num_rows: int, num_cached: int) -> np.ndarray | None:
        """[1 + MAX_DEPTH] tokens per row and second by lookahead; None before any step was measured."""
        depths = np.arange(MAX_DEPTH + 1)
        seconds = self.step_cost.seconds(num_rows * (depths + 1), num_cached)
        if seconds is None:
            return None
        if arm == PLAIN:
            return 1 / seconds
        survival = np.max([self.acceptance[name].survival_K for name in arm], axis=0)
        draft = sum(self._draft_seconds(name, depths, num_rows, float(seconds[0])) for name in arm)
        return np.concatenate([[1.0], 1 + survival.cumsum()]) / (draft + seconds)

    def min_prob(self, arm: Arm, num_rows: int, num_cached: int = 0) -> float:
        """Probability of being accepted from which on a draft token pays for being guessed and verified: its share of a longer
        step, at the rate at which the arm emits tokens."""
        contest = None if self.deterministic else self._contest(num_rows, num_cached)
        if contest is not None and arm in contest.min_probs:
            return contest.min_probs[arm]
        cost = self.step_cost.seconds(num_rows * np.arange(1, 5), num_cached)
        if cost is None:
            return 0.1
        depths = np.arange(1, 5)
        cost = cost + sum(self._draft_seconds(name, depths, num_rows, float(cost[0])) for name in arm)
        seconds_per_token = float(cost[3] - cost[0]) / (3 * num_rows)
        known = contest is not None and arm == contest.best and contest.rate is not None
        rate = num_rows * (contest.rate if known else self.predicted_rate(arm, num_rows, num_cached))
        min_prob = min(0.9, max(0.05, seconds_per_token * rate))
        if contest is not None:
            contest.min_probs[arm] = min_prob
        return min_prob

    # ---- after a step ----------------------------------------------------------------------------------------------------

    def record(self, arm: Arm, num_rows: int, seconds: float, tokens_per_row: float) -> None:
        """A step of this arm took `seconds`, drafting included, and emitted so many tokens per row."""
        if self.deterministic:
            return
        contest = self._contest(num_rows)
        contest.step += 1
        rate = tokens_per_row / seconds
        if arm == contest.best:
            contest.rate = rate if contest.rate is None else RATE_DECAY * contest.rate + (1 - RATE_DECAY) * rate
        contest.record(arm, rate)

    def record_drafts(self, name: str, num_drafted: np.ndarray, num_accepted: np.ndarray) -> None:
        """Of one drafter's verified draft tokens [R], how many were right [R]."""
        self.acceptance[name].record(num_drafted, num_accepted)

    def record_draft_seconds(self, name: str, num_rows: int, depth: int, seconds: float) -> None:
        self.draft_cost[name].record(num_rows, depth, seconds)

    def policy_updated(self) -> None:
        """What drafters have shown counts for less."""
        for acceptance in self.acceptance.values():
            acceptance.fade(UPDATE_DECAY)
        for contest in self.contests.values():
            contest.min_probs.clear()

    def improved(self, name: str, tokens_per_step: float, lookahead: int) -> None:
        """A drafter has been retrained, and emits so many tokens per step now. If that is far more than its drafts have shown, it
        is taken for a new one: while it is not asked they can show nothing."""
        shown = self.acceptance[name]
        if shown.total_K[0] <= PRIOR_TOKENS or tokens_per_step < IMPROVED * shown.tokens_per_step(lookahead):
            return
        self.acceptance[name] = Acceptance()
        for contest in self.contests.values():
            for arm in contest.waiting:
                if name in arm:
                    contest.waiting[arm] = Waiting(until=contest.step)

    # ---- after a rollout -------------------------------------------------------------------------------------------------

    def shares_of_parts(self) -> dict[str, float]:
        """Decode seconds of the rollout that is over with each drafter alone, as far as they have shown what they can, over those
        of plain decoding. Empty where nothing is timed."""
        is_timed = not self.deterministic and self.step_cost.seconds(1) is not None
        tried = {name for arm, _ in self.parts.steps for name in arm}
        tried |= {name for name, acceptance in self.acceptance.items() if acceptance.total_K[0] > PRIOR_TOKENS}
        return self.parts.close(sorted(tried - self.benched) if is_timed else [], self.predicted_rate)

    # ---- the contest -----------------------------------------------------------------------------------------------------

    def _contest(self, num_rows: int, num_cached: int = 0) -> Contest:
        size = size_of(num_rows)
        if size not in self.contests:
            self.contests[size] = Contest(self._most_promising(num_rows, num_cached))
        return self.contests[size]

    def _is_out(self, arm: Arm) -> bool:
        return bool(self.benched.intersection(arm))

    def _most_promising(self, num_rows: int, num_cached: int) -> Arm:
        arms = [arm for arm in self.arms if not self._is_out(arm)] or [PLAIN]
        bonus = 1.0 if self.deterministic else PLAIN_BONUS
        return max(
            arms,
            key=lambda arm: self.predicted_rate(arm, num_rows, num_cached) * (bonus if arm == PLAIN else 1.0),
        )

    def _next_trial(self, contest: Contest, num_rows: int, num_cached: int) -> Trial | None:
        """Of the arms whose wait is over, the most promising one, if it may win.

        Two drafters together cost more than either, and are tried where one of them is the best."""
        due = [
            arm
            for arm in self.arms
            if arm != contest.best
            and not self._is_out(arm)
            and (len(arm) < 2 or bool(set(arm).intersection(contest.best)) or not self._has_alone(arm))
            and contest.waits(arm).until <= contest.step
        ]
        if not due:
            return None
        of_best = self.predicted_rate(contest.best, num_rows, num_cached)
        promises = {arm: self.predicted_rate(arm, num_rows, num_cached) / of_best for arm in due}
        arm = max(due, key=lambda arm: promises[arm] * contest.waits(arm).kept)
        needed, waiting = PROMISING * (PLAIN_BONUS if contest.best == PLAIN else 1.0), contest.waits(arm)
        if arm != PLAIN and promises[arm] < needed and waiting.num_passes < MOST_PASSES:
            waiting.until = contest.step + FIRST_WAIT
            waiting.num_passes += 1
            return Trial(PLAIN) if PLAIN in due else None
        waiting.num_passes = 0
        return Trial(arm, promises[arm])

    def _has_alone(self, arm: Arm) -> bool:
        """Whether one of its drafters is an arm by itself as well."""
        return any((name,) in self.arms for name in arm)

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
