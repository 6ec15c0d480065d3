"""The compiled CPU kernels against their torch twins, over odd shapes."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from atlas_kernels import cpu, reference, row_keys

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=f"{cpu.unavailable_reason()}")

BLOCK_SIZE, NUM_BLOCKS = 16, 40
THREADS = [1, 2]


@pytest.fixture(autouse=True, params=THREADS)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def randn(*dims: int) -> torch.Tensor:
    return torch.randn(*dims, generator=torch.Generator().manual_seed(sum(dims)))


def paged_rows(query_lens: list[int], starts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_blocks = max(-(-(s + n) // BLOCK_SIZE) for s, n in zip(starts, query_lens))
    tables = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0))[: num_blocks * len(starts)]
    return tables.view(len(starts), num_blocks), torch.tensor(starts), torch.tensor(query_lens)


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 128, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (None, 5.0), (20, 3.0)])
def test_paged_attention(head_dim, num_heads, num_kv_heads, window, softcap):
    """Ragged rows: one token at the start of a sequence, blocks just filled, a draft across a block's end."""
    rows = paged_rows([1, 3, 1, 5, 17], [0, 30, 15, 3, 50])
    kv = randn(2, NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, head_dim)
    query = randn(num_heads, 27, head_dim).transpose(0, 1)  # as a model's attention hands it over
    scaling = head_dim**-0.5
    got = cpu.paged_attention(query, kv, *rows, scaling, window, softcap)
    expected = reference.paged_attention(query.double(), kv.double(), *rows, scaling, window, softcap)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_paged_attention_of_a_large_batch():
    """Enough work for several threads, long contexts, large scores."""
    rows = paged_rows([1] * 8, [3, 79, 20, 64, 63, 70, 1, 33])
    kv = 4 * randn(2, NUM_BLOCKS, 2, BLOCK_SIZE, 64)
    query = randn(8, 16, 64)
    expected = reference.paged_attention(query.double(), kv.double(), *rows, 1.0)
    torch.testing.assert_close(cpu.paged_attention(query, kv, *rows, 1.0), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("num_tokens", "size"), [(1, 16), (3, 97), (64, 512), (0, 32)])
def test_rms_norm_and_silu_mul(num_tokens: int, size: int):
    x, weight = 3 * randn(num_tokens, size), randn(size)
    torch.testing.assert_close(cpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    gate_up = 30 * randn(num_tokens, 2 * size)
    torch.testing.assert_close(cpu.silu_mul(gate_up), reference.silu_mul(gate_up))


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 4, 5, 6, 7, 12, 13, 25, 70])
@pytest.mark.parametrize("widths", [(3,), (64,), (97, 32, 33), (512, 256)])
@pytest.mark.parametrize("size", [1, 37, 256])
@pytest.mark.parametrize("residual", [False, True])
def test_packed_linear(num_tokens: int, widths: tuple[int, ...], size: int, residual: bool):
    x = randn(size, num_tokens).T
    weights = [randn(width, size) for width in widths]
    biases = [randn(width) if i % 2 == 0 else None for i, width in enumerate(widths)]
    added = randn(num_tokens, sum(widths)) if residual else None
    for some in (biases, [None] * len(widths)):
        got = cpu.PackedWeight(weights, some)(x, added)
        torch.testing.assert_close(got, reference.packed_linear(x, weights, some, added), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [2, 5, 12, 64])
def test_a_row_of_a_packed_linear_is_the_same_in_any_batch(num_tokens: int):
    x, added = randn(num_tokens, 384), randn(num_tokens, 300)
    packed = cpu.PackedWeight([randn(200, 384), randn(100, 384)], [None, randn(100)])
    together = packed(x, added)
    for n in range(num_tokens):
        assert torch.equal(together[n : n + 1], packed(x[n : n + 1], added[n : n + 1]))


@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("with_norms", [False, True])
def test_rope_and_store(head_dim: int, with_norms: bool):
    num_heads, num_kv_heads, slots = 6, 2, torch.tensor([3, 40, 99, 17, 639])
    qkv = randn(5, (num_heads + 2 * num_kv_heads) * head_dim)
    norms = (randn(head_dim), randn(head_dim)) if with_norms else (None, None)
    tables = (randn(12, head_dim // 2), randn(12, head_dim // 2), torch.tensor([3, 4, 11, 0, 1]), slots)
    caches = [torch.zeros(2, NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, head_dim) for _ in range(3)]
    expected = reference.rope_and_store(qkv.clone(), *norms, 1e-6, *tables, caches[0])
    got = cpu.rope_and_store(qkv.clone(), *norms, 1e-6, *tables, caches[1])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(caches[1], caches[0], rtol=1e-5, atol=1e-5)

    key_HND, value_HND = randn(num_kv_heads, 5, head_dim), randn(num_kv_heads, 5, head_dim)
    for store, cache in ((reference.store_kv, caches[0]), (cpu.store_kv, caches[1])):
        store(key_HND.transpose(0, 1), value_HND.transpose(0, 1), slots, cache)
    assert torch.equal(caches[0][:, 2, :, 8], caches[1][:, 2, :, 8])
    torch.testing.assert_close(caches[1], caches[0], rtol=1e-5, atol=1e-5)


def test_row_keys():
    rng = np.random.default_rng(0)
    seeds, positions = rng.integers(-(2**63), 2**63 - 1, 50), rng.integers(0, 10_000, 50)
    assert torch.equal(cpu.row_keys(seeds, positions), reference.row_keys(seeds, positions, torch.device("cpu")))
    assert torch.equal(cpu.row_keys(seeds[::2], positions[::2]), cpu.row_keys(seeds, positions)[:, ::2])


@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 1), (3, 97), (64, 4096), (5, 50_001), (0, 64)])
@pytest.mark.parametrize("spread", [0.1, 5.0])
def test_coupled_sample(num_rows: int, vocab_size: int, spread: float):
    """The tokens that lose without a logarithm being taken are those that lose with it."""
    logits = spread * randn(num_rows, vocab_size)
    keys = row_keys(np.arange(num_rows), np.arange(num_rows) % 7, torch.device("cpu"))
    for drawn, twin in (
        (cpu.coupled_sample(logits, keys, 0.7), reference.coupled_sample(logits, keys, 0.7)),
        (cpu.coupled_sample(logits, None, 1.0), reference.coupled_sample(logits, None, 1.0)),
    ):
        assert torch.equal(drawn[0], twin[0])
        torch.testing.assert_close(drawn[1], twin[1], rtol=1e-5, atol=1e-5)


def test_coupled_sample_of_masked_and_broken_rows():
    logits = torch.randn(4, 300)
    logits[0, 5:] = -torch.inf
    logits[1] = -1e30
    logits[1, 7] = 0.0
    logits[2, 11] = torch.nan
    logits[3, 11] = torch.inf
    keys = row_keys(np.arange(4), np.arange(4), torch.device("cpu"))
    for key in (keys, None):
        tokens, logprobs = cpu.coupled_sample(logits, key, 1.0)
        assert tokens[0] < 5 and tokens[1] == 7
        assert logprobs[:2].isfinite().all() and logprobs[2:].isnan().all()


def test_a_missing_compiler_is_a_reason_not_an_error(tmp_path):
    code = "from atlas_kernels import cpu; print(cpu.unavailable_reason())"
    environment = os.environ | {"CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "no-such-compiler" in done.stdout
    assert not list((tmp_path / "atlas_kernels").glob("*.so"))
