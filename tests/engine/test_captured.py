"""Captured decode steps, on CPU: what is captured is called instead (`EagerGraphs`), everything around it is the same. What they
emit; `test_capturing` is about what is captured, and when."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import MODELS, VOCAB_SIZE, make_requests, recurrent, tiny_llama, tiny_qwen3, tokens_of

from atlas_rl.adapt.capture import Capture
from atlas_rl.bench.output_law import check_output_law, random_requests, tiny_model
from atlas_rl.config import AtlasConfig, EngineConfig
from atlas_rl.drafters.suffix import SuffixDrafter
from atlas_rl.engine import sharing
from atlas_rl.engine.calibrate import calibrate
from atlas_rl.engine.decode_state import DecodeState
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.graphs import EagerGraphs
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import RolloutRequest, SamplingParams

PLAIN = AtlasConfig(speculate=False)
SAMPLING = SamplingParams(max_new_tokens=24)


def test_every_variant_makes_the_same_tokens():
    requests = random_requests(1_500, 96, VOCAB_SIZE)
    num_drafted = 0
    for report in check_output_law(tiny_model(), requests, SamplingParams(max_new_tokens=96), EagerGraphs()):
        assert not report.differences, (report.variant, report.differences[0])
        if "adversarial" in report.variant:
            assert report.tokens_per_decode_step > 1.3, report
        if "preemption" in report.variant:
            assert report.preemptions > 0
        num_drafted += report.tokens_per_decode_step > 1
    assert num_drafted > 10


@pytest.mark.parametrize("name", MODELS)
def test_filters_stops_and_lengths(name: str):
    """EOS in the middle of an accepted draft, lengths of one token, tokens that cannot be drawn yet, greedy decoding."""
    view = PolicyView(MODELS[name](torch.float64))
    requests = make_requests(6, 4, 30)
    requests = [
        RolloutRequest(prompt_ids=r.prompt_ids, seed=r.seed, max_new_tokens=1 + i % 30) for i, r in enumerate(requests)
    ]
    stops = {"eos_token_ids": (1, 2, 40, 41, 42), "stop_token_ids": (3, 4)}
    for sampling in (
        SamplingParams(max_new_tokens=30, **stops),
        SamplingParams(max_new_tokens=30, temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, **stops),
        SamplingParams(max_new_tokens=30, min_new_tokens=1, ignore_eos=True, **stops),
        SamplingParams(max_new_tokens=30, temperature=0.0, **stops),
        SamplingParams(max_new_tokens=30, repetition_penalty=1.2, **stops),
    ):
        expected = RolloutEngine(view, PLAIN).generate(requests, sampling)
        assert {r.finish_reason for r in expected} == {"stop", "length"}
        for config, drafters in ((PLAIN, ()), (AtlasConfig(lookahead=3), (recurrent(view),))):
            engine = RolloutEngine(view, config, drafters, graphs=EagerGraphs())
            made = engine.generate(requests, sampling)
            assert tokens_of(made) == tokens_of(expected)
            assert [r.finish_reason for r in made] == [r.finish_reason for r in expected]
            assert np.allclose(
                np.concatenate([r.logprobs for r in made]), np.concatenate([r.logprobs for r in expected])
            )
            assert engine.captured.failure is None


def test_guesses_are_the_hosts():
    """A head makes the same guesses within a step as it makes for the host."""
    view = PolicyView(tiny_llama(torch.float64))
    counts = []
    for graphs in (None, EagerGraphs()):
        engine = RolloutEngine(view, AtlasConfig(lookahead=3), recurrent(view), graphs=graphs)
        rollouts = engine.generate(make_requests(5, 4), SAMPLING)
        counts.append((engine.stats.drafters["recurrent"], engine.stats.decode_steps, tokens_of(rollouts)))
    assert counts[0] == counts[1] and counts[0][0].accepted > 0


@pytest.mark.parametrize("sampling", [SAMPLING, SamplingParams(temperature=0.0), SamplingParams(top_k=9)])
def test_guesses_over_a_draft_vocabulary(sampling: SamplingParams):
    """The best of the words in it: the same as over the whole vocabulary, where that one is in it."""
    view, ids = PolicyView(tiny_qwen3(torch.float64)), np.arange(1, VOCAB_SIZE, 3)
    state = DecodeState(20, 4, view.device)
    slots = torch.arange(1, 21)
    state.last_tokens_S[1:], state.seeds_S[1:], state.starts_S[1:] = slots, 7 * slots, 5
    guesses = []
    with torch.inference_mode():
        for words in (np.arange(VOCAB_SIZE), ids):
            drafter = recurrent(view)
            drafter.bind(view)
            drafter.vocabulary.ids = words
            step = drafter.within_step()
            step.wake(sampling, 21, 64)
            step.features_SLD.copy_(torch.randn(step.features_SLD.shape, generator=torch.Generator().manual_seed(0)))
            guesses.append(step.draft(1, slots, state)[:, 0])
    whole, sliced = guesses
    known = torch.isin(whole, torch.from_numpy(ids))
    assert torch.isin(sliced, torch.from_numpy(ids)).all() and 0 < known.sum() < 20
    if not sampling.top_k:  # the best few of a slice are others than the best few of all
        assert torch.equal(whole[known], sliced[known])


@pytest.mark.parametrize("tight", [{}, {"max_num_seqs": 6}, {"block_size": 4, "kv_memory_gib": 30 / 2**18}])
def test_samples_share_the_reading_of_their_prompt(tight: dict, monkeypatch):
    """Steps that share, while it pays, and the same tokens as without: also where rows take the places of others."""
    monkeypatch.setattr(sharing, "MIN_SHARED_TOKENS", 8)
    monkeypatch.setattr(sharing, "MIN_SAVED", 0.0)
    view = PolicyView(tiny_qwen3(torch.float64))
    requests = make_requests(6, 4, 20, seed=3)
    expected = RolloutEngine(view, PLAIN).generate(requests, SAMPLING)
    for config, drafters in ((PLAIN, ()), (AtlasConfig(lookahead=2), (recurrent(view),))):
        config = replace(config, engine=EngineConfig(**tight))
        engine = RolloutEngine(view, config, drafters, graphs=EagerGraphs())
        with monkeypatch.context() as patch:
            patch.setattr(engine.captured, "_runnable", Mock(wraps=engine.captured._runnable))
            assert tokens_of(engine.generate(requests, SAMPLING)) == tokens_of(expected)
            assert any(call.args[0].shares for call in engine.captured._runnable.call_args_list)
        assert bool(engine.stats.preemptions) == ("kv_memory_gib" in tight)


def test_rows_that_take_the_slots_of_others_share_their_own_prompt(monkeypatch):
    """The second sample ends before the first, so that the next prompt's samples get the same slots in the same order."""
    monkeypatch.setattr(sharing, "MIN_SHARED_TOKENS", 16)
    view = PolicyView(tiny_qwen3(torch.float64))
    prompts = [tuple(range(first, first + length)) for first, length in ((2, 70), (20, 40), (9, 66))]
    requests = [
        RolloutRequest(prompt_ids=prompt, seed=len(prompt) + sample, max_new_tokens=9 - sample)
        for prompt in prompts
        for sample in range(2)
    ]
    engine = RolloutEngine(
        view, AtlasConfig(speculate=False, engine=EngineConfig(max_num_seqs=2)), graphs=EagerGraphs()
    )
    expected = RolloutEngine(view, PLAIN).generate(requests, SAMPLING)
    assert tokens_of(engine.generate(requests, SAMPLING)) == tokens_of(expected)


def test_hidden_states_are_kept_for_retraining():
    """What a captured rollout teaches is what an uncaptured one does: same rows, tokens and features."""
    view, requests = PolicyView(tiny_llama(torch.float64)), make_requests(4, 2)
    replays = []
    for graphs in (None, EagerGraphs()):
        engine = RolloutEngine(view, AtlasConfig(lookahead=2), recurrent(view), graphs=graphs)
        capture = engine.speculator.listener = Capture(engine.speculator.drafters["recurrent"].layers, 10_000)
        engine.generate(requests, SAMPLING)
        replays.append(capture.take())
    eager, stepped = replays
    assert torch.equal(eager.token_ids_N, stepped.token_ids_N) and torch.equal(eager.seeds_R, stepped.seeds_R)
    assert len(eager.token_ids_N) > 100
    assert torch.allclose(eager.hidden_ND, stepped.hidden_ND) and torch.allclose(eager.tapped_NLD, stepped.tapped_NLD)


def test_calibration_measures_steps_and_the_drafting_within_them():
    view = PolicyView(tiny_llama())
    engine = RolloutEngine(view, AtlasConfig(), recurrent(view), graphs=EagerGraphs())
    assert calibrate(engine, max_seconds=30.0, rows=(1, 4)) < 30
    assert engine.step_cost.seconds(8) > 0 and engine.controller.draft_cost["recurrent"].seconds(4, np.array([3])) > 0
    assert not engine.captured.steps, "its memory is given back"
    assert engine.controller.best_depth(("recurrent",), 4) >= 1


def test_controller_never_combines_drafters_within_steps_with_others():
    view = PolicyView(tiny_llama())
    drafters = [SuffixDrafter(), recurrent(view), recurrent(view, "static")]
    engine = RolloutEngine(view, AtlasConfig(), drafters, graphs=EagerGraphs())
    assert engine.controller.arms == [(), ("suffix",), ("recurrent",), ("static",)]


def test_host_time_is_told_apart():
    engine = RolloutEngine(PolicyView(tiny_llama()), PLAIN, graphs=EagerGraphs())
    engine.generate(make_requests(2, 2), SAMPLING)
    row = engine.stats.to_dict()
    assert 0 < row["device_seconds"] < row["seconds"]["verify"] + row["seconds"]["prefill"]
