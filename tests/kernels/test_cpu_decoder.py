"""All layers in one call compute what they compute one by one, to the last bit; and on older processors as well."""

from __future__ import annotations

import pytest
import torch
from helpers import SHAPE, VOCAB_SIZE, tiny_llama, tiny_qwen3
from transformers import MistralConfig, MistralForCausalLM

from atlas_kernels import cpu, native, reference
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.kv_cache import KVCache
from atlas_rl.engine.policy_view import PolicyView

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


def test_new_weights_are_taken_over():
    model = tiny_qwen3()
    view = PolicyView(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert view.refresh()
    fresh = PolicyView(model)
    hidden = []
    for each in (view, fresh):
        cache = KVCache(each.kv_shape(16), 4, torch.device("cpu"))
        with torch.inference_mode():
            hidden.append(each.hidden_states(ForwardBatch.build(cache, [[5]], [0], [[1]])))
    assert torch.equal(*hidden)


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
