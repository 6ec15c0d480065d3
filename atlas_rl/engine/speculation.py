"""The engine's side of speculation: asks a drafter, decides what to verify, keeps its counts, benches it when it fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from atlas_rl.control.lookahead import choose_draft_lens
from atlas_rl.control.trust import Trust
from atlas_rl.drafters.base import Draft, Drafter
from atlas_rl.engine.scheduler import Scheduler
from atlas_rl.engine.sequence import Sequence
from atlas_rl.telemetry.stats import DrafterStats, RolloutStats

logger = logging.getLogger(__name__)

MAX_DRAFT_LEN = 16
"""Longest draft asked for when the lookahead is automatic."""
PATIENCE = 4
"""Steps in a row in which no draft was worth verifying before the drafter is asked less often."""
MAX_REST = 64
"""Steps that pass without asking at most."""


class Speculator:
    """Wraps one drafter, or none. Its methods never raise for a drafter's fault: the rollout goes on without it."""

    def __init__(
        self,
        drafter: Drafter | None,
        *,
        lookahead: int | None,
        step_seconds: Callable[[int], float | None],
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
        self.num_useless = 0
        """Proposals in a row of which nothing was worth verifying."""
        self.rest = 0
        """Steps still to pass before the drafter is asked again."""
        self.has_backlog = False
        """Whether rows have emitted tokens that the drafter has not been told of, because it rests."""

    def admit(self, sequences: list[Sequence]) -> None:
        if sequences:
            self._call("admit", sequences)

    def release(self, sequences: list[Sequence], finished: bool) -> None:
        if sequences:
            self._call("release", sequences, finished)
            self.rest = 0  # a smaller batch makes drafts cheaper: ask again

    def policy_updated(self) -> None:
        self._call("policy_updated")

    def draft(self, scheduler: Scheduler, stats: RolloutStats) -> list[list[int]]:
        """Draft tokens to verify for each running sequence, with blocks reserved for them."""
        sequences = scheduler.running
        nothing: list[list[int]] = [[] for _ in sequences]
        self.expected = 0.0
        if self.drafter is None:
            return nothing
        if self.rest:
            self.rest -= 1
            return nothing
        start = time.perf_counter()
        longest = MAX_DRAFT_LEN if self.lookahead is None else self.lookahead
        # a row's last token needs no draft after it: K drafts emit up to K + 1 tokens
        max_lens = [min(longest, seq.num_remaining - 1) for seq in sequences]
        if self.has_backlog:
            nobody = [0] * len(sequences)
            self._call("observe", sequences, nobody, nobody)
            self.has_backlog = False
        drafts = self._call("propose", sequences, max_lens)
        drafts = None if drafts is None else self._checked(drafts, max_lens)
        if drafts is None:
            return nothing
        if self.lookahead is not None:
            lens = [len(draft.token_ids) for draft in drafts]
        else:
            factor = self.trust.factor
            probs = [[p * factor for p in draft.probs] for draft in drafts]
            cost = self.draft_seconds if self.count_draft_seconds else 0.0
            lens = choose_draft_lens(probs, self.step_seconds, cost)
            self.num_useless = 0 if any(lens) else self.num_useless + 1
            self.rest = min(MAX_REST, max(0, self.num_useless - PATIENCE))
        chosen = [
            draft.token_ids[: scheduler.reserve_draft(seq, length)] if length else []
            for seq, draft, length in zip(sequences, drafts, lens, strict=True)
        ]
        self.expected = sum(sum(draft.probs[: len(tokens)]) for draft, tokens in zip(drafts, chosen, strict=True))
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
        if self.rest:  # what is emitted meanwhile is told in one go, before a row leaves or drafts are asked for again
            self.has_backlog = True
            sequences = [seq for seq in sequences if seq.finish_reason is not None]
            num_drafted = num_accepted = [0] * len(sequences)
        if sequences:
            self._call("observe", sequences, num_drafted, num_accepted)
        self._count_seconds(start, stats)
        self.draft_seconds *= 0.95

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

    def _checked(self, drafts: list[Draft], max_lens: list[int]) -> list[Draft] | None:
        """The drafts, cut to their limits; a drafter that proposes nonsense is benched."""
        fault = None
        if len(drafts) != len(max_lens):
            fault = f"{len(drafts)} drafts for {len(max_lens)} rows"
        cut = [Draft(d.token_ids[:n], d.probs[:n]) for d, n in zip(drafts, max_lens)]
        for token_ids, probs in cut:
            if len(token_ids) != len(probs):
                fault = f"{len(token_ids)} tokens with {len(probs)} probabilities"
            elif not all(0 <= token < self.vocab_size for token in token_ids):
                fault = f"a token id outside the vocabulary: {token_ids}"
            elif not all(0 <= p <= 1 for p in probs):
                fault = f"a probability outside [0, 1]: {probs}"
        if fault is not None:
            self._bench(f"it proposed {fault}")
            return None
        return cut

    def _bench(self, reason: str) -> None:
        logger.warning("drafter %s is benched, decoding goes on without it: %s", self.drafter.name, reason)
        self.drafter = None
