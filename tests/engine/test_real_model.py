"""The laws on a real pretrained model: stories260K, which writes English at T = 1."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import make_engine
from stories import load_stories260k

from atlas_rl.bench.output_law import check_output_law
from atlas_rl.config import AtlasConfig
from atlas_rl.drafters.suffix import SuffixDrafter
from atlas_rl.types import RolloutRequest, SamplingParams

SAMPLING = SamplingParams(max_new_tokens=100)


def story_requests(num_completions: int, max_new_tokens: int = 100) -> list[RolloutRequest]:
    return [RolloutRequest(prompt_ids=(1,), seed=i, max_new_tokens=max_new_tokens) for i in range(num_completions)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_output_law(dtype: torch.dtype):
    model = load_stories260k(dtype)
    reports = list(check_output_law(model, story_requests(40), SAMPLING))
    for report in reports:
        assert not report.violations(dtype), (report.variant, report.violations(dtype)[0])
        assert report.num_tokens == 40 * 100
    assert len(reports) >= 20


def test_it_writes_as_well_as_it_was_trained_to():
    """Mean log-prob of its own samples: about minus its entropy, 1.25 nats at T = 1. Broken attention would show here."""
    rollouts = make_engine(load_stories260k(torch.float32)).generate(story_requests(64), SAMPLING)
    mean = -sum(sum(r.logprobs) for r in rollouts) / sum(len(r.logprobs) for r in rollouts)
    assert 1.1 < mean < 1.4, mean


def test_suffix_drafts_pay_on_a_prompt_that_returns():
    """Many samples of one prompt: phrases recur, and the automatic lookahead finds them without clocks."""
    config = AtlasConfig(deterministic=True)
    engine = make_engine(load_stories260k(torch.float32), config, SuffixDrafter())
    engine.generate(story_requests(64), SAMPLING)
    engine.generate([RolloutRequest(prompt_ids=(1,), seed=1000 + i, max_new_tokens=100) for i in range(8)], SAMPLING)
    row = engine.stats.to_dict()
    assert row["drafters"]["suffix"]["acceptance"] > 0.4
    assert row["tokens_per_decode_step"] > 1.05
    assert math.isclose(row["tokens_per_decode_step"], row["completion_tokens"] / row["row_steps"])
