"""What is captured, when, and what happens where it cannot be; on CPU, as in `test_captured`."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
from helpers import make_requests, recurrent, tiny_llama, tokens_of
from hypothesis import given
from hypothesis import strategies as st

from atlas_rl.config import AtlasConfig, EngineConfig
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.drafters.recurrent_step import RecurrentStep
from atlas_rl.drafters.suffix import SuffixDrafter
from atlas_rl.engine.captured import bucket_of
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.graphs import EagerCopy, EagerGraphs
from atlas_rl.engine.in_flight import InFlight
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import RolloutRequest, SamplingParams

PLAIN = AtlasConfig(speculate=False)
SAMPLING = SamplingParams(max_new_tokens=24)


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
