"""The whole accelerator path through Triton's interpreter: fused layers, captured steps, drafts within them, sampling."""

from __future__ import annotations

import pytest
import torch
from helpers import logprobs_of, make_requests, tiny_llama, tiny_qwen3
from torch.utils._python_dispatch import TorchDispatchMode

import atlas_kernels
from atlas_rl.config import AtlasConfig
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.fused_decoder import DeviceLayer
from atlas_rl.engine.graphs import EagerGraphs
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import SamplingParams

pytest.importorskip("triton")

PLAIN = AtlasConfig(speculate=False)
SAMPLING = SamplingParams(max_new_tokens=4)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.15}
"""Of log-probs."""


@pytest.fixture
def on_triton(monkeypatch):
    """From now on ops run as Triton kernels on CPU tensors."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(atlas_kernels, "triton_everywhere", on)

    return switch


class NoHostReads(TorchDispatchMode):
    """Forbids what cannot be captured: looking at a value, shapes that follow from values, and copies to the device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "lift_fresh")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in self.FORBIDDEN, f"{func} within a captured step"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "the shape of x[mask] follows from values"
        return func(*args, **(kwargs or {}))


class StrictGraphs(EagerGraphs):
    """Runs a step as it is captured: nothing in it may depend on the host."""

    def capture(self, step):
        step()  # what is made at first use is made now

        def strictly():
            with NoHostReads():
                return step()

        return super().capture(strictly)


@pytest.mark.parametrize(
    ("make", "dtype", "lookahead"),
    [(tiny_llama, torch.float32, 2), (tiny_qwen3, torch.float16, None)],
    ids=["llama", "qwen3"],
)
def test_captured_steps_of_kernels_make_the_same_tokens(make, dtype, lookahead, on_triton):
    model, requests = make(dtype), make_requests(2, 2)
    on_triton(False)
    expected = RolloutEngine(PolicyView(model), PLAIN).generate(requests, SAMPLING)
    on_triton(True)
    view = PolicyView(model)
    assert isinstance(view.fused.layers[0], DeviceLayer)
    torch.manual_seed(0)
    drafter = () if lookahead is None else RecurrentDrafter(RecurrentHead.for_policy(view))
    config = AtlasConfig(lookahead=lookahead, speculate=lookahead is not None)
    engine = RolloutEngine(view, config, drafter, graphs=StrictGraphs())
    made = engine.generate(requests, SAMPLING)
    assert engine.captured.failure is None
    assert not lookahead or engine.stats.drafters["recurrent"].proposed
    for a, b in zip(made, expected, strict=True):
        assert a.token_ids == b.token_ids
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=TOLERANCE[dtype])


def test_autocast_keeps_the_residual_stream_in_float32(on_triton):
    """Float32 masters under bf16 autocast: the kernels' log-probs of a given completion are autocast's."""
    model, requests = tiny_llama(), make_requests(2, 1)
    on_triton(True)
    view = PolicyView(model, autocast_dtype=torch.bfloat16)
    assert isinstance(view.fused.layers[0], DeviceLayer) and view.hidden_dtype == torch.float32
    for rollout in RolloutEngine(view, PLAIN, graphs=StrictGraphs()).generate(requests, SAMPLING):
        on_triton(False)
        expected = logprobs_of(model, rollout, torch.bfloat16)
        assert torch.allclose(torch.tensor(rollout.logprobs), expected, atol=TOLERANCE[torch.bfloat16])
        on_triton(True)


def test_host_reads_are_noticed(on_triton):
    """The twins look at values: that the guard lets nothing of the kind pass is what the other tests rely on."""
    on_triton(False)
    engine = RolloutEngine(PolicyView(tiny_llama()), PLAIN, graphs=StrictGraphs())
    engine.generate(make_requests(1, 1), SAMPLING)
    assert "follows from values" in engine.captured.failure


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SamplingParams(top_k=20, top_p=0.9, min_p=0.02)])
def test_filters_within_a_captured_step(sampling: SamplingParams, on_triton):
    requests = make_requests(1, 2, 4)
    sampling = SamplingParams(
        max_new_tokens=4, min_new_tokens=3, eos_token_ids=tuple(range(40)), temperature=sampling.temperature,
        top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p,
    )  # fmt: skip
    model = tiny_llama()
    on_triton(False)
    expected = RolloutEngine(PolicyView(model), PLAIN).generate(requests, sampling)
    on_triton(True)
    engine = RolloutEngine(PolicyView(model), PLAIN, graphs=StrictGraphs())
    made = engine.generate(requests, sampling)
    assert [r.token_ids for r in made] == [r.token_ids for r in expected] and engine.captured.failure is None
