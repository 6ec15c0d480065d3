"""How far a drafter's own estimates can be believed."""

from __future__ import annotations

PRIOR_TOKENS = 8.0
"""Weight of the belief, before any evidence, that a drafter estimates well."""
DECAY = 0.98
"""Per verify step with drafts: about the last 50 of them count."""
IDLE_DECAY = 0.999
"""Per step without: a benched estimate is tried again after some hundred steps."""


class Trust:
    """Accepted over expected draft tokens, decayed: the factor between what a drafter promises and what it keeps."""

    def __init__(self) -> None:
        self.accepted = 0.0
        self.expected = 0.0

    @property
    def factor(self) -> float:
        return min(1.0, (self.accepted + PRIOR_TOKENS) / (self.expected + PRIOR_TOKENS))

    def record(self, num_accepted: float, num_expected: float) -> None:
        self.accepted = self.accepted * DECAY + num_accepted
        self.expected = self.expected * DECAY + num_expected

    def idle(self) -> None:
        self.accepted *= IDLE_DECAY
        self.expected *= IDLE_DECAY
