"""What `attention` launches.

Shapes: N tokens of R rows, P partials; H heads, G of them to a KV head, of D features; a layer of the cache is
[2, blocks, KV heads, S, D]. A program takes M queries, (token, head) pairs of one row and KV head, and walks T tokens at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: the difference of two is no NaN


@triton.jit
def attend(
    query_MD,
    position_M,
    begin,
    end,
    table_ptr,
    key_ptr,
    value_ptr,
    scaling,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
):
    """Softmax attention over the tokens begin … end - 1 of a block table, as far as each query's position sees them.

    Online: with m the highest score so far, l = sum 2^(s - m) and acc = sum 2^(s - m) v are rescaled whenever m rises.

    Returns:
        acc / l [M, D], and log2(sum 2^s) = m + log2(l) [M]; zeros and -inf where nothing is seen.
    """
    highest_M = tl.full([BLOCK_M], LOWEST, tl.float32)
    total_M = tl.full([BLOCK_M], 0, tl.float32)
    acc_MD = tl.full([BLOCK_M, BLOCK_D], 0, tl.float32)
    d = tl.arange(0, BLOCK_D)
    for first in range(begin, end, TILE):
        token_T = first + tl.arange(0, TILE)
        block_T = tl.load(table_ptr + token_T // BLOCK_SIZE, mask=token_T < end, other=0)
        place_T = block_T * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + token_T % BLOCK_SIZE * HEAD_DIM
        place_TD = place_T[:, None] + d[None, :]
        mask_TD = (token_T < end)[:, None] & (d < HEAD_DIM)[None, :]
        key_TD = tl.load(key_ptr + place_TD, mask=mask_TD, other=0.0).to(query_MD.dtype)
        score_MT = tl.dot(query_MD, tl.trans(key_TD), input_precision="ieee") * scaling
        if SOFTCAP is not None:  # c · tanh(s / c), tanh(x) = 1 - 2 / (e^2x + 1)
            score_MT = SOFTCAP - 2 * SOFTCAP / (tl.exp2(score_MT * (2 * LOG2_E / SOFTCAP)) + 1)
        seen_MT = (token_T[None, :] <= position_M[:, None]) & (token_T < end)[None, :]
        if WINDOW is not None:
            seen_MT &= token_T[None, :] > position_M[:, None] - WINDOW
        score_MT = tl.where(seen_MT, score_MT * LOG2_E, -float("inf"))
        higher_M = tl.maximum(highest_M, tl.max(score_MT, 1))
        weight_MT = tl.exp2(score_MT - higher_M[:, None])
        decay_M = tl.exp2(highest_M - higher_M)
        total_M = total_M * decay_M + tl.sum(weight_MT, 1)
        value_TD = tl.load(value_ptr + place_TD, mask=mask_TD, other=0.0).to(query_MD.dtype)
        acc_MD = acc_MD * decay_M[:, None]
        acc_MD = tl.dot(weight_MT.to(query_MD.dtype), value_TD, acc_MD, input_precision="ieee")
        highest_M = higher_M
    is_empty_M = total_M == 0
    total_M = tl.where(is_empty_M, 1.0, total_M)
    return acc_MD / total_M[:, None], tl.where(is_empty_M, -float("inf"), highest_M + tl.log2(total_M))


@triton.jit(
    do_not_specialize=(
        "stride_table",
        "num_tokens",
        "num_items",
        "num_tiles",
        "num_splits",
        "num_partials",
        "first_partial",
    ),
    do_not_specialize_on_alignment=(
        "tables_ptr",
        "starts_ptr",
        "query_starts_ptr",
        "query_lens_ptr",
        "rows_ptr",
        "num_shared_ptr",
    ),
)
def attention_kernel(
    out_ptr,
    lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    tables_ptr,
    starts_ptr,
    query_starts_ptr,
    query_lens_ptr,
    rows_ptr,
    num_shared_ptr,
    stride_query_n,
    stride_query_h,
    stride_table,
    scaling,
    num_tokens,
    num_items,
    num_tiles,
    num_splits,
    num_partials,
    first_partial,
    SPLIT: tl.constexpr,
    SPANS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
    GROUPS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
):
    """softmax(scaling Q K^T) V of M queries, over one of the parts of their context.

    A program reads its keys and values once for all its queries. It owns the places from its row's first token to the next row's
    and writes all of them, zeros where there is no token. SPANS: items are not rows but spans, which see all of num_shared tokens
    and no more. SPLIT: out and lse are float32 partials [N, H, partials(, D)]. Grid: (tiles of items, KV heads, splits).
    """
    program, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SPANS:  # one span's tiles after the other's; what programs are left over have nothing to do
        p = tl.arange(0, BLOCK_ITEMS)
        num_pairs_P = tl.load(query_lens_ptr + p, mask=p < num_items, other=0).to(tl.int32) * GROUPS
        num_tiles_P = (num_pairs_P + BLOCK_M - 1) // BLOCK_M
        item = tl.sum((tl.cumsum(num_tiles_P, 0) <= program).to(tl.int32), 0)
        if item >= num_items:
            return
        tile = program - tl.sum(tl.where(p < item, num_tiles_P, 0), 0)
        row = tl.load(rows_ptr + item).to(tl.int32)
    else:
        item, tile = program // num_tiles, num_tiles - 1 - program % num_tiles  # the longest tiles first
        row = item
    place = tl.load(query_starts_ptr + item)
    query_len = tl.load(query_lens_ptr + item).to(tl.int32)
    num_shared = 0
    if num_shared_ptr is not None:
        num_shared = tl.load(num_shared_ptr + row).to(tl.int32)

    pair_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token_M, head_M = pair_M // GROUPS, kv_head * GROUPS + pair_M % GROUPS
    num_owned = query_len
    if SPANS:
        begin, end, position_M = 0, num_shared, tl.full([BLOCK_M], 0, tl.int32) + num_shared
    else:
        start = tl.load(starts_ptr + row).to(tl.int32)
        begin, position_M = num_shared, start + token_M
        if WINDOW is not None:
            begin = tl.maximum(start + tile * BLOCK_M // GROUPS - WINDOW + 1, 0) // BLOCK_SIZE * BLOCK_SIZE
        end = start + tl.minimum(query_len, ((tile + 1) * BLOCK_M + GROUPS - 1) // GROUPS)
        next_place = tl.load(query_starts_ptr + item + 1, mask=item + 1 < num_items, other=num_tokens)
        num_owned = (next_place - place).to(tl.int32)
    position_M = tl.where(token_M < query_len, position_M, -1)  # sees nothing
    end = tl.where(tile * BLOCK_M < query_len * GROUPS, end, begin)
    part = (end - begin + num_splits * TILE - 1) // (num_splits * TILE) * TILE
    begin += split * part
    end = tl.minimum(end, begin + part)

    d = tl.arange(0, BLOCK_D)
    query_M = query_ptr + (place + token_M) * stride_query_n + head_M * stride_query_h
    query_mask_MD = (token_M < query_len)[:, None] & (d < HEAD_DIM)[None, :]
    query_MD = tl.load(query_M[:, None] + d[None, :], mask=query_mask_MD, other=0.0)
    out_MD, lse_M = attend(
        query_MD.to(tl.float32 if DOT_IN_FP32 else key_ptr.dtype.element_ty),
        position_M,
        begin,
        end,
        tables_ptr + row.to(tl.int64) * stride_table,
        key_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM),
        value_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM),
        scaling,
        WINDOW,
        SOFTCAP,
        NUM_KV_HEADS,
        BLOCK_SIZE,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_M,
        TILE,
    )

    last_pair = (tile + 1) * BLOCK_M
    if not SPANS and tile == num_tiles - 1:  # and whatever lies between here and the next row
        last_pair = tl.maximum(last_pair, num_owned * GROUPS)
    for first in range(tile * BLOCK_M, last_pair, BLOCK_M):
        pair_M = first + tl.arange(0, BLOCK_M)
        index_M = (place + pair_M // GROUPS) * (NUM_KV_HEADS * GROUPS) + kv_head * GROUPS + pair_M % GROUPS
        if SPLIT:
            index_M = index_M * num_partials + first_partial + split
            tl.store(lse_ptr + index_M, lse_M, mask=pair_M < num_owned * GROUPS)
        mask_MD = (pair_M < num_owned * GROUPS)[:, None] & (d < HEAD_DIM)[None, :]
        out_ptr_MD = out_ptr + index_M[:, None] * HEAD_DIM + d[None, :]
        tl.store(out_ptr_MD, out_MD.to(out_ptr.dtype.element_ty), mask=mask_MD)
        out_MD, lse_M = tl.full([BLOCK_M, BLOCK_D], 0, tl.float32), tl.full([BLOCK_M], -float("inf"), tl.float32)


@triton.jit(do_not_specialize=("num_partials", "num_row_partials"))
def combine_kernel(
    out_ptr,
    partial_ptr,
    lse_ptr,
    num_partials,
    num_row_partials,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """out = sum_p 2^lse_p partial_p / sum_p 2^lse_p, per token and head; zeros where a row's own partials are all empty.

    A token sees at least itself among those: where they are empty there is no token. Grid: (N · H,).
    """
    index = tl.program_id(0).to(tl.int64)
    p, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    lse_P = tl.load(lse_ptr + index * num_partials + p, mask=p < num_partials, other=-float("inf"))
    is_known_P = lse_P != -float("inf")
    is_token = tl.max((is_known_P & (p < num_row_partials)).to(tl.int32), 0) > 0
    mask_P = is_known_P & is_token  # elsewhere the memory was never written, or by a span that runs over a gap
    weight_P = tl.where(mask_P, tl.exp2(lse_P - tl.maximum(tl.max(lse_P, 0), LOWEST)), 0.0)
    partial_ptr_PD = partial_ptr + (index * num_partials + p)[:, None] * HEAD_DIM + d[None, :]
    partial_PD = tl.load(partial_ptr_PD, mask=mask_P[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    total = tl.sum(weight_P, 0)
    out_D = tl.sum(weight_P[:, None] * partial_PD, 0) / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + index * HEAD_DIM + d, out_D.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
