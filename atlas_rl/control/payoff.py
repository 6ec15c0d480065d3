"""Whether asking a drafter pays, from what steps with and without it have really emitted per second."""

from __future__ import annotations

from dataclasses import dataclass, field

MIN_STEPS = 4
"""Steps of either kind before they are compared."""
DECAY = 0.9
"""Per step of a kind: about the last ten count."""
MIN_PAYOFF = 1.02
OUTLIER = 3.0
"""A step longer than this many average ones is cut to it: the machine was busy with something else."""
FIRST_WAIT, LONGEST_WAIT = 8, 128
"""Steps without the drafter before it gets another chance; doubled each time that it loses."""


@dataclass(slots=True)
class Tally:
    steps: float = 0.0
    seconds: float = 0.0
    tokens: float = 0.0

    def add(self, seconds: float, tokens: float) -> None:
        if self.steps >= MIN_STEPS:
            seconds = min(seconds, OUTLIER * self.seconds / self.steps)
        self.steps = DECAY * self.steps + 1
        self.seconds = DECAY * self.seconds + seconds
        self.tokens = DECAY * self.tokens + tokens


@dataclass(slots=True)
class Contest:
    """Between the two kinds of steps, at batches of about one size."""

    plain: Tally = field(default_factory=Tally)
    asked: Tally = field(default_factory=Tally)
    wait: int = 0
    next_wait: int = FIRST_WAIT


class Payoff:
    """Estimates may be off for a whole size of batch, and promises kept may still not pay: this counts nothing but seconds and
    tokens, and so bounds what a drafter can cost."""

    def __init__(self) -> None:
        self.contests: dict[int, Contest] = {}

    def should_ask(self, num_rows: int) -> bool:
        """Call once per step."""
        contest = self._contest(num_rows)
        if contest.plain.steps < MIN_STEPS - 1:  # decayed, four steps count as 3.4
            return False
        if contest.wait:
            contest.wait -= 1
            return False
        return True

    def record(self, num_rows: int, asked: bool, seconds: float, tokens: float) -> None:
        """A step took `seconds`, the drafter's included, and emitted so many tokens per row."""
        contest = self._contest(num_rows)
        (contest.asked if asked else contest.plain).add(seconds, tokens)
        if not asked or contest.asked.steps < MIN_STEPS - 1:
            return
        with_drafts, without = (tally.tokens / tally.seconds for tally in (contest.asked, contest.plain))
        if with_drafts > MIN_PAYOFF * without:
            contest.next_wait = FIRST_WAIT
        else:
            contest.wait, contest.next_wait = contest.next_wait, min(LONGEST_WAIT, 2 * contest.next_wait)
            contest.asked = Tally()

    def _contest(self, num_rows: int) -> Contest:
        return self.contests.setdefault((num_rows - 1).bit_length(), Contest())
