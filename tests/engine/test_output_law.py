"""Law 1: a completion is a function of weights, prompt, sampling parameters and seed."""

from __future__ import annotations

import pytest
import torch
from helpers import MODELS, VOCAB_SIZE

from atlas_rl.bench.output_law import check_output_law, random_requests, tiny_model
from atlas_rl.types import SamplingParams

FILTERED = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "min_new_tokens": 5,
}


def check(model, requests, sampling, dtype) -> int:
    num_tokens = 0
    for report in check_output_law(model, requests, sampling):
        assert not report.violations(dtype), (report.variant, report.violations(dtype)[0])
        # a lookahead that never drafts, or memory that is never short, would prove nothing
        if "adversarial" in report.variant:
            assert report.tokens_per_decode_step > 1.3, report
        if "preemption" in report.variant:
            assert report.preemptions > 0
        if "switching" in report.variant:
            assert report.arms > 4, "another one at each step"
        if "draft_model, lookahead" in report.variant:
            assert report.tokens_per_decode_step > 3, "it equals the policy"
        num_tokens += report.num_tokens
    return num_tokens


def test_a_hundred_thousand_tokens_in_float64():
    """Every variant samples the same tokens: 6,400 or so each, 100,000 in all; `bench.output_law` does 100,000 each."""
    requests = random_requests(6_400, 128, VOCAB_SIZE)
    num_tokens = check(tiny_model(), requests, SamplingParams(max_new_tokens=128), torch.float64)
    assert num_tokens >= 100_000


@pytest.mark.parametrize("name", MODELS)
def test_filters_and_stops_in_float64(name: str):
    requests = random_requests(2_000, 40, VOCAB_SIZE, num_samples=4, seed=1)
    sampling = SamplingParams(**FILTERED, max_new_tokens=40, eos_token_ids=(1, 2), stop_token_ids=(3,))
    assert check(MODELS[name](torch.float64), requests, sampling, torch.float64) > 1_000


def test_float32_on_packed_weights_differs_by_ties_only(shipped_policy):
    requests = random_requests(4_000, 64, shipped_policy.config.vocab_size, seed=2)
    assert check(shipped_policy, requests, SamplingParams(max_new_tokens=64), torch.float32) > 30_000
