"""Who decodes what, and that everything returns to whom it belongs."""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import ThreadRanks, run_ranks

from atlas_rl.balance import MIN_GAIN, assign
from atlas_rl.exchange import Plan, describe, give_back, make_plan, send
from atlas_rl.lengths import LengthHistory, outcome
from atlas_rl.ranks import Ranks
from atlas_rl.types import Rollout, RolloutRequest

INT64 = st.integers(-(2**63), 2**63 - 1)
REQUESTS = st.lists(  # a few prompts, so that samples of one are met often, in any order
    st.builds(
        RolloutRequest,
        prompt_ids=st.sampled_from([(1,), (1, 2), (9,) * 50, (0,), (2**31, 5)]),
        seed=INT64,
        max_new_tokens=st.integers(1, 40),
    ),
    max_size=8,
)
WORK = st.lists(st.lists(st.integers(0, 10_000), max_size=8).map(lambda w: np.array(w, dtype=np.int64)), min_size=1)


def decode(request: RolloutRequest) -> Rollout:
    """Any function of the request alone; log-probs of any bits."""
    length = 1 + request.seed % request.max_new_tokens
    bits = [struct.unpack("<d", struct.pack("<q", (request.seed >> 8) + i))[0] for i in range(length)]
    return Rollout(
        prompt_ids=list(request.prompt_ids),
        token_ids=[(request.seed + i) % 50_000 for i in range(length)],
        logprobs=[0.0 if value != value else value for value in bits],  # NaN is unequal to itself
        finish_reason="length" if length == request.max_new_tokens else "stop",
    )


def made_requests(*num_samples: int, max_new_tokens: int = 100, first: int = 0) -> list[RolloutRequest]:
    return [
        RolloutRequest(prompt_ids=(first + u,), seed=1000 * (first + u) + i, max_new_tokens=max_new_tokens)
        for u, num in enumerate(num_samples)
        for i in range(num)
    ]


def planned(ranks: Ranks, requests: list[RolloutRequest], history: LengthHistory) -> Plan:
    return make_plan(ranks.rank, ranks.meet("plan", describe(requests, history)), requests)


def busiest(work: list[np.ndarray], destinations: list[np.ndarray]) -> int:
    loads = np.zeros(len(work), dtype=np.int64)
    np.add.at(loads, np.concatenate(destinations), np.concatenate(work))
    return loads.max()


@given(st.lists(REQUESTS, min_size=2, max_size=5), st.data())
@settings(deadline=None, max_examples=60)
def test_wherever_decoded_once_and_returned_in_order(requests_of, data):
    """Under any plan: ranks without requests, that give all away, that receive all."""

    def destinations_of(requests: list[RolloutRequest]) -> np.ndarray:
        num_units = len({r.prompt_ids for r in requests})
        to = st.lists(st.integers(0, len(requests_of) - 1), min_size=num_units, max_size=num_units)
        return np.array(data.draw(to), dtype=np.int64)

    destinations = [destinations_of(requests) for requests in requests_of]

    def work(ranks: ThreadRanks):
        own = requests_of[ranks.rank]
        plan = replace(planned(ranks, own, LengthHistory()), destinations=destinations)
        here = send(ranks, plan)
        mine = give_back(ranks, plan, [decode(request) for request in here])
        assert ranks.num_transfers == (2 if plan.moved_units else 0)
        return here, mine

    results = run_ranks(len(requests_of), work)
    assert [mine for _, mine in results] == [[decode(r) for r in requests] for requests in requests_of]
    everything = Counter(r for requests in requests_of for r in requests)
    assert Counter(r for here, _ in results for r in here) == everything
    for rank, (here, _) in enumerate(results):  # units are whole, and what a rank keeps stays in its order
        homes = [destinations[rank][u] for u in range(len(destinations[rank]))]
        prompts = list(dict.fromkeys(r.prompt_ids for r in requests_of[rank]))
        kept = [r for r in requests_of[rank] if homes[prompts.index(r.prompt_ids)] == rank]
        assert here[: len(kept)] == kept


@given(WORK)
@settings(deadline=None)
def test_no_rank_is_given_more_than_the_busiest_had(work):
    stay = [np.full(len(of_one), rank) for rank, of_one in enumerate(work)]
    to = assign(work)
    assert [len(of_one) for of_one in to] == [len(of_one) for of_one in work]
    before, after = busiest(work, stay), busiest(work, to)
    moves = any((a != b).any() for a, b in zip(to, stay))
    assert after <= (1 - MIN_GAIN) * before if moves else after == before
    again = assign([of_one.copy() for of_one in work])
    assert all((a == b).all() for a, b in zip(to, again))


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        ([[5, 5], [5, 5]], [[0, 0], [1, 1]]),
        ([[10, 10, 10, 10], []], [[1, 1, 0, 0], []]),
        ([[9, 1], [4, 4]], [[0, 1], [1, 1]]),  # 10 and 8 become 9 and 9
        ([[100, 2], [99]], [[0, 0], [1]]),  # not worth it
        ([[30, 20], [10, 10]], [[0, 1], [1, 1]]),  # a swap of 30 and 10 would do no better
        ([[30, 29], [20, 19]], [[1, 0], [0, 1]]),  # here one does
        ([[100], [1]], [[0], [1]]),  # what is whole cannot be evened out
        ([[], []], [[], []]),
    ],
)
def test_what_moves(work, expected):
    to = assign([np.array(of_one, dtype=np.int64) for of_one in work])
    assert [of_one.tolist() for of_one in to] == expected


def test_rollouts_of_a_run_become_even():
    """Rank 0 has the long prompts: once that is known they spread, and every rank plans the same."""
    lens = {(u,): 90 if u < 4 else 10 for u in range(12)}

    def work(ranks: ThreadRanks):
        history, seen = LengthHistory(), []
        for _ in range(3):
            own = made_requests(4, 4, 4, 4, first=4 * ranks.rank)
            plan = planned(ranks, own, history)
            here = [
                Rollout(prompt_ids=list(p), token_ids=[1] * lens[p], logprobs=[-1.0] * lens[p], finish_reason="stop")
                for p in (r.prompt_ids for r in send(ranks, plan))
            ]
            history.record_all(ranks.meet("results", outcome(here)))
            assert [tuple(r.prompt_ids) for r in give_back(ranks, plan, here)] == [r.prompt_ids for r in own]
            to = [of_one.tolist() for of_one in plan.destinations]
            seen.append((to, plan.moved_units, plan.moved_samples, plan.idle_before, plan.idle_after))
        return seen, history.by_prompt, history.overall

    first, *others = run_ranks(3, work)
    assert others == [first, first]
    (_, moved, samples, before, after), *later = first[0]
    assert (moved, samples, before, after) == (0, 0, 0, 0)
    for _, moved, samples, before, after in later:
        assert samples == 4 * moved > 0 and before > 0.4 > 0.2 > after


def test_unknown_lengths_count_as_the_limit():
    requests = made_requests(2, 1, max_new_tokens=30)
    assert describe(requests, LengthHistory()).tolist() == [[2, 1], [60, 30]]
    history = LengthHistory()
    history.record([1], [1], [12])
    requests += [RolloutRequest(prompt_ids=(1,) * 80, seed=0, max_new_tokens=5)]
    assert describe(requests, history).tolist() == [[2, 1, 1], [24, 12, 5 + 10]]
    assert describe([], history).shape == (2, 0)


def test_a_run_of_one_process():
    ranks, requests = Ranks.alone(), made_requests(3, 2)
    plan = planned(ranks, requests, LengthHistory())
    assert send(ranks, plan) == requests and plan.moved_units == 0
    rollouts = [decode(request) for request in requests]
    assert give_back(ranks, plan, rollouts) == rollouts
    assert (plan.idle_before, plan.idle_after) == (0, 0)
    nothing = planned(ranks, [], LengthHistory())
    assert give_back(ranks, nothing, send(ranks, nothing)) == [] and nothing.idle_before == 0


def test_a_long_prompt_travels_once():
    requests = [RolloutRequest(prompt_ids=tuple(range(100_000)), seed=i, max_new_tokens=4) for i in range(8)]

    def work(ranks: ThreadRanks):
        own = requests if ranks.rank == 0 else []
        plan = planned(ranks, own, LengthHistory())
        plan = replace(plan, destinations=[np.array([1]), np.array([], dtype=np.int64)])
        sent: list[int] = []
        exchange = ranks.exchange
        ranks.exchange = lambda to_each: sent.append(sum(map(len, to_each))) or exchange(to_each)
        return send(ranks, plan), sent

    (kept, sent), (received, _) = run_ranks(2, work)
    assert kept == [] and received == requests and sent[0] == 2 + 100_000 + 2 * 8
