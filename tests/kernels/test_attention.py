"""Paged attention, and what fills the cache before it: kernels against their torch twins in float64."""

from __future__ import annotations

import pytest
import torch
from compiling import Case, check_compiles

import atlas_kernels
from atlas_kernels import SharedPrefixes, reference

triton = pytest.importorskip("triton")

from atlas_kernels import attention, rotary  # noqa: E402

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


@pytest.mark.parametrize("tolerance", [FLOAT32, FLOAT16])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1), (8, 2), (8, 1)])
def test_ragged_rows(tolerance, heads, num_splits):
    check(tolerance, *RAGGED, heads=heads)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("tolerance", [FLOAT16, BFLOAT16])
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


def test_places_of_no_row_come_out_as_zeros(num_splits):
    """As in a captured step of four places per row: a row ends early, another is padding; places behind the last row."""
    lens, starts = [4, 1, 0, 2], torch.tensor([0, 4, 8, 12])
    kv = kv_layer(2, 32)
    tables = blocks_of([60, 36, 1, 5], 16, kv)
    query = randn(30, 4, 32)
    for first, length in zip([0, 4, 8, 12, 16], [*lens, 0]):
        query[first + length : first + 4] = torch.nan
    query[20:] = torch.nan
    rows = (tables, torch.tensor([56, 35, 0, 3]), torch.tensor(lens), 0.2)
    got = attention.paged_attention(query, kv, *rows, query_starts_R=starts, max_query_len=4)
    torch.testing.assert_close(got, expected_of(query, kv, *rows, query_starts_R=starts), atol=2e-6, rtol=2e-5)
    assert (got[5:12] == 0).all() and (got[14:] == 0).all() and (got[:5] != 0).all()


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("heads", [(4, 2), (8, 1)])
def test_shared_prefixes(query_len: int, heads: tuple[int, int], num_splits):
    """Two groups of samples and a row of its own between them, an unused span, and a row of padding within a span."""
    shared, own, places = [96, 96, 0, 32, 32, 32], [5, 40, 70, 3, 0, 17], query_len + 1
    kv = kv_layer(heads[1], 32)
    tables = blocks_of([s + n + query_len for s, n in zip(shared, own)], 16, kv)
    tables[1, :6], tables[4:, :2] = tables[0, :6], tables[3, :2]
    lens = torch.tensor([query_len] * 4 + [0, query_len])
    query = randn(6 * places, heads[0], 32)
    is_token = torch.arange(places) < lens[:, None]
    query[~is_token.flatten()] = torch.nan
    rows = (tables, torch.tensor(shared) + torch.tensor(own), lens, 0.2)
    where = {"query_starts_R": torch.arange(6) * places, "max_query_len": query_len}
    prefixes = SharedPrefixes(
        query_starts_P=torch.tensor([0, 0, 3]) * places,
        query_lens_P=torch.tensor([2, 0, 3]) * places,
        rows_P=torch.tensor([0, 0, 3]),
        num_shared_R=torch.tensor(shared),
        max_query_len=3 * places,
    )
    expected = expected_of(query, kv, *rows, **where)
    for shared in (prefixes, None):
        got = attention.paged_attention(query, kv, *rows, **where, shared=shared)
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-5)
    # the prefix is read through the span's row alone: garbage in the blocks of another changes nothing
    tables[1, :6] = 0
    got = attention.paged_attention(query, kv, *rows, **where, shared=prefixes)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-5)


def test_a_long_context_is_cut_by_its_own_length(monkeypatch):
    """The parts follow from the row's length: none of a short row's lies in the rest of a long block table."""
    assert attention.choose_num_splits(2, 2, 1024, 132) == 8
    assert attention.choose_num_splits(2, 32, 1024, 132) == 4
    assert attention.choose_num_splits(600, 2, 1024, 132) == 1
    check(FLOAT32, [900, 10], [2, 1], heads=(2, 1))


def test_no_rows_or_tokens():
    kv, no_rows = kv_layer(2, 16), torch.zeros(0, dtype=torch.int64)
    for num_tokens in (0, 3):
        query = randn(num_tokens, 4, 16)
        got = attention.paged_attention(query, kv, no_rows.view(0, 4), no_rows, no_rows, 1.0)
        assert torch.equal(got, torch.zeros_like(query))


def test_a_broken_query_is_not_hidden(num_splits):
    query, kv = randn(2, 4, 32), kv_layer(2, 32)
    query[0, 1, 3] = torch.nan
    rows = (blocks_of([50, 7], 16, kv), torch.tensor([49, 6]), torch.tensor([1, 1]), 0.2)
    got = attention.paged_attention(query, kv, *rows)
    assert got[0, 1].isnan().all() and got.isnan().sum() == 32


def strided(num_tokens: int, heads: int, head_dim: int) -> torch.Tensor:
    """As a model hands it over: heads first, in a wider tensor."""
    return randn(heads, num_tokens, 2 * head_dim)[:, :, head_dim:].transpose(0, 1)


@pytest.mark.parametrize(("dtype", "cache_dtype"), [(torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize(("num_kv_heads", "head_dim", "block_size"), [(1, 16, 8), (3, 80, 16), (2, 128, 32)])
def test_store_kv(dtype, cache_dtype, num_kv_heads: int, head_dim: int, block_size: int):
    slots = torch.tensor([3, -1, 40, NUM_BLOCKS * block_size - 1, -7, 0])
    key, value = strided(6, num_kv_heads, head_dim).to(dtype), randn(6, num_kv_heads, head_dim, dtype=dtype)
    caches = [kv_layer(num_kv_heads, head_dim, block_size, cache_dtype) for _ in range(2)]
    before = caches[0].clone()
    for store, cache in zip((rotary.store_kv, reference.store_kv), caches):
        store(key, value, slots, cache)
        store(key[:0], value[:0], slots[:0], cache)
    assert torch.equal(*caches)
    assert torch.equal(caches[0][1, -1, :, -1], value[3].to(cache_dtype))
    assert (caches[0] != before).any(-1).sum() == 2 * 4 * num_kv_heads


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("norms", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 16), ((3, 1), 80), ((6, 2), 128), ((2, 2), 256)])
def test_rope_and_store(tolerance, norms, heads, head_dim: int):
    dtype, atol, rtol = tolerance
    slots, positions = torch.tensor([3, 40, -1, 17, 639]), torch.tensor([3, 4, 11, 0, 1])
    qkv = 3 * randn(5, 8 + (heads[0] + 2 * heads[1]) * head_dim, dtype=dtype)[:, 8:]
    weights = [randn(head_dim, dtype=dtype) if has else None for has in norms]
    angles = randn(12, head_dim // 2)
    got_cache = kv_layer(heads[1], head_dim, dtype=dtype)
    cache = got_cache.double()
    got = rotary.rope_and_store(qkv, *weights, 1e-6, angles.cos(), angles.sin(), positions, slots, got_cache)
    weights = [weight if weight is None else weight.double() for weight in weights]
    twin = reference.rope_and_store
    expected = twin(qkv.double(), *weights, 1e-6, angles.cos().double(), angles.sin().double(), positions, slots, cache)
    assert got.dtype == dtype and got.is_contiguous()
    torch.testing.assert_close(got.double(), expected, atol=atol, rtol=rtol)
    torch.testing.assert_close(got_cache.double(), cache, atol=atol, rtol=rtol)
    assert not len(rotary.rope_and_store(qkv[:0], *norms_of(0), angles, angles, positions[:0], slots[:0], got_cache))


def norms_of(eps: float) -> tuple[None, None, float]:
    return None, None, eps


def test_ops_are_found_by_device(monkeypatch):
    """A tensor on CPU goes to the twins, or to the kernels where tests ask for them: both give the same."""
    kv, key, slots = kv_layer(2, 32), randn(5, 2, 32), torch.arange(5)
    qkv, angles = randn(5, 8 * 32), randn(9, 16)
    rows = (blocks_of([5], 16, kv), torch.tensor([0]), torch.tensor([5]), 0.2)

    def outputs() -> list[torch.Tensor]:
        cache = kv.clone()
        atlas_kernels.store_kv(key, key, slots + 64, cache)
        query = atlas_kernels.rope_and_store(qkv, None, None, 0.0, angles, angles, slots, slots, cache)
        return [cache, query, atlas_kernels.paged_attention(query, cache.nan_to_num(), *rows, max_query_len=5)]

    twins = outputs()
    monkeypatch.setattr(atlas_kernels, "triton_everywhere", True)
    monkeypatch.setattr(atlas_kernels, "reference", None)
    for got, expected in zip(outputs(), twins):
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-5, equal_nan=True)


def attention_case(
    dtype: str, head_dim: int, groups: int, query_len: int, rows: int, *, spans=False, options=(None, None)
) -> Case:
    """A launch over contexts of 4096 tokens, 8 KV heads, on an H100."""
    num_pairs = query_len * groups
    tiling = attention.choose_tiling(num_pairs, head_dim, 2 if dtype == "*bf16" else 4)
    num_programs = rows * -(-num_pairs // tiling.block_m) * 8
    is_split = spans or attention.choose_num_splits(num_programs, min(num_pairs, tiling.block_m), 4096, 132) > 1
    numbers = ["tables_ptr", "starts_ptr", "query_starts_ptr", "query_lens_ptr", "rows_ptr", "num_shared_ptr"]
    scalars = ["num_tokens", "num_items", "num_tiles", "num_splits", "num_partials", "first_partial"]
    strides = ["stride_query_n", "stride_query_h", "stride_table"]
    arguments = dict.fromkeys(["query_ptr", "key_ptr", "value_ptr"], dtype)
    arguments |= {"out_ptr": "*fp32" if is_split else dtype, "lse_ptr": "*fp32", "scaling": "fp32"}
    arguments |= dict.fromkeys(numbers, "*i64") | dict.fromkeys(scalars + strides, "i32")
    absent = ([] if is_split else ["lse_ptr"]) + ([] if spans else ["rows_ptr", "num_shared_ptr"])
    constants = {
        "SPLIT": is_split,
        "SPANS": spans,
        "WINDOW": options[0],
        "SOFTCAP": options[1],
        "DOT_IN_FP32": False,
        "GROUPS": groups,
        "NUM_KV_HEADS": 8,
        "BLOCK_SIZE": 16,
        "HEAD_DIM": head_dim,
        "BLOCK_D": head_dim,
        "BLOCK_M": tiling.block_m,
        "TILE": tiling.tile,
        "BLOCK_ITEMS": 64 if spans else None,
    }
    return Case(
        module="atlas_kernels.attention_kernels",
        kernel="attention_kernel",
        arguments={name: kind for name, kind in arguments.items() if name not in absent},
        constants=constants | dict.fromkeys(absent),
        num_warps=tiling.num_warps,
        num_stages=attention.NUM_STAGES,
    )


def test_attention_compiles():
    shapes = [(2, 1, 1), (4, 1, 128), (4, 12, 64), (4, 70, 1), (4, 2048, 4)]
    cases = [attention_case("*bf16", 128, *shape) for shape in shapes]
    cases += [attention_case("*bf16", 64, *shape) for shape in shapes[1::2]]
    cases += [attention_case("*fp32", 128, *shape) for shape in shapes[::4]]
    cases += [
        attention_case("*bf16", 128, 2, 16, 8, spans=True),
        attention_case("*bf16", 256, 2, 1, 16, options=(4096, 50.0)),
        attention_case("*bf16", 256, 2, 2048, 1, options=(4096, 50.0)),
    ]
    for num_partials, head_dim in [(64, 128), (33, 256)]:
        cases.append(
            Case(
                module="atlas_kernels.attention_kernels",
                kernel="combine_kernel",
                arguments={"out_ptr": "*bf16", "partial_ptr": "*fp32", "lse_ptr": "*fp32"}
                | dict.fromkeys(["num_partials", "num_row_partials"], "i32"),
                constants={"HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_P": triton.next_power_of_2(num_partials)},
                num_warps=attention.combine_warps(num_partials, head_dim),
            )
        )
    check_compiles(cases)


def test_rotary_compiles():
    numbers = {"slots_ptr": "*i64", "stride_kv_2": "i64"}
    qkv = ["query_ptr", "qkv_ptr", "query_norm_ptr", "key_norm_ptr", "kv_ptr"]
    rope = dict.fromkeys(qkv, "*bf16") | {
        "cos_ptr": "*fp32",
        "sin_ptr": "*fp32",
        "positions_ptr": "*i64",
        "eps": "fp32",
    }
    store = dict.fromkeys(["key_ptr", "value_ptr", "kv_ptr"], "*bf16")
    strides = ["stride_key_n", "stride_key_h", "stride_value_n", "stride_value_h"]
    cases = []
    for head_dim in (64, 128):
        sizes = {"BLOCK_SIZE": 16, "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim}
        block_h = rotary.choose_block_h(32, head_dim)
        cases += [
            Case(
                module="atlas_kernels.rotary",
                kernel="rope_and_store_kernel",
                arguments=rope | numbers | {"stride_qkv_n": "i32"},
                constants=sizes | {"NUM_HEADS": 16, "BLOCK_H": block_h, "BLOCK_HALF": head_dim // 2},
            ),
            Case(
                module="atlas_kernels.rotary",
                kernel="store_kv_kernel",
                arguments=store | numbers | dict.fromkeys(strides, "i32"),
                constants=sizes | {"BLOCK_H": 8, "BLOCK_D": head_dim},
            ),
        ]
    check_compiles(cases)
