"""The suffix drafter: what it learns from, what it forgets, honest probabilities, bounded memory, bounded work."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from sys import getsizeof

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_rl.drafters.base import Draft
from atlas_rl.drafters.suffix import AGED, CELL_BITS, SuffixDrafter

PROMPT, OTHER_PROMPT = (1, 2, 3), (3, 2, 1)
PHRASE = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
LONG = 8


@dataclass
class Row:
    row_id: int
    prompt_ids: tuple[int, ...] = PROMPT
    output_ids: list[int] = field(default_factory=list)


def emit(drafter: SuffixDrafter, row: Row, token_ids: list[int]) -> None:
    """One plain step per token, with a proposal before each."""
    for token in token_ids:
        drafter.propose([row], [LONG])
        row.output_ids.append(token)
        drafter.observe([row], [0], [0])


def start(drafter: SuffixDrafter, row_id: int, token_ids: list[int], prompt_ids: tuple[int, ...] = PROMPT) -> Row:
    row = Row(row_id, prompt_ids)
    drafter.admit([row])
    emit(drafter, row, token_ids)
    return row


def finish(drafter: SuffixDrafter, row_id: int, token_ids: list[int], prompt_ids: tuple[int, ...] = PROMPT) -> None:
    drafter.release([start(drafter, row_id, token_ids, prompt_ids)], finished=True)


def draft(drafter: SuffixDrafter, row: Row, max_len: int = LONG) -> Draft:
    return drafter.propose([row], [max_len])[0]


def check_integrity(drafter: SuffixDrafter, slack: int = 0) -> None:
    """The books are right and every bound holds; the shared index may exceed its own by what one call adds."""
    assert drafter.num_group_entries == sum(len(group.index) for group in drafter.groups.values())
    assert drafter.num_group_entries <= drafter.max_group_entries
    rollouts = [rollout for history in drafter.history.values() for rollout in history.rollouts]
    assert drafter.num_history_bytes == sum(getsizeof(rollout) for rollout in rollouts)
    assert drafter.num_history_bytes <= drafter.max_history_bytes
    assert all(history.num_bytes <= drafter.max_history_bytes_per_prompt for history in drafter.history.values())
    assert len(drafter.shared) <= drafter.max_shared_entries
    assert len(drafter.shared_older) <= drafter.max_shared_entries + slack
    live = [state.group for state in drafter.rows.values()]
    assert all(group.num_live == sum(other is group for other in live) for group in drafter.groups.values())
    assert all(group in drafter.groups.values() for group in live)


# ---- what it learns from


def test_it_knows_nothing_at_first():
    drafter = SuffixDrafter()
    row = Row(0, prompt_ids=(7, 8, 9))
    drafter.admit([row])
    assert draft(drafter, row) == Draft([], [])


def test_a_row_repeats_itself():
    drafter = SuffixDrafter()
    row = start(drafter, 0, PHRASE * 3 + PHRASE[:4])
    tokens, probs = draft(drafter, row)
    assert tokens == (PHRASE * 2)[4 : 4 + LONG]
    assert probs == sorted(probs, reverse=True) and probs[0] > 0.5
    assert draft(drafter, row, 2).token_ids == PHRASE[4:6]
    assert draft(drafter, row, 0) == Draft([], [])


def test_a_row_repeats_its_prompt():
    drafter = SuffixDrafter()
    row = start(drafter, 0, PHRASE[:3], prompt_ids=(*PHRASE, 5))
    assert draft(drafter, row, 3).token_ids == PHRASE[3:6]


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "live"])
def test_a_sibling_goes_on_as_its_sibling_did(is_finished: bool):
    drafter = SuffixDrafter(max_shared_entries=0)
    sibling = start(drafter, 0, PHRASE)
    if is_finished:
        drafter.release([sibling], finished=True)
    row = Row(1)
    drafter.admit([row])
    assert draft(drafter, row, 3).token_ids == PHRASE[:3]


def test_prompts_share_phrases_but_not_evidence():
    for max_shared_entries, expected in ((0, []), (1000, PHRASE[4:7])):
        drafter = SuffixDrafter(max_shared_entries=max_shared_entries)
        for row_id in range(3):
            finish(drafter, row_id, PHRASE)
        stranger = start(drafter, 9, PHRASE[:4], prompt_ids=(40, 41, 42))
        assert draft(drafter, stranger, 3).token_ids == expected
    # borrowing is all it does: the prompt's own index holds what its own row emitted
    assert {entry >> CELL_BITS for entry in drafter.rows[9].group.index.values()} == {40, 41, 42, *PHRASE[:4]}


def test_the_majority_wins():
    drafter = SuffixDrafter()
    for row_id, token in enumerate([70, 80, 70, 70, 80]):
        finish(drafter, row_id, [*PHRASE, token])
    row = start(drafter, 9, PHRASE)
    assert draft(drafter, row, 1).token_ids == [70]


# ---- policy updates


def test_an_update_halves_what_earlier_rollouts_weigh():
    """After five rollouts that agree, fresh dissent needs fewer votes to win if an update lies between."""

    def num_dissents(is_updated: bool) -> int:
        drafter = SuffixDrafter(max_shared_entries=0)
        for row_id in range(5):
            finish(drafter, row_id, [*PHRASE, 70])
        if is_updated:
            drafter.policy_updated()
        for row_id in range(5, 15):
            row = start(drafter, row_id, PHRASE)
            if draft(drafter, row, 1).token_ids == [80]:
                return row_id - 5
            emit(drafter, row, [80])
            drafter.release([row], finished=True)
        raise AssertionError("dissent never won")

    assert num_dissents(False) == 5 and num_dissents(True) == 3


def test_earlier_rollouts_are_drafted_from_until_they_are_too_old():
    drafter = SuffixDrafter(max_age=4)
    for row_id in range(3):
        finish(drafter, row_id, PHRASE)
    for age in range(1, 7):
        drafter.policy_updated()
        row = Row(10 + age)
        drafter.admit([row])
        assert draft(drafter, row, 3).token_ids == (PHRASE[:3] if age < 4 else [])
        drafter.release([row], finished=False)
    assert not drafter.history and not drafter.shared and not drafter.shared_older


def test_a_prompt_keeps_the_rollouts_of_the_last_policy_only():
    drafter = SuffixDrafter()
    finish(drafter, 0, PHRASE)
    drafter.policy_updated()
    finish(drafter, 1, [50, 51])
    (history,) = drafter.history.values()
    assert [list(rollout) for rollout in history.rollouts] == [[50, 51]]


def test_an_update_between_two_steps_of_a_row_ages_its_index():
    drafter = SuffixDrafter()
    row = start(drafter, 0, PHRASE * 2)
    drafter.policy_updated()
    assert all(entry & AGED for entry in drafter.rows[0].group.index.values())
    check_integrity(drafter)
    assert draft(drafter, row, 3).token_ids == PHRASE[:3]
    emit(drafter, row, PHRASE)
    check_integrity(drafter)


# ---- the protocol


def test_propose_is_a_pure_function_of_what_was_observed():
    drafter = SuffixDrafter()
    row = start(drafter, 0, PHRASE * 2)
    first = draft(drafter, row)
    assert draft(drafter, row, 2).token_ids == first.token_ids[:2]
    assert draft(drafter, row) == first


@pytest.mark.parametrize("is_dropped", [True, False], ids=["index dropped", "index kept"])
def test_a_preempted_row_takes_up_its_thread(is_dropped: bool):
    drafter = SuffixDrafter(max_shared_entries=0)
    row = start(drafter, 0, PHRASE * 2)
    expected = draft(drafter, row).token_ids
    num_entries = drafter.num_group_entries
    drafter.release([row], finished=False)
    assert not drafter.rows and not drafter.history
    if is_dropped:
        drafter.policy_updated()
        assert drafter.num_group_entries == 0
    drafter.admit([row])
    assert drafter.num_group_entries == num_entries
    assert draft(drafter, row).token_ids == expected == PHRASE[:LONG]


# ---- honest probabilities


def test_probabilities_are_what_comes_true():
    """A random source at T = 1, after 80 rollouts to learn from: of the tokens drafted with probability p, a share p is right."""
    rng = random.Random(0)
    weights = {state: [rng.random() ** 20 for _ in range(20)] for state in range(20)}
    drafter = SuffixDrafter()
    promised, right, count = [0.0] * 5, [0] * 5, [0] * 5
    for row_id in range(240):
        row = Row(row_id, prompt_ids=(30 + row_id % 10,))
        drafter.admit([row])
        while len(row.output_ids) < 100:
            tokens, probs = draft(drafter, row, 4)
            num_accepted, is_right = 0, True
            while is_right:
                row.output_ids += rng.choices(range(20), weights[row.output_ids[-1] if row.output_ids else 0])
                is_right = num_accepted < len(tokens) and row.output_ids[-1] == tokens[num_accepted]
                num_accepted += is_right
            for depth, prob in enumerate(probs if row_id >= 80 else []):
                bucket = min(4, int(prob * 5))
                promised[bucket] += prob
                right[bucket] += depth < num_accepted
                count[bucket] += 1
            drafter.observe([row], [len(tokens)], [num_accepted])
        drafter.release([row], finished=True)
    assert all(n > 300 for n in count), count
    assert abs(sum(promised) - sum(right)) < 0.05 * sum(right), (promised, right)
    for p, r, n in zip(promised, right, count):
        assert abs(p - r) / n < 0.1, (promised, right, count)


def test_a_random_policy_is_soon_left_alone():
    rng = random.Random(0)
    drafter = SuffixDrafter()
    row = start(drafter, 0, [rng.randrange(50) for _ in range(2000)])
    num_drafted = 0
    for _ in range(500):
        num_drafted += len(draft(drafter, row, 4).token_ids)
        emit(drafter, row, [rng.randrange(50)])
    assert num_drafted < 100


# ---- bounds and work


TOKENS = st.integers(0, 3) | st.integers(0, 200_000)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "emit", "emit", "emit", "finish", "preempt", "update"]),
        st.integers(0, 5),
        st.lists(TOKENS, min_size=1, max_size=6),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(0, 60), st.integers(1, 4))
def test_any_life_is_survived_within_bounds(steps: list[tuple[str, int, list[int]]], bound: int, max_age: int):
    drafter = SuffixDrafter(
        max_age=max_age,
        max_group_entries=bound,
        max_shared_entries=bound,
        max_history_bytes=10 * bound,
        max_history_bytes_per_prompt=5 * bound,
    )
    live: list[Row] = []
    preempted: list[Row] = []
    for row_id, (what, pick, token_ids) in enumerate(steps):
        if what == "admit":
            row = preempted.pop() if preempted else Row(row_id, ((), PROMPT, OTHER_PROMPT)[pick % 3])
            drafter.admit([row])
            live.append(row)
        elif what == "emit":
            rows = live[pick % 2 :: 2][::-1] if pick else live
            max_lens = [(pick + i) % 5 for i in range(len(rows))]
            if pick != 3:
                for _ in range(1 + pick % 2):
                    drafts = drafter.propose(rows, max_lens)
                assert len(drafts) == len(rows)
                for (tokens, probs), max_len in zip(drafts, max_lens):
                    assert len(tokens) == len(probs) <= max_len
                    assert probs == sorted(probs, reverse=True) and all(0 <= p <= 1 for p in probs)
            for row in rows:
                row.output_ids.extend(token_ids)
            drafter.observe(rows, [0] * len(rows), [0] * len(rows))
        elif what == "update":
            drafter.policy_updated()
        elif live:
            row = live.pop(pick % len(live))
            drafter.release([row], finished=what == "finish")
            if what == "preempt":
                preempted.append(row)
        check_integrity(drafter, slack=3 * 6 * len(steps))


def test_memory_stays_bounded_over_a_long_random_run():
    rng = random.Random(0)
    drafter = SuffixDrafter(
        max_group_entries=3000, max_shared_entries=1000, max_history_bytes=8000, max_history_bytes_per_prompt=1000
    )
    for row_id in range(0, 400, 4):
        prompt = tuple(rng.choices(range(1000), k=20))
        rows = [Row(row_id + i, prompt) for i in range(4)]
        drafter.admit(rows)
        for _ in range(60):
            for row in rows:
                row.output_ids.extend(rng.choices(range(1000), k=rng.randint(1, 4)))
            drafter.observe(rows, [0] * 4, [0] * 4)
            check_integrity(drafter, slack=48)
        drafter.release(rows, finished=True)
        if row_id % 80 == 0:
            drafter.policy_updated()
    assert drafter.history and drafter.shared_older


class CountingIndex(dict):
    """An index that counts how often it is asked and written."""

    num_gets = num_sets = 0

    def get(self, *args):
        CountingIndex.num_gets += 1
        return super().get(*args)

    def __setitem__(self, *args):
        CountingIndex.num_sets += 1
        super().__setitem__(*args)


@pytest.mark.parametrize("num_tokens", [100, 4000])
def test_work_per_token_does_not_grow_with_what_was_learned(num_tokens: int):
    """At most 9 look-ups per draft token; per emitted token 3 + 6 look-ups (group; shared, two generations) and 6 writes."""
    rng = random.Random(0)
    drafter = SuffixDrafter()
    row = start(drafter, 0, rng.choices(range(8), k=num_tokens))
    drafter.shared, drafter.shared_older = CountingIndex(drafter.shared), CountingIndex()
    drafter.rows[0].group.index = CountingIndex(drafter.rows[0].group.index)
    for _ in range(100):
        CountingIndex.num_gets = CountingIndex.num_sets = 0
        tokens = draft(drafter, row).token_ids
        assert CountingIndex.num_gets <= 9 * min(LONG, len(tokens) + 1) and CountingIndex.num_sets == 0
        CountingIndex.num_gets = 0
        row.output_ids.append(rng.randrange(8))
        drafter.observe([row], [0], [0])
        assert CountingIndex.num_gets <= 9 and CountingIndex.num_sets <= 6
