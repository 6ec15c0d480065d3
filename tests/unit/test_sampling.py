"""Sampling against transformers' processors and against the softmax; verification against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor
from transformers.generation import (
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from atlas_kernels import gumbel_noise, row_keys
from atlas_rl.engine.sampling import SamplingBatch, count_accepted, filter_scores, sample, seen_tokens
from atlas_rl.types import SamplingParams

FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
}


def make_batch(params: SamplingParams, num_rows: int, seed: int = 0, seen=None) -> SamplingBatch:
    return places_of(params, np.arange(num_rows) + seed * 10**9, np.arange(num_rows) % 50, seen)


def places_of(params: SamplingParams, seeds: np.ndarray, positions: np.ndarray, seen=None) -> SamplingBatch:
    return SamplingBatch.of(params, seeds, positions, torch.device("cpu"), seen)


def transformers_processors(params: SamplingParams, prompt_len: int) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_new_tokens:
        processors.append(
            MinNewTokensLengthLogitsProcessor(
                prompt_len, params.min_new_tokens, list(params.eos_token_ids), device="cpu"
            )
        )
    if params.temperature not in (0, 1):
        processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors


@pytest.mark.parametrize("filters", [*FILTERS.values(), {"repetition_penalty": 1.4, "top_k": 30, "min_new_tokens": 8}])
@pytest.mark.parametrize("vocab_size", [2, 50, 1001])
def test_filters_equal_transformers(filters: dict, vocab_size: int):
    torch.manual_seed(0)
    params = SamplingParams(**filters, eos_token_ids=(1,))
    logits = torch.randn(40, vocab_size, dtype=torch.float64) * 3
    output_ids = torch.randint(0, vocab_size, (40, 11))  # prompt of 4, completion of 7: below min_new_tokens
    seen = torch.zeros(40, vocab_size, dtype=torch.bool).scatter_(1, output_ids, True)
    batch = places_of(params, np.arange(40), np.full(40, 7), seen)
    expected = transformers_processors(params, prompt_len=4)(output_ids, logits.clone())
    torch.testing.assert_close(filter_scores(logits, logits / params.temperature, batch), expected)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_a_million_draws_follow_the_softmax(filters: dict):
    """Sampling law: chi-square of 1,000,000 draws against the filtered softmax."""
    torch.manual_seed(1)
    params = SamplingParams(**filters)
    logits = torch.randn(1, 64) * 2
    probs = filter_scores(logits, logits / params.temperature, make_batch(params, 1)).double().softmax(-1)[0].numpy()
    counts = np.zeros(64)
    for chunk in range(20):
        tokens, _ = sample(logits.repeat(50_000, 1), make_batch(params, 50_000, seed=chunk))
        counts += np.bincount(tokens.numpy(), minlength=64)
    assert counts[probs == 0].sum() == 0
    kept = probs > 0
    assert counts.sum() == 1_000_000
    expected = probs[kept] / probs[kept].sum() * 1_000_000
    common = expected > 5  # the test's own condition; what is rarer is pooled
    observed = np.append(counts[kept][common], counts[kept][~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_rare_tokens_are_drawn_as_often_as_they_should():
    """The tail of the noise: 4,000 tokens of 1e-6 each beside one that holds the rest."""
    logits = torch.full((1, 4001), float(np.log(1e-6)))
    logits[0, 0] = float(np.log1p(-4e-3))
    num_rare = 0
    for chunk in range(100):
        tokens, _ = sample(logits.repeat(2000, 1), make_batch(SamplingParams(), 2000, seed=chunk))
        num_rare += int((tokens > 0).sum())
    assert abs(num_rare - 800) < 5 * np.sqrt(800)


def test_siblings_differ_and_repeat():
    logits = torch.zeros(8, 1000)
    params = SamplingParams()
    batch = places_of(params, np.arange(8), np.zeros(8, np.int64))
    first, _ = sample(logits.clone(), batch)
    again, _ = sample(logits.clone(), batch)
    assert torch.equal(first, again)
    assert len(set(first.tolist())) == 8


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_logprobs_are_over_the_full_vocabulary(temperature: float):
    """Law 5: filters change what is drawn, not the log-prob reported."""
    logits = torch.randn(30, 50)
    params = SamplingParams(temperature=temperature, top_k=3 if temperature else 0)
    tokens, logprobs = sample(logits.clone(), make_batch(params, 30))
    expected = (logits / (temperature or 1)).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected)


def test_greedy_is_arg_max():
    logits = torch.randn(30, 50)
    tokens, _ = sample(logits.clone(), make_batch(SamplingParams(temperature=0.0), 30))
    assert torch.equal(tokens, logits.argmax(-1))


def test_coupling_accepts_close_to_the_optimum():
    """Two close distributions with the same noise agree almost as often as 1 - TV allows; independent draws far less."""
    torch.manual_seed(0)
    p = torch.randn(1, 500) * 2
    q = p + 0.3 * torch.randn(1, 500)
    noise = gumbel_noise(row_keys(np.arange(20_000), np.zeros(20_000, np.int64), torch.device("cpu")), 500)
    coupled = ((p + noise).argmax(-1) == (q + noise).argmax(-1)).float().mean()
    optimum = torch.minimum(p.softmax(-1), q.softmax(-1)).sum()
    assert optimum - 0.06 < coupled < optimum + 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_give_nan_logprobs(bad: float):
    logits = torch.randn(3, 20)
    logits[1, 7] = bad
    _, logprobs = sample(logits, make_batch(SamplingParams(), 3))
    assert torch.isnan(logprobs).tolist() == [False, True, False]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=6), st.randoms())
def test_count_accepted_is_the_longest_right_prefix(rows: list[list[int]], rng):
    tokens = [[rng.randint(0, 2) for _ in row] for row in rows]
    expected = []
    for row, drawn in zip(rows, tokens, strict=True):
        num_right = 0
        while num_right < len(row) - 1 and drawn[num_right] == row[num_right + 1]:
            num_right += 1
        expected.append(num_right)
    flat = [np.array([x for row in part for x in row]) for part in (tokens, rows)]
    assert count_accepted(*flat, np.array([len(row) for row in rows])).tolist() == expected


def test_seen_tokens_hold_the_draft_before_each_place():
    seen_RV = torch.zeros(2, 10, dtype=torch.bool)
    seen_RV[0, [0, 1]] = True
    seen_RV[1, [9]] = True
    seen_NV = seen_tokens(seen_RV, np.array([3, 2]), torch.tensor([1, 4, 5, 9, 3]))
    assert [row.nonzero().flatten().tolist() for row in seen_NV] == [[0, 1], [0, 1, 4], [0, 1, 4, 5], [9], [3, 9]]
