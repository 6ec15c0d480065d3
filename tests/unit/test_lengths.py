"""Expected lengths of completions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from atlas_rl.lengths import PRIOR, LengthHistory, outcome, prompt_key
from atlas_rl.types import Rollout

PROMPTS = [(1, 2), (3,), (1, 2, 3)]


def made_rollout(prompt: tuple[int, ...], num_tokens: int) -> Rollout:
    return Rollout(
        prompt_ids=list(prompt), token_ids=[7] * num_tokens, logprobs=[0.0] * num_tokens, finish_reason="stop"
    )


def test_the_key_is_the_same_in_every_process():
    assert prompt_key((1, 2, 3)) == prompt_key([1, 2, 3]) == -5405627362230748553
    assert len({prompt_key(prompt) for prompt in PROMPTS}) == 3


def test_what_is_expected():
    history = LengthHistory()
    assert history.expected(PROMPTS) == [math.inf] * 3
    history.record_all([outcome([made_rollout(PROMPTS[0], 10), made_rollout(PROMPTS[1], 100)])] * 50)
    short, long, unknown = history.expected(PROMPTS)
    assert short == pytest.approx((50 * 10 + PRIOR * 55) / (50 + PRIOR))
    assert long == pytest.approx((50 * 100 + PRIOR * 55) / (50 + PRIOR))
    assert unknown == 55
    for _ in range(20):  # the short one has become long
        history.record_all([outcome([made_rollout(PROMPTS[0], 200)] * 50), outcome([])])
    assert history.expected(PROMPTS[:1]) == pytest.approx([200], rel=1e-3)


def test_ranks_that_share_a_prompt_are_one_record():
    together, apart = LengthHistory(), LengthHistory()
    rollouts = [made_rollout(PROMPTS[0], n) for n in (5, 9, 2)]
    for _ in range(3):
        together.record_all([outcome(rollouts)])
        apart.record_all([outcome(rollouts[:1]), outcome([]), outcome(rollouts[1:])])
    assert together.by_prompt == apart.by_prompt and together.overall == apart.overall


def test_nothing_decoded_leaves_it_as_it_was():
    history = LengthHistory()
    history.record([1], [1], [8])
    history.record_all([outcome([]), outcome([])])
    assert history.expected(PROMPTS) == [8] * 3


def test_bounded_with_the_oldest_out():
    history = LengthHistory(max_prompts=3)
    history.record([1, 2, 3], [1] * 3, [5] * 3)
    history.record([1, 4], [1] * 2, [5] * 2)
    assert list(history.by_prompt) == [3, 1, 4]


def test_taken_back_from_a_checkpoint():
    history, resumed = LengthHistory(), LengthHistory()
    resumed.load(history.arrays())
    assert resumed.expected(PROMPTS) == [math.inf] * 3
    for lens in ([3, 8, 1], [9, 2, 7]):
        history.record_all([outcome([made_rollout(p, n)]) for p, n in zip(PROMPTS, lens)])
    arrays = history.arrays()
    assert {name: a.dtype for name, a in arrays.items()} == {"keys": np.int64, "sums": np.float64}
    resumed.load(arrays)
    for one in (history, resumed):
        one.record_all([outcome([made_rollout(PROMPTS[1], 4)])])
    assert list(resumed.by_prompt.items()) == list(history.by_prompt.items())
    assert resumed.expected(PROMPTS) == history.expected(PROMPTS)
    small = LengthHistory(max_prompts=1)
    small.load(arrays)
    assert list(small.by_prompt) == [prompt_key(PROMPTS[2])]
