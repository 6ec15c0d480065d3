"""Everything but the kernels on a GPU that is pretended: nothing mixes devices, and the tokens are a CPU's."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers import left_padded, make_requests, tiny_llama, tiny_qwen3
from pretended_gpu import GPU, GPUTensor, pretended_gpu, to_gpu

import atlas_kernels
from atlas_rl import AtlasRolloutGenerator
from atlas_rl.adapt.adaptation import Adaptation
from atlas_rl.adapt.capture import Capture
from atlas_rl.bench.output_law import neural_drafters
from atlas_rl.config import AdaptConfig, AtlasConfig
from atlas_rl.drafters import Drafters
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.drafters.suffix import SuffixDrafter
from atlas_rl.engine import engine as engine_module
from atlas_rl.engine.calibrate import calibrate
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.fused_decoder import DeviceLayer
from atlas_rl.engine.graphs import EagerGraphs
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import SamplingParams

PLAIN = AtlasConfig(speculate=False)
STOPS = {"min_new_tokens": 2, "eos_token_ids": (3, 4, 5)}
SAMPLINGS = {
    "plain": SamplingParams(max_new_tokens=12),
    "greedy": SamplingParams(max_new_tokens=12, temperature=0.0),
    "filters": SamplingParams(max_new_tokens=12, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, **STOPS),
    "penalty": SamplingParams(max_new_tokens=12, repetition_penalty=1.1, **STOPS),
}


@pytest.fixture(params=[False, True], ids=["called", "captured"])
def graphs(request, monkeypatch) -> EagerGraphs | None:
    """How an engine on the GPU decodes."""
    backend = EagerGraphs() if request.param else None
    monkeypatch.setattr(engine_module, "backend_for", lambda device: backend)
    return backend


@pytest.mark.parametrize("name", SAMPLINGS)
def test_all_drafters(name: str, graphs, monkeypatch):
    requests, sampling = make_requests(3, 3, 12), SAMPLINGS[name]
    expected = RolloutEngine(PolicyView(tiny_llama()), PLAIN).generate(requests, sampling)
    with pretended_gpu(monkeypatch):
        view = PolicyView(to_gpu(tiny_llama()))
        assert view.device == GPU and view.fused is None
        for drafter in (None, SuffixDrafter(), *neural_drafters(view)):
            config = PLAIN if drafter is None else AtlasConfig(lookahead=3)
            engine = RolloutEngine(view, config, drafter)
            layers = () if drafter is None or drafter.layers is None else drafter.layers
            capture = engine.speculator.listener = Capture(layers, 1000)
            made = engine.generate(requests, sampling)
            assert [r.token_ids for r in made] == [r.token_ids for r in expected]
            assert not engine.controller.benched and (graphs is None or engine.captured.failure is None)
            if drafter is not None:
                assert engine.stats.drafters[drafter.name].proposed
                assert isinstance(capture.take().hidden_ND, GPUTensor)


def test_kernels_too(monkeypatch):
    """Triton's interpreter takes pretended tensors: what launchers allocate is on their device."""
    pytest.importorskip("triton")
    requests, sampling = make_requests(1, 2), SamplingParams(max_new_tokens=3)
    expected = RolloutEngine(PolicyView(tiny_llama()), PLAIN).generate(requests, sampling)
    monkeypatch.setattr(engine_module, "backend_for", lambda device: EagerGraphs())
    monkeypatch.setattr(atlas_kernels, "triton_everywhere", True)
    with pretended_gpu(monkeypatch):
        view = PolicyView(to_gpu(tiny_llama()))
        assert isinstance(view.fused.layers[0], DeviceLayer)
        engine = RolloutEngine(view, AtlasConfig(lookahead=2), neural_drafters(view)[0])
        made = engine.generate(requests, sampling)
    assert [r.token_ids for r in made] == [r.token_ids for r in expected]
    assert engine.captured.failure is None and engine.stats.drafters["recurrent"].proposed


def test_retraining(graphs, monkeypatch):
    with pretended_gpu(monkeypatch):
        view = PolicyView(to_gpu(tiny_qwen3()))
        drafter = RecurrentDrafter(RecurrentHead.for_policy(view))
        config = AtlasConfig(deterministic=True, adapt=AdaptConfig(deterministic_steps=2))
        drafters = Drafters(all=(drafter,), adaptive=drafter)
        engine = RolloutEngine(view, config, drafters.all)
        Adaptation(config, drafters).attach(engine)
        for seed in range(3):
            engine.weights_changed = True
            engine.generate(make_requests(8, 4, 16, seed=seed), SAMPLINGS["plain"])
            retrained = engine.stats.retrain
        assert retrained.steps == 2 and retrained.acceptance_after > 1 and not engine.controller.benched


def test_the_generate_hook(monkeypatch):
    monkeypatch.setattr(engine_module, "backend_for", lambda device: EagerGraphs() if device == GPU else None)
    batch, outputs = left_padded([[5, 6, 7, 8], [9, 10]]), []
    options = {"do_sample": True, "max_new_tokens": 10, "pad_token_id": 0, "num_return_sequences": 2}
    for gpu in (contextlib.nullcontext(), pretended_gpu(monkeypatch)):
        with gpu as is_there:
            model = to_gpu(tiny_llama()) if is_there else tiny_llama()
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            with AtlasRolloutGenerator().attach(model):
                outputs.append([model.generate(**inputs, **options) for _ in range(2)])
    here, there = outputs
    assert all(tensor.device == GPU for tensor in there)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


def test_calibration(graphs, monkeypatch):
    with pretended_gpu(monkeypatch):
        view = PolicyView(to_gpu(tiny_llama()))
        engine = RolloutEngine(view, AtlasConfig(), [SuffixDrafter(), *neural_drafters(view)[:2]])
        calibrate(engine, max_seconds=20.0, rows=(1, 4))
        assert engine.step_cost.seconds(4) > 0 and not engine.controller.benched


def test_mixed_devices_are_noticed(monkeypatch):
    with pretended_gpu(monkeypatch):
        there, here = torch.zeros(3, device=GPU), torch.zeros(3)
        assert there.is_cuda and there.device == GPU and (there + 1).sum().item() == 3
        assert not (there.cpu() + here).is_cuda and (here.to(GPU) + there).is_cuda
        for mix in (lambda: there + here, lambda: torch.cat([there, here]), lambda: there.index_select(0, here.long())):
            with pytest.raises(AssertionError, match="on the CPU, others on the GPU"):
                mix()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
