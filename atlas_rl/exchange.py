"""Which rank decodes which completions, so that none waits long for the others; results return to their owners.

A *unit* is what moves: all samples of one prompt that a rank was given (its prompt is prefilled once, its blocks are shared). A
completion is a function of its prompt and its seed, which travel together: where it is decoded does not show in it.

    work = describe(requests, history)            # into the caller's meeting
    plan = make_plan(ranks.rank, told, requests)  # what all ranks told there
    here = send(ranks, plan)                      # what to decode on this rank
    mine = give_back(ranks, plan, decoded)        # after another meeting: the completions of `requests`, in their order

Where nothing moves on any rank, the last two do not communicate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from atlas_rl.balance import assign, idle_share
from atlas_rl.lengths import LengthHistory
from atlas_rl.ranks import Ranks
from atlas_rl.types import Rollout, RolloutRequest

PREFILL_RATIO = 8
"""Prompt tokens that cost about as much as one decoded: prefill is bound by arithmetic, decoding by memory. A rough figure, of
weight only where prompts are many times as long as completions."""
FINISH_REASONS = ("stop", "length")


def describe(requests: Sequence[RolloutRequest], history: LengthHistory) -> np.ndarray:
    """This rank's units for the others, [2, units]: number of samples, and expected work in tokens.

    Work is the plain sum of tokens. A rank also needs as many steps as its longest completion has tokens; but in simulations
    (lognormal lengths, 2-64 ranks, a step as dear as 0-256 of its rows) a weight for the longest gained 2 % at best and lost up
    to 30 %: which completion is the longest is mostly chance, while sums can be foreseen.
    """
    units = _units(requests)
    rows = []
    for (prompt, members), expected in zip(units.items(), history.expected(units), strict=True):
        tokens = sum(min(expected, requests[i].max_new_tokens) for i in members)
        rows.append((len(members), round(tokens) + len(prompt) // PREFILL_RATIO))
    return np.array(rows, dtype=np.int64).reshape(-1, 2).T


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where all ranks' units are decoded. All but the first two fields are the same on all ranks."""

    rank: int
    requests: Sequence[RolloutRequest]
    """This rank's own."""
    samples: list[np.ndarray]
    """By owner, the number of samples of each of its units."""
    work: list[np.ndarray]
    """By owner, the expected work of each of its units."""
    destinations: list[np.ndarray]
    """By owner, the rank that decodes each of its units."""

    @cached_property
    def moved_units(self) -> int:
        """Of all ranks, as the other figures."""
        return sum(int((to != owner).sum()) for owner, to in enumerate(self.destinations))

    @cached_property
    def moved_samples(self) -> int:
        return sum(int(n[to != r].sum()) for r, (n, to) in enumerate(zip(self.samples, self.destinations)))

    @property
    def idle_before(self) -> float:
        """Share of the ranks' time that they were expected to wait for the busiest one, had nothing moved."""
        return idle_share(np.array([work.sum() for work in self.work]))

    @property
    def idle_after(self) -> float:
        loads = np.zeros(len(self.work), dtype=np.int64)
        np.add.at(loads, np.concatenate(self.destinations), np.concatenate(self.work))
        return idle_share(loads)

    @cached_property
    def members(self) -> list[list[int]]:
        """By rank, which of this rank's requests it decodes: unit by unit, those kept in the caller's order."""
        by_rank: list[list[int]] = [[] for _ in self.work]
        for unit, to in zip(_units(self.requests).values(), self.destinations[self.rank].tolist(), strict=True):
            by_rank[to] += unit
        by_rank[self.rank].sort()
        return by_rank

    def num_from(self, owner: int) -> int:
        """How many completions of an owner are decoded here."""
        return int(self.samples[owner][self.destinations[owner] == self.rank].sum())


def make_plan(rank: int, told: Sequence[np.ndarray], requests: Sequence[RolloutRequest]) -> Plan:
    """What follows from all ranks' descriptions, by rank: the same everywhere, as they are integers."""
    samples, work = [of_one[0] for of_one in told], [of_one[1] for of_one in told]
    return Plan(rank=rank, requests=requests, samples=samples, work=work, destinations=assign(work))


def send(ranks: Ranks, plan: Plan) -> list[RolloutRequest]:
    """The requests to decode here: own ones that stay, in their order, then those received, owner by owner."""
    if not plan.moved_units:
        return list(plan.requests)
    to_each = [[plan.requests[i] for i in members] for members in plan.members]
    kept, to_each[plan.rank] = to_each[plan.rank], []
    received = ranks.exchange([_pack_requests(requests) for requests in to_each])
    return kept + [request for vector in received for request in _unpack_requests(vector)]


def give_back(ranks: Ranks, plan: Plan, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The completions of the caller's own requests, in their order, for those of what `send` returned."""
    if not plan.moved_units:
        return list(rollouts)
    decoded = iter(rollouts)
    kept = [next(decoded) for _ in plan.members[plan.rank]]
    to_each = [
        [] if owner == plan.rank else [next(decoded) for _ in range(plan.num_from(owner))]
        for owner in range(ranks.size)
    ]
    received = ranks.exchange([_pack_rollouts(of_one) for of_one in to_each])
    own = dict(zip(plan.members[plan.rank], kept, strict=True))
    for members, vector in zip(plan.members, received):
        if len(vector):
            own |= zip(members, _unpack_rollouts(vector, [plan.requests[i] for i in members]), strict=True)
    return [own[i] for i in range(len(plan.requests))]


def _units(requests: Sequence[RolloutRequest]) -> dict[tuple[int, ...], list[int]]:
    """By distinct prompt (itself, no hash of it), the places of its samples."""
    units: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        units.setdefault(request.prompt_ids, []).append(i)
    return units


# ---- as int64 vectors ----------------------------------------------------------------------------------------------------


def _pack_requests(requests: Sequence[RolloutRequest]) -> np.ndarray:
    """Unit by unit: length of the prompt, number of samples; the prompt, the seeds, the limits."""
    vector: list[int] = []
    for prompt, members in _units(requests).items():
        vector += (len(prompt), len(members), *prompt)
        vector += [requests[i].seed for i in members] + [requests[i].max_new_tokens for i in members]
    return np.array(vector, dtype=np.int64)


def _unpack_requests(vector: np.ndarray) -> Iterator[RolloutRequest]:
    start = 0
    while start < len(vector):
        len_prompt, num = vector[start : start + 2].tolist()
        prompt, seeds, limits, _ = np.split(vector[start + 2 :], np.cumsum([len_prompt, num, num]))
        prompt_ids = tuple(prompt.tolist())
        for seed, limit in zip(seeds.tolist(), limits.tolist()):
            yield RolloutRequest(prompt_ids=prompt_ids, seed=seed, max_new_tokens=limit)
        start += 2 + len_prompt + 2 * num


def _pack_rollouts(rollouts: Sequence[Rollout]) -> np.ndarray:
    """One by one: number of tokens, reason; the tokens, the bits of the log-probs."""
    parts = [np.zeros(0, dtype=np.int64)]
    for rollout in rollouts:
        head = [len(rollout.token_ids), FINISH_REASONS.index(rollout.finish_reason), *rollout.token_ids]
        parts += [np.array(head, dtype=np.int64), np.array(rollout.logprobs, dtype=np.float64).view(np.int64)]
    return np.concatenate(parts)


def _unpack_rollouts(vector: np.ndarray, requests: Sequence[RolloutRequest]) -> Iterator[Rollout]:
    start = 0
    for request in requests:
        num, reason = vector[start : start + 2].tolist()
        tokens, bits, _ = np.split(vector[start + 2 :], [num, 2 * num])
        yield Rollout(
            prompt_ids=list(request.prompt_ids),
            token_ids=tokens.tolist(),
            logprobs=bits.view(np.float64).tolist(),
            finish_reason=FINISH_REASONS[reason],
        )
        start += 2 + 2 * num
