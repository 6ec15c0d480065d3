"""What `sampling.coupled_sample` launches. Shapes as in `reference.sampling`."""

from __future__ import annotations

import triton
import triton.language as tl

from atlas_kernels.noise import gumbel_of_bits, hash_rounds, hash_token

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
