"""The suffix drafter: what it learns from, that it draws with the policy's noise, honest probabilities, bounds."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_kernels import gumbel_noise, row_keys
from atlas_rl.drafters.base import Drafts
from atlas_rl.drafters.suffix import SuffixDrafter

pytestmark = pytest.mark.skipif(
    SuffixDrafter.unavailable_reason() is not None, reason=f"{SuffixDrafter.unavailable_reason()}"
)

PROMPT = (90, 91, 92)
PHRASE = [11, 12, 13, 14, 15, 16, 17, 18]
LONG = 6


@dataclass
class Row:
    row_id: int
    prompt_ids: tuple[int, ...] = PROMPT
    output_ids: list[int] = field(default_factory=list)
    noise_seed: int | None = None


def make_drafter(**options) -> SuffixDrafter:
    return SuffixDrafter(**{"log2_entries": 14} | options)


def propose(drafter: SuffixDrafter, rows: list[Row], max_len: int = LONG) -> Drafts:
    return drafter.propose(rows, np.full(len(rows), max_len))


def draft(drafter: SuffixDrafter, row: Row, max_len: int = LONG) -> list[int]:
    drafts = propose(drafter, [row], max_len)
    return drafts.token_ids[0, : drafts.lens[0]].tolist()


def emit(drafter: SuffixDrafter, row: Row, token_ids: list[int]) -> None:
    """One plain step per token, with a proposal before each."""
    for token in token_ids:
        propose(drafter, [row])
        row.output_ids.append(token)
        drafter.observe([row], [0], [0])


def start(drafter: SuffixDrafter, row_id: int, token_ids: list[int], prompt_ids: tuple[int, ...] = PROMPT) -> Row:
    row = Row(row_id, prompt_ids)
    drafter.admit([row])
    emit(drafter, row, token_ids)
    return row


def finish(drafter: SuffixDrafter, row_id: int, token_ids: list[int], prompt_ids: tuple[int, ...] = PROMPT) -> None:
    drafter.release([start(drafter, row_id, token_ids, prompt_ids)], finished=True)


# ---- what it learns from


def test_it_knows_nothing_at_first():
    drafter = make_drafter()
    row = Row(0)
    drafter.admit([row])
    assert draft(drafter, row) == []


def test_a_row_repeats_itself():
    drafter = make_drafter()
    row = start(drafter, 0, PHRASE + PHRASE + PHRASE[:2])
    assert draft(drafter, row) == PHRASE[2:]


def test_a_row_repeats_its_prompt():
    drafter = make_drafter()
    row = start(drafter, 0, PHRASE[:3], prompt_ids=(*PHRASE, 99))
    assert draft(drafter, row, 4) == PHRASE[3:7]


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "live"])
def test_a_sibling_goes_on_as_its_sibling_did(is_finished: bool):
    drafter = make_drafter()
    if is_finished:
        finish(drafter, 0, PHRASE)
    else:
        start(drafter, 0, PHRASE)
    assert draft(drafter, start(drafter, 1, PHRASE[:1])) == PHRASE[1 : 1 + LONG]


def test_a_prompt_outweighs_what_other_prompts_do():
    """Phrases are shared between prompts; where a prompt's own rows differ, they count for more."""
    drafter = make_drafter()
    for row_id in range(3):
        finish(drafter, row_id, [1, 2, 3, 4], prompt_ids=(50 + row_id,))
    assert draft(drafter, start(drafter, 10, [1, 2], prompt_ids=(70,)), 2) == [3, 4]
    finish(drafter, 11, [1, 2, 8, 9], prompt_ids=(80,))
    finish(drafter, 12, [1, 2, 8, 9], prompt_ids=(80,))
    assert draft(drafter, start(drafter, 13, [1, 2], prompt_ids=(80,)), 2) == [8, 9]


def test_the_majority_wins_where_nothing_is_drawn():
    drafter = make_drafter()
    for row_id, last in enumerate([5, 6, 6, 5, 6]):
        finish(drafter, row_id, [1, 2, last])
    assert draft(drafter, start(drafter, 9, [1, 2]), 1) == [6]


def test_what_earlier_policies_did_fades():
    """Four old votes against two fresh ones: half a life later the old ones still win, after four lives no more."""
    for num_updates, winner in ((4, 5), (32, 6)):
        drafter = make_drafter(half_life=8)
        for row_id in range(4):
            finish(drafter, row_id, [1, 2, 5])
        for _ in range(num_updates):
            drafter.policy_updated()
        for row_id in range(2):
            finish(drafter, 10 + row_id, [1, 2, 6])
        assert draft(drafter, start(drafter, 20, [1, 2]), 1) == [winner]


def test_propose_is_a_pure_function_of_what_was_observed():
    drafter = make_drafter()
    row = start(drafter, 0, PHRASE + PHRASE[:3])
    first, second = propose(drafter, [row]), propose(drafter, [row])
    assert np.array_equal(first.token_ids, second.token_ids) and np.array_equal(first.probs, second.probs)


def test_a_preempted_row_takes_up_its_thread():
    drafter = make_drafter()
    row = start(drafter, 0, PHRASE + PHRASE[:2])
    expected = draft(drafter, row)
    drafter.release([row], finished=False)
    drafter.admit([row])
    assert draft(drafter, row) == expected == PHRASE[2:]


# ---- the policy's noise


def test_guesses_are_drawn_with_the_policys_noise():
    """A source that picks one of four tokens by its noise: coupled guesses come true far more often than one in four."""
    drafter = make_drafter()
    num_right = num_guessed = 0
    for seed in range(40):
        keys = row_keys(np.full(50, seed), np.arange(50), torch.device("cpu"))
        tokens = gumbel_noise(keys, 4).argmax(-1).tolist()
        row = Row(seed, noise_seed=seed)
        drafter.admit([row])
        for token in tokens:
            guess = propose(drafter, [row], 1)
            if seed >= 20:
                num_guessed += 1
                num_right += guess.lens[0] == 1 and guess.token_ids[0, 0] == token
            row.output_ids.append(token)
            drafter.observe([row], [0], [0])
        drafter.release([row], finished=True)
    assert num_guessed > 900 and num_right > 0.5 * num_guessed, num_right / num_guessed


# ---- honest probabilities


def test_probabilities_are_what_comes_true():
    """A random source, after 80 rollouts to learn from: of the tokens drafted with probability p, a share p is right."""
    rng = random.Random(0)
    weights = {state: [rng.random() ** 20 for _ in range(20)] for state in range(20)}
    drafter = make_drafter()
    promised, right, count = [0.0] * 5, [0] * 5, [0] * 5
    for row_id in range(240):
        row = Row(row_id, prompt_ids=(30 + row_id % 10,))
        drafter.admit([row])
        while len(row.output_ids) < 100:
            drafts = propose(drafter, [row], 4)
            length = int(drafts.lens[0])
            num_accepted, is_right = 0, True
            while is_right:
                row.output_ids += rng.choices(range(20), weights[row.output_ids[-1] if row.output_ids else 0])
                is_right = num_accepted < length and row.output_ids[-1] == drafts.token_ids[0, num_accepted]
                num_accepted += is_right
            for depth, prob in enumerate(drafts.probs[0, :length].tolist() if row_id >= 80 else []):
                bucket = min(4, int(prob * 5))
                promised[bucket] += prob
                right[bucket] += depth < num_accepted
                count[bucket] += 1
            drafter.observe([row], [length], [num_accepted])
        drafter.release([row], finished=True)
    assert sum(n > 300 for n in count) >= 3, count
    assert abs(sum(promised) - sum(right)) < 0.05 * sum(right), (promised, right)
    for p, r, n in zip(promised, right, count):
        assert n < 300 or abs(p - r) / n < 0.1, (promised, right, count)


def test_a_random_policy_is_soon_left_alone():
    rng = random.Random(0)
    drafter = make_drafter()
    row = start(drafter, 0, [rng.randrange(50) for _ in range(2000)])
    num_drafted = 0
    for _ in range(500):
        num_drafted += len(draft(drafter, row, 4))
        emit(drafter, row, [rng.randrange(50)])
    assert num_drafted < 200  # of 2,000


# ---- bounds

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
@given(STEPS)
def test_any_life_is_survived(steps: list[tuple[str, int, list[int]]]):
    """In a table of 64 contexts, where everything is forgotten all the time. Slots of rows are reused, books are kept."""
    drafter = make_drafter(log2_entries=6)
    rows: dict[int, Row] = {}
    for number, (action, place, token_ids) in enumerate(steps):
        chosen = list(rows.values())[place % len(rows)] if rows else None
        if action == "admit" or chosen is None:
            rows[number] = Row(number, tuple(token_ids), noise_seed=number if place % 2 else None)
            drafter.admit([rows[number]])
        elif action == "emit":
            drafts = propose(drafter, list(rows.values()))
            assert drafts.probs.shape == drafts.token_ids.shape == (len(rows), LONG)
            assert ((drafts.probs >= 0) & (drafts.probs <= 1)).all() and (np.diff(drafts.probs, axis=1) <= 0).all()
            chosen.output_ids += token_ids
            drafter.observe([chosen], [0], [0])
        elif action == "update":
            drafter.policy_updated()
        else:
            drafter.release([rows.pop(chosen.row_id)], finished=action == "finish")
            if action == "preempt":
                rows[chosen.row_id] = chosen
                drafter.admit([chosen])
    assert drafter.slots.keys() == drafter.num_learned.keys() == rows.keys()
    assert len(set(drafter.slots.values())) == len(rows)
    assert sum(drafter.num_live.values()) == len(rows)


def test_many_updates_and_long_repeats_do_not_overflow():
    drafter = make_drafter(log2_entries=6)
    row = start(drafter, 0, [7] * 10_000)
    for _ in range(70_000):  # past the 16 bits of an epoch
        drafter.policy_updated()
    emit(drafter, row, [7, 7])
    assert draft(drafter, row, 2) == [7, 7]


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(SuffixDrafter, "unavailable_reason", staticmethod(lambda: "c++ not found"))
    with pytest.raises(ValueError, match="C\\+\\+ compiler"):
        SuffixDrafter()
