"""All layers in one call compute what they compute one by one, to the last bit; and on older processors as well."""

from __future__ import annotations

import weakref

import pytest
import torch
from helpers import SHAPE, VOCAB_SIZE, make_engine, make_requests, tiny_llama, tiny_qwen3
from transformers import MistralConfig, MistralForCausalLM

from atlas_kernels import cpu, native, reference
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.kv_cache import KVCache
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import SamplingParams

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=f"{cpu.unavailable_reason()}")


def tiny_mistral(**overrides) -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SHAPE | {"sliding_window": 12} | overrides)).eval()


ROWS = {"one": ([1], [40]), "drafts": ([1, 5, 2, 1, 4], [0, 30, 15, 3, 50]), "many": ([1] * 40, list(range(40)))}


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_mistral])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_one_call_is_all_layers(make, rows: str, threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = make(hidden_size=256, intermediate_size=520)  # wide enough for two threads
        view = PolicyView(model)
        view.tap({0, 1})
        query_lens, starts = ROWS[rows]
        cache = KVCache(view.kv_shape(16), 200, torch.device("cpu"))
        cache.memory_L2NHSD.copy_(torch.randn(cache.memory_L2NHSD.shape, generator=torch.Generator().manual_seed(1)))
        tables = [
            list(range(1 + 5 * r, 6 + 5 * r))[: -(-(s + n) // 16)] for r, (s, n) in enumerate(zip(starts, query_lens))
        ]
        tokens = [[(7 * r + i) % VOCAB_SIZE for i in range(n)] for r, n in enumerate(query_lens)]
        results = []
        for _ in range(2):
            batch = ForwardBatch.build(cache, tokens, starts, tables)
            assert (view.fused.decoder is None) == bool(results)
            results.append((view.hidden_states(batch), batch.tapped, cache.memory_L2NHSD.clone()))
            view.fused.decoder = None  # now layer by layer, part by part
    finally:
        torch.set_num_threads(before)
    (one, one_tapped, one_kv), (parts, parts_tapped, parts_kv) = results
    assert torch.equal(one, parts) and torch.equal(one_kv, parts_kv)
    assert one_tapped.keys() == parts_tapped.keys() == {0, 1}
    assert all(torch.equal(one_tapped[layer], parts_tapped[layer]) for layer in (0, 1))


def hidden_states(view: PolicyView) -> torch.Tensor:
    cache = KVCache(view.kv_shape(16), 4, torch.device("cpu"))
    with torch.inference_mode():
        return view.hidden_states(ForwardBatch.build(cache, [[5, 6, 7]], [0], [[1]]))


def test_its_workspace_is_all_that_it_writes_to(monkeypatch):
    workspaces, beyond, new_empty = [], 64, torch.Tensor.new_empty

    def guarded(x: torch.Tensor, *size: int, **options) -> torch.Tensor:
        if len(size) > 1 or options:
            return new_empty(x, *size, **options)
        workspaces.append(x.new_full((size[0] + beyond,), torch.nan))
        return workspaces[-1]

    view = PolicyView(tiny_mistral(hidden_size=80, head_dim=32, intermediate_size=200))
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    hidden_states(view)
    (workspace,) = workspaces
    assert workspace[:-beyond].isfinite().all() and workspace[-beyond:].isnan().all()


@pytest.mark.parametrize("moved", [False, True])
def test_new_weights_are_taken_over(moved: bool):
    """Written where they were, or somewhere else."""
    model = tiny_qwen3()
    view = PolicyView(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if moved:
                parameter.data = parameter.data * 1.1
            else:
                parameter.mul_(1.1)
    assert view.refresh()
    assert torch.equal(hidden_states(view), hidden_states(PolicyView(model)))


def test_layers_of_several_shapes_are_called_one_by_one():
    model = tiny_qwen3()
    mlp = model.model.layers[1].mlp
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, torch.nn.Linear(64, 48, bias=False))
    mlp.down_proj = torch.nn.Linear(48, 64, bias=False)
    view = PolicyView(model)
    assert view.fused is not None and view.fused.decoder is None
    expected = model.model(torch.tensor([[5, 6, 7]])).last_hidden_state[0]
    torch.testing.assert_close(hidden_states(view), expected, rtol=1e-4, atol=1e-4)


def test_kv_memory_is_given_back_after_a_rollout():
    engine = make_engine(tiny_qwen3())
    caches = []
    wake = engine.wake

    def waking(*args):
        wake(*args)
        caches.append(weakref.ref(engine.kv_cache.memory_L2NHSD.untyped_storage()))

    engine.wake = waking
    engine.generate(make_requests(2, 2), SamplingParams())
    assert caches and caches[0]() is None


def test_attention_on_an_older_processor(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-mno-avx512f"))
    monkeypatch.setattr(cpu, "LIBRARY", native.Library(native.FOLDER / "cpu_ops.cpp", cpu.SIGNATURES))
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(2, 40, 2, 16, 32, generator=generator)
    query = torch.randn(9, 4, 32, generator=generator)
    rows = (torch.arange(20).view(4, 5), torch.tensor([70, 3, 16, 0]), torch.tensor([1, 5, 2, 1]))
    got = cpu.paged_attention(query, kv, *rows, 32**-0.5)
    expected = reference.paged_attention(query.double(), kv.double(), *rows, 32**-0.5)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
