"""What `sampling.filter_thresholds` launches: cuts of a row of logits, without a sort."""

from __future__ import annotations

import triton
import triton.language as tl

from atlas_kernels.sampling_kernels import exp, without_forbidden


@triton.jit
def order_of(logit, SHIFT: tl.constexpr):
    """An int32 in the order of float32 values, less their SHIFT low bits, which no logit uses."""
    bits = logit.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def logits_and_order(
    logits_ptr,
    column,
    vocab_size,
    forbidden_ids_ptr,
    num_forbidden,
    inverse_temperature,
    SHIFT: tl.constexpr,
):
    """x = logit / T and `order_of` the logits; columns that are forbidden, or beyond the row, are as those of a logit of -inf."""
    logit = tl.load(logits_ptr + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
    if forbidden_ids_ptr is not None:
        logit = without_forbidden(logit, column, forbidden_ids_ptr, num_forbidden)
    return logit * inverse_temperature, order_of(logit, SHIFT)


@triton.jit
def kept_weight(
    lowest,
    highest,
    logits_ptr,
    vocab_size,
    forbidden_ids_ptr,
    num_forbidden,
    inverse_temperature,
    COUNT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Number, or sum of exp(x - highest), of a row's columns whose order is at least `lowest`."""
    totals = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x, order = logits_and_order(
            logits_ptr, column, vocab_size, forbidden_ids_ptr, num_forbidden, inverse_temperature, SHIFT
        )
        if COUNT:
            totals += tl.where(order >= lowest, 1.0, 0.0)
        else:
            totals += tl.where(order >= lowest, exp(x - highest), 0.0)
    return tl.sum(totals, 0)


@triton.jit
def lowest_kept(
    wanted,
    low,
    high,
    highest,
    logits_ptr,
    vocab_size,
    forbidden_ids_ptr,
    num_forbidden,
    inverse_temperature,
    COUNT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The highest order in low … high from which on the columns weigh at least `wanted`, as those from `low` on do."""
    while low < high:
        middle = low + (high - low + 1) // 2
        weight = kept_weight(
            middle.to(tl.int32),
            highest,
            logits_ptr,
            vocab_size,
            forbidden_ids_ptr,
            num_forbidden,
            inverse_temperature,
            COUNT,
            SHIFT,
            BLOCK,
        )
        # just what is wanted: done, an order between two columns parts them as well
        high = tl.where(weight > wanted, high, tl.where(weight == wanted, middle, middle - 1))
        low = tl.where(weight >= wanted, middle, low)
    return low


@triton.jit
def threshold_kernel(
    logits_ptr,
    logits_stride,
    forbidden_ids_ptr,
    is_forbidden_ptr,
    num_forbidden,
    out_ptr,
    inverse_temperature,
    vocab_size,
    top_k,
    top_p,
    top_p_span,
    log_min_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The lowest x = logit / T that top-k, then top-p, then min-p keep. Grid: (rows,).

    top-k: the highest value that k columns reach. top-p: the highest for which the columns that reach it hold the share top_p
    of what top-k left. Both by bisection on the order of the logits. min-p: the highest x + log(min_p).
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    if forbidden_ids_ptr is not None:
        num_forbidden = tl.where(tl.load(is_forbidden_ptr + row), num_forbidden, 0)
    lane = tl.arange(0, BLOCK)
    tops, top_orders = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], -(2**31) >> SHIFT, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        x, order = logits_and_order(
            logits_ptr,
            start + lane,
            vocab_size,
            forbidden_ids_ptr,
            num_forbidden,
            inverse_temperature,
            SHIFT,
        )
        tops, top_orders = tl.maximum(tops, x), tl.maximum(top_orders, order)
    highest = tl.max(tops, 0)
    threshold = highest + log_min_p

    if TOP_K or TOP_P:
        # 64 bits: sums and differences do not overflow
        low, high = tl.full([], -(2**31) >> SHIFT, tl.int64), tl.max(top_orders, 0).to(tl.int64)
        if TOP_K:
            low = lowest_kept(
                top_k,
                low,
                high,
                highest,
                logits_ptr,
                vocab_size,
                forbidden_ids_ptr,
                num_forbidden,
                inverse_temperature,
                True,
                SHIFT,
                BLOCK,
            )
        if TOP_P:
            total = kept_weight(
                low.to(tl.int32),
                highest,
                logits_ptr,
                vocab_size,
                forbidden_ids_ptr,
                num_forbidden,
                inverse_temperature,
                False,
                SHIFT,
                BLOCK,
            )
            # however many, the columns below hold less than 1 - top_p
            never_cut = order_of((highest - top_p_span) / inverse_temperature, SHIFT)
            low = lowest_kept(
                total * top_p,
                tl.maximum(low, never_cut),
                high,
                highest,
                logits_ptr,
                vocab_size,
                forbidden_ids_ptr,
                num_forbidden,
                inverse_temperature,
                False,
                SHIFT,
                BLOCK,
            )
        bottoms = tl.full([BLOCK], float("inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            x, order = logits_and_order(
                logits_ptr,
                start + lane,
                vocab_size,
                forbidden_ids_ptr,
                num_forbidden,
                inverse_temperature,
                SHIFT,
            )
            bottoms = tl.minimum(bottoms, tl.where(order >= low.to(tl.int32), x, float("inf")))
        threshold = tl.maximum(threshold, tl.min(bottoms, 0))
    tl.store(out_ptr + row, threshold)
