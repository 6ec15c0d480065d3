"""The engine's side of speculation: asks a drafter, decides what to verify, keeps its counts, benches it when it fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from atlas_rl.control.lookahead import choose_draft_lens
from atlas_rl.control.payoff import Payoff
from atlas_rl.control.trust import Trust
from atlas_rl.drafters.base import Drafter, Drafts
from atlas_rl.engine.scheduler import Scheduler
from atlas_rl.engine.sequence import Sequence
from atlas_rl.telemetry.stats import DrafterStats, RolloutStats

logger = logging.getLogger(__name__)

MAX_DRAFT_LEN = 16
"""Longest draft asked for when the lookahead is automatic."""


class Speculator:
    """Wraps one drafter, or none. Its methods never raise for a drafter's fault: the rollout goes on without it."""

    def __init__(
        self,
        drafter: Drafter | None,
        *,
        lookahead: int | None,
        step_seconds: Callable[[np.ndarray, int], np.ndarray | None],
        vocab_size: int,
        count_draft_seconds: bool = True,
    ) -> None:
        self.drafter = drafter
        self.lookahead = lookahead
        self.step_seconds = step_seconds
        self.vocab_size = vocab_size
        self.count_draft_seconds = count_draft_seconds
        self.trust = Trust()
        self.draft_seconds = 0.0
        """Decayed seconds that proposing and observing cost per step."""
        self.expected = 0.0
        """Accepted tokens that the current step's drafts promise."""
        self.payoff = Payoff()
        self.asked = False
        """Whether the drafter is asked in the current step."""
        self.has_backlog = False
        """Whether rows have emitted tokens that the drafter has not been told of, because it is not asked."""

    @property
    def follows_clocks(self) -> bool:
        return self.lookahead is None and self.count_draft_seconds

    def admit(self, sequences: list[Sequence]) -> None:
        if sequences:
            self._call("admit", sequences)

    def release(self, sequences: list[Sequence], finished: bool) -> None:
        if sequences:
            self._call("release", sequences, finished)

    def policy_updated(self) -> None:
        self._call("policy_updated")

    def draft(self, scheduler: Scheduler, stats: RolloutStats) -> list[list[int]]:
        """Draft tokens to verify for each running sequence, with blocks reserved for them."""
        sequences = scheduler.running
        nothing: list[list[int]] = [[] for _ in sequences]
        self.expected = 0.0
        if self.drafter is None:
            return nothing
        self.asked = not self.follows_clocks or self.payoff.should_ask(len(sequences))
        if not self.asked:
            return nothing
        start = time.perf_counter()
        longest = MAX_DRAFT_LEN if self.lookahead is None else self.lookahead
        # a row's last token needs no draft after it: K drafts emit up to K + 1 tokens
        max_lens = np.minimum(longest, np.array([seq.num_remaining for seq in sequences]) - 1)
        if not max_lens.any():
            return nothing
        if self.has_backlog:
            nobody = [0] * len(sequences)
            self._call("observe", sequences, nobody, nobody)
            self.has_backlog = False
        drafts = self._call("propose", sequences, max_lens)
        drafts = None if drafts is None else self._checked(drafts, max_lens)
        if drafts is None:
            return nothing
        if self.lookahead is not None:
            lens = drafts.lens
        else:
            cost = self.draft_seconds if self.count_draft_seconds else 0.0
            num_cached = sum(seq.num_computed for seq in sequences)
            lens = choose_draft_lens(
                drafts.probs * self.trust.factor, lambda num_tokens: self.step_seconds(num_tokens, num_cached), cost
            )
        chosen = nothing
        for row in np.flatnonzero(lens).tolist():
            fitting = scheduler.reserve_draft(sequences[row], int(lens[row]))
            chosen[row] = drafts.token_ids[row, :fitting].tolist()
            self.expected += float(drafts.probs[row, :fitting].sum())
        self._count_seconds(start, stats)
        return chosen

    def observe(
        self, sequences: list[Sequence], num_drafted: list[int], num_accepted: list[int], stats: RolloutStats
    ) -> None:
        """Report a step to the drafter and count its drafts."""
        if self.drafter is None:
            return
        start = time.perf_counter()
        total_drafted = sum(num_drafted)
        if total_drafted:
            self.trust.record(sum(num_accepted), self.expected)
            self._count(num_drafted, num_accepted, total_drafted, stats)
        else:
            self.trust.idle()
        if (
            not self.asked
        ):  # what is emitted meanwhile is told in one go, before a row leaves or drafts are asked for again
            self.has_backlog = True
            sequences = [seq for seq in sequences if seq.finish_reason is not None]
            num_drafted = num_accepted = [0] * len(sequences)
        if sequences:
            self._call("observe", sequences, num_drafted, num_accepted)
        self._count_seconds(start, stats)
        self.draft_seconds *= 0.95

    def settle(self, num_rows: int, seconds: float, tokens_per_row: float) -> None:
        """A step is over, drafting and observing included."""
        if self.drafter is not None and self.follows_clocks:
            self.payoff.record(num_rows, self.asked, seconds, tokens_per_row)

    def _count(self, num_drafted: list[int], num_accepted: list[int], total_drafted: int, stats: RolloutStats) -> None:
        depths = range(max(num_drafted))
        stats.add_depths(
            [sum(n > depth for n in num_drafted) for depth in depths],
            [sum(n > depth for n in num_accepted) for depth in depths],
        )
        counts = stats.drafters.setdefault(self.drafter.name, DrafterStats())
        counts.steps += 1
        counts.proposed += total_drafted
        counts.accepted += sum(num_accepted)

    def _count_seconds(self, start: float, stats: RolloutStats) -> None:
        seconds = time.perf_counter() - start
        stats.seconds["draft"] += seconds
        self.draft_seconds += 0.05 * seconds

    def _call(self, method: str, *args: Any) -> Any:
        if self.drafter is None:
            return None
        try:
            return getattr(self.drafter, method)(*args)
        except Exception as error:  # a drafter is never worth a rollout
            self._bench(f"{method} raised {type(error).__name__}: {error}")
            return None

    def _checked(self, drafts: Drafts, max_lens: np.ndarray) -> Drafts | None:
        """The drafts, cut to their limits; a drafter that proposes nonsense is benched."""
        token_ids, probs = drafts
        if not (token_ids.shape == probs.shape and token_ids.ndim == 2 and len(token_ids) == len(max_lens)):
            fault = f"drafts of shape {token_ids.shape} with probabilities of {probs.shape} for {len(max_lens)} rows"
        elif not ((probs >= 0) & (probs <= 1)).all():
            fault = "a probability outside [0, 1]"
        elif not ((token_ids >= 0) & (token_ids < self.vocab_size)).all():
            fault = f"a token id outside the vocabulary: {token_ids.min()} … {token_ids.max()}"
        else:
            return Drafts(token_ids, np.where(np.arange(probs.shape[1]) < max_lens[:, None], probs, 0.0))
        self._bench(f"it proposed {fault}")
        return None

    def _bench(self, reason: str) -> None:
        logger.warning("drafter %s is benched, decoding goes on without it: %s", self.drafter.name, reason)
        self.drafter = None
