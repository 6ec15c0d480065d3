"""Coupled sampling in one pass over the logits, and filters without a sort. Shapes as in `reference.sampling`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from atlas_kernels.launching import num_multiprocessors
from atlas_kernels.noise import gumbel_of_bits, hash_rounds, hash_token

BLOCK, NUM_WARPS, PROGRAMS_PER_PROCESSOR = 1024, 4, 4
FILTER_BLOCK, FILTER_WARPS = 8192, 16
LOWEST = tl.constexpr(-3.4028234663852886e38)
NO_COLUMN = tl.constexpr(2**31 - 1)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x by the faster of the two instructions, which takes tiny results for 0."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def without_forbidden(x, token, forbidden_ids_ptr, num_forbidden):
    """x, -inf where the token is among the forbidden ids."""
    for i in range(num_forbidden):
        x = tl.where(token == tl.load(forbidden_ids_ptr + i), float("-inf"), x)
    return x


@triton.jit
def sample_kernel(
    logits_ptr,
    logits_stride,
    offset_ptr,
    stride_ptr,
    thresholds_ptr,
    forbidden_ids_ptr,
    is_forbidden_ptr,
    num_forbidden,
    token_ids_ptr,
    best_ptr,
    columns_ptr,
    bases_ptr,
    totals_ptr,
    inverse_temperature,
    vocab_size,
    chunk_size,
    BLOCK: tl.constexpr,
):
    """Of a chunk of a row's columns: the best x + g, x = logit / T, its column, and sum exp(x - base). Grid: (rows, chunks).

    As g = -log(-log1p(-v)) <= -log(v), a token can beat the best score so far only if v <= exp(x - best): a hash and one
    exponential per column, and no logarithm. A block with such tokens (the chunk's i-th is one with a chance of about 1 / i)
    takes their scores one at a time, the highest bound first. Margins cover the roundings on either side: the result is exact.

    `base` is the best score where anything may be drawn (it is within 23 of the highest x); a filtered row has its own.
    NaN and +inf leave a sum that is not finite.
    """
    FILTERED: tl.constexpr = thresholds_ptr is not None or forbidden_ids_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * chunk_size
    stop = tl.minimum(first + chunk_size, vocab_size)
    logits_ptr += row * logits_stride
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + row).to(tl.uint32, bitcast=True)
        stride = tl.load(stride_ptr + row).to(tl.uint32, bitcast=True)
    if thresholds_ptr is not None:
        threshold = tl.load(thresholds_ptr + row)
    if forbidden_ids_ptr is not None:
        num_forbidden = tl.where(tl.load(is_forbidden_ptr + row), num_forbidden, 0)

    lane = tl.arange(0, BLOCK)
    base, best, best_column = tl.full([], LOWEST, tl.float32), tl.full([], LOWEST, tl.float32), first
    totals = tl.full([BLOCK], 0.0, tl.float32)
    logit = tl.load(logits_ptr + first + lane, mask=first + lane < vocab_size, other=float("-inf"))
    for start in range(first, stop, BLOCK):
        column = start + lane
        x = logit.to(tl.float32) * inverse_temperature
        # the next block's logits are under way while this one's are worked on
        following = column + BLOCK
        mask = (following < vocab_size) & (start + BLOCK < stop)
        logit = tl.load(logits_ptr + following, mask=mask, other=float("-inf"))
        token = column
        if token_ids_ptr is not None:
            token = tl.load(token_ids_ptr + column, mask=column < vocab_size, other=-1).to(tl.int32)
            x = tl.where(token < 0, float("-inf"), x)
        drawn = x
        if thresholds_ptr is not None:
            drawn = tl.where(x < threshold, float("-inf"), drawn)
        if forbidden_ids_ptr is not None:
            drawn = without_forbidden(drawn, token, forbidden_ids_ptr, num_forbidden)
        exponential = exp(x - base)
        if offset_ptr is None:
            is_open = drawn > best
        else:
            hashed = hash_rounds(token.to(tl.uint32), offset, stride)
            one_and_v = ((hashed >> 9) | 0x3F800000).to(tl.float32, bitcast=True)  # of 16 certain bits
            weight = exp(drawn - best) if FILTERED else exponential
            is_open = one_and_v <= weight * (1.0001 + 2.5e-7 * tl.abs(best)) + 1.0000156
        if FILTERED:
            is_open = is_open | (x > base + 20.0)

        if tl.max(is_open.to(tl.int32), 0) > 0:
            highest = tl.max(drawn, 0)
            if offset_ptr is None:
                at = tl.min(tl.where(drawn == highest, column, NO_COLUMN), 0)
                best_column = tl.where(highest > best, at, best_column)
                best = tl.where(highest > best, highest, best)
            else:
                bits = (hashed ^ (hashed >> 16)) >> 1
                # exp(x - highest) / v, whose logarithm bounds the score, and in its last bits the lane
                bound = exp(drawn - highest) / (bits.to(tl.float32) + 0.5)
                bound = (bound.to(tl.int32, bitcast=True) & -BLOCK) | lane
                top = tl.max(bound, 0)
                while exceeds(top | (BLOCK - 1), best, highest):
                    at = start + (top & (BLOCK - 1))
                    token_at = at
                    if token_ids_ptr is not None:
                        token_at = tl.load(token_ids_ptr + at).to(tl.int32)
                    noise = gumbel_of_bits(hash_token(token_at.to(tl.uint32), offset, stride))
                    score = tl.load(logits_ptr + at).to(tl.float32) * inverse_temperature + noise
                    is_better = (score > best) | ((score == best) & (at < best_column))
                    best_column = tl.where(is_better, at, best_column)
                    best = tl.where(is_better, score, best)
                    bound = tl.where(bound == top, 0, bound)
                    top = tl.max(bound, 0)
            higher = tl.maximum(base, tl.max(x, 0)) if FILTERED else best
            totals *= exp(base - higher)
            base = higher
            exponential = exp(x - base)
        totals += exponential

    part = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_ptr + part, best)
    tl.store(columns_ptr + part, best_column)
    tl.store(bases_ptr + part, base)
    tl.store(totals_ptr + part, tl.sum(totals, 0))


@triton.jit
def exceeds(bound, best, highest):
    """Whether exp(highest) * bound * 2^31 > exp(best), less a margin; the bits of the bound are given.

    Never for a bound of 0: a token that has none, or had its turn, is not looked at, whatever else the row holds.
    """
    margin = 1e-3 + 2.5e-7 * tl.abs(best)
    lowest = tl.exp2((best - highest - margin) * LOG2_E - 31.0)
    return bound.to(tl.float32, bitcast=True) > tl.maximum(lowest, 1e-20)


@triton.jit
def combine_kernel(
    logits_ptr,
    logits_stride,
    token_ids_ptr,
    best_ptr,
    columns_ptr,
    bases_ptr,
    totals_ptr,
    tokens_ptr,
    logprobs_ptr,
    inverse_temperature,
    num_chunks,
    CHUNKS: tl.constexpr,
):
    """A row's token, the lowest column of the best score, and its x - log sum exp(x). Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    part, mask = row * num_chunks + chunk, chunk < num_chunks
    best = tl.load(best_ptr + part, mask, other=float("-inf"))
    columns = tl.load(columns_ptr + part, mask, other=NO_COLUMN)
    column = tl.min(tl.where(best == tl.max(best, 0), columns, NO_COLUMN), 0)
    bases = tl.load(bases_ptr + part, mask, other=LOWEST)
    base = tl.max(bases, 0)
    total = tl.sum(tl.load(totals_ptr + part, mask, other=0.0) * tl.exp(bases - base), 0)
    x = tl.load(logits_ptr + row * logits_stride + column).to(tl.float32) * inverse_temperature
    token = column.to(tl.int64)
    if token_ids_ptr is not None:
        token = tl.load(token_ids_ptr + column)
    logprob = x - base - tl.log(total)
    tl.store(tokens_ptr + row, token)
    tl.store(logprobs_ptr + row, tl.where(total < float("inf"), logprob, float("nan")))


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


def chunk_sizes(num_rows: int, vocab_size: int, num_processors: int) -> tuple[int, int]:
    """Columns of a chunk, a multiple of BLOCK, and number of chunks of a row.

    Few programs, as the first blocks of each are its dearest, but enough to hide the latency of their loads.
    """
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    wanted = max(PROGRAMS_PER_PROCESSOR * num_processors // num_rows, 1)
    chunk_blocks = triton.cdiv(num_blocks, wanted)
    return chunk_blocks * BLOCK, triton.cdiv(num_blocks, chunk_blocks)


def coupled_sample(
    logits_NV: torch.Tensor,
    keys_2N: torch.Tensor | None,
    temperature: float,
    *,
    thresholds_N: torch.Tensor | None = None,
    forbidden: tuple[torch.Tensor, torch.Tensor] | None = None,
    token_ids_V: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same as `reference.coupled_sample`, up to float ties (logits are multiplied by 1 / T). Rows of logits are contiguous.

    Reads the logits once: 2 N V bytes in 16 bits, and 8 V of token ids, where given. Integer arithmetic is the next bound.
    """
    num_rows, vocab_size = logits_NV.shape
    device = logits_NV.device
    tokens_N = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs_N = torch.empty(num_rows, dtype=torch.float32, device=device)
    if not num_rows:
        return tokens_N, logprobs_N
    offsets_N, strides_N = (None, None) if keys_2N is None else keys_2N
    ids_F, is_forbidden_N = forbidden or (None, None)
    chunk_size, num_chunks = chunk_sizes(num_rows, vocab_size, num_multiprocessors(device))
    best_NC, bases_NC, totals_NC = torch.empty(3, num_rows, num_chunks, dtype=torch.float32, device=device)
    columns_NC = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=device)
    parts = (best_NC, columns_NC, bases_NC, totals_NC)
    sample_kernel[(num_rows, num_chunks)](
        logits_NV,
        logits_NV.stride(0),
        offsets_N,
        strides_N,
        thresholds_N,
        ids_F,
        is_forbidden_N,
        0 if ids_F is None else len(ids_F),
        token_ids_V,
        *parts,
        1 / temperature,
        vocab_size,
        chunk_size,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    combine_kernel[(num_rows,)](
        logits_NV,
        logits_NV.stride(0),
        token_ids_V,
        *parts,
        tokens_N,
        logprobs_N,
        1 / temperature,
        num_chunks,
        CHUNKS=triton.next_power_of_2(num_chunks),
        num_warps=1,
    )
    return tokens_N, logprobs_N


UNUSED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""The low bits of a float32 that are 0 in every value of a type."""


def filter_thresholds(
    logits_NV: torch.Tensor,
    temperature: float,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    forbidden: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Same as `reference.filter_thresholds`, up to float ties. Rows of logits are contiguous.

    Reads the logits once for min-p; for top-k and top-p up to 16 times each (32-bit logits: 32), out of the L2 cache.
    """
    num_rows, vocab_size = logits_NV.shape
    thresholds_N = torch.empty(num_rows, dtype=torch.float32, device=logits_NV.device)
    ids_F, is_forbidden_N = forbidden or (None, None)
    if num_rows:
        threshold_kernel[(num_rows,)](
            logits_NV,
            logits_NV.stride(0),
            ids_F,
            is_forbidden_N,
            0 if ids_F is None else len(ids_F),
            thresholds_N,
            1 / temperature,
            vocab_size,
            min(top_k, vocab_size),
            float(top_p),
            math.log(vocab_size / (1 - top_p)) + 0.01 if top_p < 1 else 0.0,
            math.log(min_p) if min_p else -math.inf,
            TOP_K=top_k > 0,
            TOP_P=top_p < 1,
            SHIFT=UNUSED_BITS[logits_NV.dtype],
            BLOCK=FILTER_BLOCK,
            num_warps=FILTER_WARPS,
        )
    return thresholds_N
