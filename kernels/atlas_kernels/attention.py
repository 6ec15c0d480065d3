"""Attention over a paged KV cache, for a few tokens of many rows (decoding) as for many of a few (prefill).

Shapes: N tokens of R rows, M blocks of a row; H heads of D features; a layer of the cache is [2, blocks, KV heads, S, D].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from atlas_kernels.attention_kernels import attention_kernel, combine_kernel
from atlas_kernels.launching import INTERPRETED, num_multiprocessors
from atlas_kernels.reference import SharedPrefixes

TILE_BYTES = 16384
"""Of keys, and again of values, twice each: three programs fit a multiprocessor, with a tile or two of each under way."""
NUM_STAGES = 5
"""A block id, then what it leads to: Triton's pipeline needs five stages to fetch a tile while it computes on another."""
MIN_PART, MIN_PART_PER_PAIR = 128, 8
"""The parts of a context as long as a block table can hold are of at least so many tokens, and of so many per (token, head) pair
that reads them: then results take at most a quarter of the bytes that keys and values do, in bf16."""
MAX_SPLITS = 32
PROGRAMS_PER_MULTIPROCESSOR = 4
"""From so many on, cutting contexts buys nothing."""


class Tiling(NamedTuple):
    """Of a program: (token, head) pairs at once, tokens of their context at a time, warps."""

    block_m: int
    tile: int
    num_warps: int


class Launch(NamedTuple):
    """Of `attention_kernel`, over rows, or over spans that see the shared start of the contexts of `rows`."""

    query_starts: torch.Tensor
    query_lens: torch.Tensor
    rows: torch.Tensor | None
    tiling: Tiling
    num_programs: int
    """Per KV head and part of the contexts."""
    num_tiles: int
    """Of each row."""
    num_splits: int
    """Parts of each context."""


def choose_tiling(num_pairs: int, head_dim: int, itemsize: int) -> Tiling:
    """For up to so many (token, head) pairs of a row or span and a KV head, and KV elements of so many bytes.

    The accumulators, block_m · D of float32, stay within 64 registers of a thread.
    """
    row_bytes = triton.next_power_of_2(head_dim) * itemsize
    tile = min(max(TILE_BYTES // row_bytes, 16), 128)
    block_m, num_warps = min(max(triton.next_power_of_2(num_pairs), 16), 128), 4
    if itemsize == 4:  # plain multiply-adds, which hold rows in registers as a whole
        block_m, tile, num_warps = min(block_m, 32), min(max(tile // 2, 16), 32), 4 if row_bytes <= 512 else 8
    elif block_m == 128 and row_bytes <= 256:
        num_warps = 8
    elif block_m >= 64:
        block_m, tile = 64, max(tile // 2, 16)
    return Tiling(block_m, tile, num_warps)


def choose_num_splits(num_programs: int, num_pairs: int, max_context: int, num_processors: int) -> int:
    """Into how many parts contexts are cut to keep all multiprocessors busy, at so many busy programs and pairs of each."""
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * num_processors, num_programs)
    useful = max_context // max(MIN_PART, MIN_PART_PER_PAIR * num_pairs)
    return max(1, min(wanted, useful, MAX_SPLITS))


def combine_warps(num_partials: int, head_dim: int) -> int:
    """Of `combine_kernel`, for at most 64 float32 of partials in a thread."""
    num_elements = triton.next_power_of_2(num_partials) * triton.next_power_of_2(head_dim)
    return min(max(num_elements // 2048, 1), 8)


def _launch_rows(
    query_NHD: torch.Tensor,
    kv_2BHSD: torch.Tensor,
    max_context: int,
    query_starts_R: torch.Tensor,
    query_lens_R: torch.Tensor,
    max_query_len: int,
) -> Launch:
    num_rows, num_kv_heads, head_dim = len(query_lens_R), kv_2BHSD.shape[2], kv_2BHSD.shape[4]
    num_pairs = max_query_len * query_NHD.shape[1] // num_kv_heads
    tiling = choose_tiling(num_pairs, head_dim, kv_2BHSD.element_size())
    num_tiles = triton.cdiv(num_pairs, tiling.block_m)
    num_processors = num_multiprocessors(query_NHD.device)
    busy, num_pairs = num_rows * num_tiles * num_kv_heads, min(num_pairs, tiling.block_m)
    num_splits = choose_num_splits(busy, num_pairs, max_context, num_processors)
    return Launch(query_starts_R, query_lens_R, None, tiling, num_rows * num_tiles, num_tiles, num_splits)


def _launch_spans(query_NHD: torch.Tensor, kv_2BHSD: torch.Tensor, max_context: int, shared: SharedPrefixes) -> Launch:
    """Which spans are how long, only the device knows: together they have at most N tokens, and may all be one."""
    num_tokens, num_heads, head_dim = query_NHD.shape
    num_kv_heads = kv_2BHSD.shape[2]
    groups = num_heads // num_kv_heads
    # spans are mostly far shorter than the longest possible: more than 64 pairs at once would be idle, and their buffers idle too
    tiling = choose_tiling(min(shared.max_query_len * groups, 64), head_dim, kv_2BHSD.element_size())
    num_full = num_tokens * groups // tiling.block_m
    num_programs = num_full + min(len(shared.rows_P), len(shared.num_shared_R))
    num_processors = num_multiprocessors(query_NHD.device)
    num_splits = choose_num_splits(max(num_full, 1) * num_kv_heads, tiling.block_m, max_context, num_processors)
    return Launch(*shared[:3], tiling, num_programs, 0, num_splits)


def paged_attention(
    query_NHD: torch.Tensor,
    kv_2BHSD: torch.Tensor,
    block_tables_RM: torch.Tensor,
    starts_R: torch.Tensor,
    query_lens_R: torch.Tensor,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    query_starts_R: torch.Tensor | None = None,
    max_query_len: int | None = None,
    shared: SharedPrefixes | None = None,
) -> torch.Tensor:
    """Same as `reference.paged_attention`. No host sync, so that it can be captured: grids follow from shapes and host numbers.

    Where rows are too few to fill the device, each one's context is cut into parts, whose results a second kernel combines.
    A shared prefix is one more such part, read once for all tokens of its span.

    Bound by reading keys and values, 2 · context · KV heads · D elements per row (of a shared prefix, per span), which is done
    once for up to 128 (token, head) pairs of a KV head. With more of them, by the matrix products.
    """
    num_tokens, num_heads, head_dim = query_NHD.shape
    num_rows, num_blocks = block_tables_RM.shape
    _, _, num_kv_heads, block_size, _ = kv_2BHSD.shape
    key_BHSD, value_BHSD = kv_2BHSD
    assert query_NHD.stride(2) == 1 and block_tables_RM.stride(1) == 1 and key_BHSD.is_contiguous()
    assert not (shared and sliding_window)
    out_NHD = query_NHD.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens == 0 or num_rows == 0:
        return out_NHD.zero_()
    if query_starts_R is None:
        query_starts_R = query_lens_R.cumsum(0) - query_lens_R
    max_query_len, max_context = max_query_len or num_tokens, num_blocks * block_size
    if sliding_window:
        max_context = min(max_context, sliding_window + max_query_len)
    rows = (query_starts_R, query_lens_R, max_query_len)
    launches = [_launch_rows(query_NHD, kv_2BHSD, max_context, *rows)]
    if shared:
        launches.append(_launch_spans(query_NHD, kv_2BHSD, max_context, shared))
    num_partials = sum(launch.num_splits for launch in launches)
    parts_NHPD, lse_NHP = out_NHD, None
    if num_partials > 1:
        parts_NHPD = out_NHD.new_empty(num_tokens, num_heads, num_partials, head_dim, dtype=torch.float32)
        lse_NHP = parts_NHPD.new_empty(parts_NHPD.shape[:3])
        if shared:
            lse_NHP.fill_(-torch.inf)  # of tokens outside all spans

    block_d = triton.next_power_of_2(head_dim)
    first_partial = 0
    for launch in launches:
        attention_kernel[(launch.num_programs, num_kv_heads, launch.num_splits)](
            parts_NHPD,
            lse_NHP,
            query_NHD,
            key_BHSD,
            value_BHSD,
            block_tables_RM,
            starts_R,
            launch.query_starts,
            launch.query_lens,
            launch.rows,
            shared.num_shared_R if shared else None,
            query_NHD.stride(0),
            query_NHD.stride(1),
            block_tables_RM.stride(0),
            scaling,
            num_tokens,
            len(launch.query_lens),
            launch.num_tiles,
            launch.num_splits,
            num_partials,
            first_partial,
            SPLIT=num_partials > 1,
            SPANS=launch.rows is not None,
            WINDOW=sliding_window or None,
            SOFTCAP=softcap or None,
            DOT_IN_FP32=INTERPRETED and kv_2BHSD.dtype == torch.bfloat16,
            GROUPS=num_heads // num_kv_heads,
            NUM_KV_HEADS=num_kv_heads,
            BLOCK_SIZE=block_size,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_M=launch.tiling.block_m,
            TILE=launch.tiling.tile,
            BLOCK_ITEMS=triton.next_power_of_2(len(launch.query_lens)) if launch.rows is not None else None,
            num_warps=launch.tiling.num_warps,
            num_stages=NUM_STAGES,
        )
        first_partial += launch.num_splits
    if num_partials > 1:
        combine_kernel[(num_tokens * num_heads,)](
            out_NHD,
            parts_NHPD,
            lse_NHP,
            num_partials,
            launches[0].num_splits,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_P=triton.next_power_of_2(num_partials),
            num_warps=combine_warps(num_partials, head_dim),
        )
    return out_NHD
