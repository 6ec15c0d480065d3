"""Paged attention, and what fills the cache before it: kernels against their torch twins in float64."""

from __future__ import annotations

import pytest
import torch

from atlas_kernels import reference

pytest.importorskip("triton")

from atlas_kernels import attention  # noqa: E402

TOLERANCES = [(torch.float32, 2e-6, 2e-5), (torch.float16, 1e-3, 2e-3), (torch.bfloat16, 8e-3, 1.6e-2)]
FLOAT32, FLOAT16, BFLOAT16 = TOLERANCES
NUM_BLOCKS = 64


def randn(*dims: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*dims, generator=torch.Generator().manual_seed(sum(dims))).to(dtype)


def kv_layer(
    num_kv_heads: int, head_dim: int, block_size: int = 16, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A middle one of three; NaN where no token can lie, to be caught where it is read: see `blocks_of`."""
    return randn(2, 3, NUM_BLOCKS, num_kv_heads, block_size, head_dim, dtype=dtype)[:, 1]


def blocks_of(contexts: list[int], block_size: int, kv: torch.Tensor) -> torch.Tensor:
    """Block tables of rows of so many tokens; what lies in their blocks behind the last token becomes NaN."""
    num_blocks = [-(-length // block_size) for length in contexts]
    tables = torch.zeros(len(contexts), max(num_blocks), dtype=torch.int64)
    free = iter(torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0)).tolist())
    for row, (num, length) in enumerate(zip(num_blocks, contexts)):
        for i in range(num):
            tables[row, i] = next(free)
        if length % block_size:
            kv[:, tables[row, num - 1], :, length % block_size :] = torch.nan
    return tables


def expected_of(query: torch.Tensor, kv: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    kv = kv.nan_to_num()  # the twin multiplies what it has masked by zero
    return reference.paged_attention(query.to(kv.dtype).double(), kv.double(), *args, **kwargs).to(query.dtype)


def check(
    tolerance, starts, lens, *, heads=(4, 2), head_dim=32, block_size=16, query_dtype=None, options=None, **kwargs
):
    """Kernel and twin over rows of so many tokens, on top of so many."""
    dtype, atol, rtol = tolerance
    kv = kv_layer(heads[1], head_dim, block_size, dtype)
    tables = blocks_of([s + n for s, n in zip(starts, lens)], block_size, kv)
    num_tokens = kwargs.pop("num_tokens", sum(lens))
    query = randn(heads[0], num_tokens, head_dim, dtype=query_dtype or dtype).transpose(0, 1)
    rows = (tables, torch.tensor(starts), torch.tensor(lens), head_dim**-0.5)
    got = attention.paged_attention(query, kv, *rows, *(options or ()), **kwargs)
    assert got.dtype == query.dtype and got.is_contiguous()
    torch.testing.assert_close(got, expected_of(query, kv, *rows, *(options or ()), **kwargs), atol=atol, rtol=rtol)


@pytest.fixture(params=[1, 3])
def num_splits(request, monkeypatch) -> int:
    monkeypatch.setattr(attention, "choose_num_splits", lambda *_: request.param)
    return request.param


RAGGED = ([0, 30, 15, 0, 3, 150, 9], [1, 3, 1, 0, 5, 2, 0])
"""One token at the start of a sequence, blocks just filled, a draft across a block's end, many blocks, padding."""


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1), (8, 2), (8, 1)])
def test_ragged_rows(tolerance, heads, num_splits):
    check(tolerance, *RAGGED, heads=heads)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("tolerance", [FLOAT32, FLOAT16])
def test_head_dims(head_dim, tolerance, num_splits):
    check(tolerance, [40, 0], [2, 3], head_dim=head_dim)


@pytest.mark.parametrize("options", [(7, None), (None, 0.5), (40, 2.0), (1, None)])
@pytest.mark.parametrize("block_size", [8, 32])
def test_window_and_softcap(options, block_size, num_splits):
    check(FLOAT32, *RAGGED, options=options, block_size=block_size)


@pytest.mark.parametrize("heads", [(4, 2), (6, 1)])
def test_prefill(heads, num_splits):
    """Many tiles of queries, of which a program's last may end in the middle of a token's heads."""
    check(FLOAT32, [0, 33, 5], [70, 1, 20], heads=heads, options=(50, None) if num_splits == 3 else ())


def test_a_query_of_another_dtype(num_splits):
    check(FLOAT16, [40, 7], [1, 4], query_dtype=torch.float32)
