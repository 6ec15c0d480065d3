"""Captured decode steps, on CPU: what is captured is called instead (`EagerGraphs`), everything around it is the same."""

from __future__ import annotations

import copy
import gc
import logging
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import MODELS, VOCAB_SIZE, make_requests, tiny_llama, tiny_qwen3
from hypothesis import given
from hypothesis import strategies as st

from atlas_rl.adapt.capture import Capture
from atlas_rl.bench.output_law import check_output_law, random_requests, tiny_model
from atlas_rl.config import AtlasConfig, EngineConfig
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.drafters.recurrent_step import RecurrentStep
from atlas_rl.drafters.suffix import SuffixDrafter
from atlas_rl.engine import sharing
from atlas_rl.engine.calibrate import calibrate
from atlas_rl.engine.captured import bucket_of
from atlas_rl.engine.decode_state import DecodeState
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.graphs import EagerCopy, EagerGraphs
from atlas_rl.engine.in_flight import InFlight
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import RolloutRequest, SamplingParams

PLAIN = AtlasConfig(speculate=False)
SAMPLING = SamplingParams(max_new_tokens=24)


def recurrent(view: PolicyView, name: str = "recurrent") -> RecurrentDrafter:
    torch.manual_seed(0)
    return RecurrentDrafter(RecurrentHead.for_policy(view).to(view.compute_dtype), name=name)


def tokens_of(rollouts) -> list[list[int]]:
    return [rollout.token_ids for rollout in rollouts]


# ---- the output law ----------------------------------------------------------------------------------------------------------


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


# ---- what is captured, and when ----------------------------------------------------------------------------------------------


@given(st.integers(1, 1000))
def test_buckets_hold_their_rows_and_waste_little(num_rows: int):
    bucket = bucket_of(num_rows)
    assert num_rows <= bucket == bucket_of(bucket)
    assert bucket <= 8 or bucket < 1.26 * num_rows + 2
    assert bucket_of(num_rows + 1) >= bucket


class Log(EagerGraphs):
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def capture(self, step):
        self.events.append("capture")
        return super().capture(step)

    def stopwatch(self):
        self.events.append("launch")
        return super().stopwatch()

    def to_host(self, tensor):
        events = self.events

        class Copy(EagerCopy):
            def wait(self):
                events.append("wait")
                return super().wait()

        return Copy(tensor)


def test_the_next_step_is_launched_before_the_last_one_is_known():
    log = Log()
    engine = RolloutEngine(PolicyView(tiny_llama()), PLAIN, graphs=log)
    engine.generate(make_requests(1, 3, 12), SAMPLING)
    assert [event for event in log.events if event != "capture"] == ["launch", *["launch", "wait"] * 11, "wait"]
    assert engine.stats.decode_steps == 12, "one wait for each, and no step for nothing"


def test_host_drafts_wait_for_the_tokens_before_them():
    log = Log()
    engine = RolloutEngine(PolicyView(tiny_llama()), AtlasConfig(lookahead=2), SuffixDrafter(), graphs=log)
    engine.generate(make_requests(2, 3), SAMPLING)
    assert engine.stats.drafters["suffix"].proposed
    events = [event for event in log.events if event != "capture"]
    assert events == ["launch", "wait"] * (len(events) // 2)


def test_a_draining_batch_is_served_by_larger_steps_before_it_gets_its_own():
    view, log = PolicyView(tiny_llama()), Log()
    requests = make_requests(12, 1, 24)
    lens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 24, 24, 24]
    requests = [RolloutRequest(prompt_ids=r.prompt_ids, seed=r.seed, max_new_tokens=n) for r, n in zip(requests, lens)]
    engine = RolloutEngine(view, PLAIN, graphs=log)
    seen = []
    sleep = engine.captured.sleep
    engine.captured.sleep = lambda keep: (seen.append(sorted(k.num_rows for k in engine.captured.steps)), sleep(keep))
    made = engine.generate(requests, SAMPLING)
    assert tokens_of(made) == tokens_of(RolloutEngine(view, PLAIN).generate(requests, SAMPLING))
    assert seen == [[3, 12]], "sizes that were passed at once were not captured"


def test_captured_steps_follow_the_policy():
    """Weights that change in place between rollouts, over KV memory that is kept."""
    model = tiny_llama(torch.float64)
    engine = RolloutEngine(PolicyView(model), PLAIN, graphs=EagerGraphs())
    requests, sleep = make_requests(3, 4), engine.captured.sleep
    engine.captured.sleep = lambda keep: sleep(keep=True)
    before = engine.generate(requests, SAMPLING)
    cache, steps = engine.captured.kv_cache, dict(engine.captured.steps)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    engine.kv_cache = cache
    after = engine.generate(requests, SAMPLING)
    assert engine.captured.steps.items() >= steps.items() and steps, "nothing was captured again"
    expected = RolloutEngine(PolicyView(copy.deepcopy(model)), PLAIN).generate(requests, SAMPLING)
    assert tokens_of(after) == tokens_of(expected) != tokens_of(before)


def test_other_memory_is_captured_anew():
    model = tiny_llama()
    engine = RolloutEngine(PolicyView(model), PLAIN, graphs=(log := Log()))
    for _ in range(2):
        engine.generate(make_requests(1, 3), SAMPLING)
        assert not engine.captured.steps and engine.kv_cache is None, "a CPU's KV memory is given back"
    assert log.events.count("capture") == 2


class Unwilling:
    """A drafter's side within steps that raises as rows begin."""

    def __init__(self, step) -> None:
        self.step = step

    def __getattr__(self, name: str):
        return getattr(self.step, name)

    def admit(self, *args):
        raise RuntimeError("no features")


def test_a_drafter_that_fails_within_steps_costs_no_rollout(monkeypatch, caplog):
    view = PolicyView(tiny_llama(torch.float64))
    requests = make_requests(3, 4)
    expected = RolloutEngine(view, PLAIN).generate(requests, SAMPLING)
    monkeypatch.setattr(RecurrentDrafter, "within_step", lambda self: Unwilling(RecurrentStep(self)))
    engine = RolloutEngine(view, AtlasConfig(lookahead=2), recurrent(view), graphs=EagerGraphs())
    with caplog.at_level(logging.WARNING):
        assert tokens_of(engine.generate(requests, SAMPLING)) == tokens_of(expected)
    assert "no features" in caplog.text and engine.stats.drafters["recurrent"].accepted


class Failing(EagerGraphs):
    def capture(self, step):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_rollout_that_lacks_memory_for_capturing_is_no_verdict(caplog):
    class Short(EagerGraphs):
        is_short = True

        def capture(self, step):
            if self.is_short:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().capture(step)

    view, graphs = PolicyView(tiny_llama(torch.float64)), Short()
    requests, engine = make_requests(2, 2), RolloutEngine(view, PLAIN, graphs=graphs)
    expected = RolloutEngine(view, PLAIN).generate(requests, SAMPLING)
    for graphs.is_short in (True, False):
        caplog.clear()
        assert tokens_of(engine.generate(requests, SAMPLING)) == tokens_of(expected)
        assert ("out of memory" in caplog.text) == graphs.is_short
        assert bool(engine.stats.device_seconds) != graphs.is_short


@pytest.mark.parametrize("num_drafters", [0, 1])
def test_what_cannot_be_captured_is_called(num_drafters: int, caplog):
    view = PolicyView(tiny_llama(torch.float64))
    requests = make_requests(3, 4)
    expected = RolloutEngine(view, PLAIN).generate(requests, SAMPLING)
    config = AtlasConfig(lookahead=2) if num_drafters else PLAIN
    engine = RolloutEngine(view, config, [recurrent(view)][:num_drafters], graphs=Failing())
    with caplog.at_level(logging.WARNING):
        assert all(tokens_of(engine.generate(requests, SAMPLING)) == tokens_of(expected) for _ in range(2))
    (record,) = [r for r in caplog.records if "not captured" in r.message]
    assert "operation not permitted" in record.getMessage()
    assert not num_drafters or engine.stats.drafters["recurrent"].accepted, "the host drafts instead"


def test_an_interrupted_rollout_leaves_nothing_behind(monkeypatch):
    view = PolicyView(tiny_llama(torch.float64))
    engine, requests = RolloutEngine(view, PLAIN, graphs=EagerGraphs()), make_requests(3, 4)
    collect, calls = InFlight.collect, []

    def interrupted(step):
        calls.append(step)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return collect(step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(InFlight, "collect", interrupted)
        engine.generate(requests, SAMPLING)
    assert engine.stats.completion_tokens and engine.decoding is None
    expected = RolloutEngine(view, PLAIN).generate(requests, SAMPLING)
    assert tokens_of(engine.generate(requests, SAMPLING)) == tokens_of(expected)


def test_logits_that_are_not_finite_are_reported():
    model = tiny_llama()
    engine = RolloutEngine(PolicyView(model), PLAIN, graphs=EagerGraphs())
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(FloatingPointError, match="weights have diverged"):
        engine.generate(make_requests(1, 2), SAMPLING)


@pytest.mark.parametrize("backend", ["eager", "broken"])
def test_compiled_layers_are_used_where_they_are_faster(backend: str, monkeypatch, caplog):
    """By torch.compile's tracer alone, and by a compiler that fails."""

    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    compile_layers = PolicyView.compile_layers
    options = {"backend": broken if backend == "broken" else backend}
    monkeypatch.setattr(PolicyView, "compile_layers", lambda self: compile_layers(self, **options))
    model, requests = tiny_llama(torch.float64, hidden_act="gelu"), make_requests(2, 2, 6)
    expected = RolloutEngine(PolicyView(model), PLAIN).generate(requests, SAMPLING)
    view = PolicyView(model)
    assert view.fused is None
    config = AtlasConfig(speculate=False, engine=EngineConfig(compile_layers=True))
    engine = RolloutEngine(view, config, graphs=EagerGraphs())
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        if backend == "eager":  # on CPU it is not faster: have it win to see it used
            seconds = iter([[2.0], [1.0]])
            measure = engine.captured.measure
            patch.setattr(engine.captured, "measure", lambda *a: (measure(*a), next(seconds))[1])
        made = engine.generate(requests, SAMPLING)
    assert tokens_of(made) == tokens_of(expected) and engine.captured.failure is None
    is_compiled = [layer._compiled_call_impl is not None for layer in view.twin.model.layers]
    assert all(is_compiled) if backend == "eager" else not any(is_compiled)
    assert ("are compiled: a step" if backend == "eager" else "no such instruction") in caplog.text


def test_a_hundred_rollouts_leave_no_tensor_behind():
    model = tiny_llama()
    view = PolicyView(model)
    engine, requests = RolloutEngine(view, AtlasConfig(lookahead=2), recurrent(view), graphs=EagerGraphs()), []
    num_tensors = []
    for rollout in range(100):
        requests = make_requests(2, 2, 4, seed=rollout)
        engine.generate(requests, SAMPLING)
        with torch.no_grad():
            model.lm_head.weight.add_(1e-4)
        if rollout % 33 == 0:
            gc.collect()
            num_tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert len(set(num_tensors[1:])) == 1, num_tensors
    assert not engine.captured.steps and not engine.captured.wanted and engine.kv_cache is None


# ---- beside it ---------------------------------------------------------------------------------------------------------------


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
