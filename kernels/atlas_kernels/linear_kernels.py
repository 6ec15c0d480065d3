"""Kernels of `linears`.

Shapes: N rows, D features, O outputs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, size, eps, BLOCK_D: tl.constexpr):
    """out = x / sqrt(mean(x²) + eps) · weight. Grid: (rows,)."""
    column = tl.arange(0, BLOCK_D)
    inside = column < size
    place = tl.program_id(0).to(tl.int64) * size + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x) / size + eps) * weight
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_kernel(gate_ptr, up_ptr, stride, out_ptr, size, BLOCK: tl.constexpr):
    """out = silu(gate) · up, rows of both `stride` apart. Grid: (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * size + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def locate(
    w0_ptr,
    w1_ptr,
    w2_ptr,
    width_0,
    width_1,
    width_2,
    NUM_WEIGHTS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Of this program's tile: pointer (of a weight or a bias), columns in it, its width, and where it begins in the output."""
    tile = tl.program_id(0)
    pointer, width, begin = w0_ptr, width_0, width_0 * 0
    if NUM_WEIGHTS > 1 and not GATED:
        tiles_0, tiles_1 = (width_0 + BLOCK_O - 1) // BLOCK_O, (width_1 + BLOCK_O - 1) // BLOCK_O
        if tile >= tiles_0 + tiles_1:
            pointer, width, begin = w2_ptr, width_2, width_0 + width_1
            tile -= tiles_0 + tiles_1
        elif tile >= tiles_0:
            pointer, width, begin = w1_ptr, width_1, width_0
            tile -= tiles_0
    return pointer, tile * BLOCK_O + tl.arange(0, BLOCK_O), width, begin


@triton.jit
def finish(
    y,
    up,
    squares,
    bias_ptr,
    up_bias_ptr,
    residual_ptr,
    out_ptr,
    row,
    num_rows,
    column,
    width,
    begin,
    total,
    size,
    eps,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Scale by the norm, add biases, gate, add the residual, and store a tile [rows, columns]."""
    if NORM:
        scale = tl.rsqrt(squares / size + eps)[:, None]
        y *= scale
        up *= scale
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if BIAS:
            up += tl.load(up_bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        y = y / (1.0 + tl.exp(-y)) * up
    place = row.to(tl.int64)[:, None] * total + (begin + column)[None, :]
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_to_rows(sums, value, ones, DOT_DTYPE: tl.constexpr):
    """sums + the sums of the rows of value, by dots with ones: a value of 16 bits and what it lacks. So a tile that is an operand
    of another dot as well keeps that dot's layout, for which it lies in shared memory without bank conflicts."""
    rounded = value.to(DOT_DTYPE)
    sums = tl.dot(rounded, ones, sums, input_precision="ieee")
    if rounded.dtype != tl.float32:
        sums = tl.dot((value - rounded.to(tl.float32)).to(DOT_DTYPE), ones, sums)
    return sums


@triton.jit(do_not_specialize=["num_rows"])  # or a captured graph would meet a number for which nothing is compiled
def linear_kernel(
    x_ptr,
    norm_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    size,
    width_0,
    width_1,
    width_2,
    eps,
    NUM_WEIGHTS: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHAINS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """A tile of columns of `fused_linear`, for all rows. Grid: (tiles of all weights, SPLIT_D).

    y = rsqrt(mean(x²) + eps) · (x · norm) W^T: the sum of x² comes along with the product, so x is read once.

    A product of few rows waits for each step of its sum over D. So a block of D is cut into CHAINS parts, the batch of one dot:
    warps sum a part each, side by side. With SPLIT_D > 1 (no norm, no gate) a program takes its share of D alone, and its sums
    go to `out` [SPLIT_D, rows, columns] for `combine_kernel`.
    """
    PART: tl.constexpr = BLOCK_D // CHAINS
    DOT_DTYPE: tl.constexpr = tl.float32 if IN_FLOAT32 else w0_ptr.dtype.element_ty
    row = tl.arange(0, BLOCK_N)
    weight_ptr, column, width, begin = locate(
        w0_ptr, w1_ptr, w2_ptr, width_0, width_1, width_2, NUM_WEIGHTS, GATED, BLOCK_O
    )
    part = tl.arange(0, CHAINS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
    x_ptrs = x_ptr + row[None, :, None] * size
    w_offsets = column.to(tl.int64)[None, :, None] * size
    row_inside, column_inside = (row < num_rows)[None, :, None], (column < width)[None, :, None]
    y = tl.full([CHAINS, BLOCK_N, BLOCK_O], 0.0, tl.float32)
    up = y
    squares, ones = tl.full([CHAINS, BLOCK_N, 8], 0.0, tl.float32), tl.full([CHAINS, PART, 8], 1.0, DOT_DTYPE)
    num_blocks = (size + BLOCK_D - 1) // BLOCK_D
    share = (num_blocks + SPLIT_D - 1) // SPLIT_D * BLOCK_D
    start = tl.program_id(1) * share
    for first in range(start, tl.minimum(start + share, size), BLOCK_D):
        d = first + part
        x = tl.load(x_ptrs + d, mask=row_inside & (d < size), other=0.0)
        if NORM:
            x = x.to(tl.float32)
            squares = add_to_rows(squares, x * x, ones, DOT_DTYPE)
            x *= tl.load(norm_ptr + d, mask=d < size, other=0.0).to(tl.float32)
        x = x.to(DOT_DTYPE)
        w = tl.load(weight_ptr + w_offsets + d, mask=column_inside & (d < size), other=0.0).to(DOT_DTYPE)
        y = tl.dot(x, tl.permute(w, (0, 2, 1)), y, input_precision="ieee")
        if GATED:
            w = tl.load(w1_ptr + w_offsets + d, mask=column_inside & (d < size), other=0.0).to(DOT_DTYPE)
            up = tl.dot(x, tl.permute(w, (0, 2, 1)), up, input_precision="ieee")
    y, up, squares = tl.sum(y, 0), tl.sum(up, 0), tl.sum(tl.sum(squares, 0), 1) / 8
    total = width_0 if GATED else width_0 + width_1 + width_2
    if SPLIT_D == 1:
        bias_ptr = b0_ptr
        if BIAS:
            bias_ptr, _, _, _ = locate(b0_ptr, b1_ptr, b2_ptr, width_0, width_1, width_2, NUM_WEIGHTS, GATED, BLOCK_O)
        finish(
            y, up, squares, bias_ptr, b1_ptr, residual_ptr, out_ptr, row, num_rows, column, width, begin, total, size, eps,
            NORM, BIAS, GATED,
        )  # fmt: skip
    else:
        place = (tl.program_id(1) * num_rows + row).to(tl.int64)[:, None] * total + (begin + column)[None, :]
        tl.store(out_ptr + place, y, mask=(row < num_rows)[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(
    shares_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    width_0,
    width_1,
    width_2,
    NUM_WEIGHTS: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Sum what `linear_kernel`'s programs made of their shares of D, in order. Grid: (tiles of all weights,)."""
    row = tl.arange(0, BLOCK_N)
    if BIAS:
        bias_ptr, column, width, begin = locate(
            b0_ptr, b1_ptr, b2_ptr, width_0, width_1, width_2, NUM_WEIGHTS, False, BLOCK_O
        )
    else:  # a function that is compiled may not return None: any pointer will do
        bias_ptr, column, width, begin = locate(
            shares_ptr, shares_ptr, shares_ptr, width_0, width_1, width_2, NUM_WEIGHTS, False, BLOCK_O
        )
    total = width_0 + width_1 + width_2
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    y = tl.full([BLOCK_N, BLOCK_O], 0.0, tl.float32)
    for share in tl.static_range(SPLIT_D):
        place = (share * num_rows + row).to(tl.int64)[:, None] * total + (begin + column)[None, :]
        y += tl.load(shares_ptr + place, mask=inside, other=0.0)
    finish(
        y, y, 1.0, bias_ptr, bias_ptr, residual_ptr, out_ptr, row, num_rows, column, width, begin, total, 1, 0.0,
        False, BIAS, False,
    )  # fmt: skip


@triton.jit
def vector_kernel(
    x_ptr,
    norm_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    residual_ptr,
    out_ptr,
    size,
    width_0,
    width_1,
    width_2,
    eps,
    NUM_WEIGHTS: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`linear_kernel` of a single row, without tensor cores: sums over D stay apart in registers to the end. Grid: (tiles,)."""
    weight_ptr, column, width, begin = locate(
        w0_ptr, w1_ptr, w2_ptr, width_0, width_1, width_2, NUM_WEIGHTS, GATED, BLOCK_O
    )
    w_offsets, column_inside = column.to(tl.int64)[:, None] * size, (column < width)[:, None]
    y = tl.full([BLOCK_O, BLOCK_D], 0.0, tl.float32)
    up = y
    squares = tl.full([1, BLOCK_D], 0.0, tl.float32)
    for first in range(0, size, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        inside = column_inside & (d < size)
        w = tl.load(weight_ptr + w_offsets + d, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + d, mask=d < size, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + d, mask=d < size, other=0.0).to(tl.float32)
        y += w * x
        if GATED:
            up += tl.load(w1_ptr + w_offsets + d, mask=inside, other=0.0).to(tl.float32) * x
    bias_ptr = b0_ptr
    if BIAS:
        bias_ptr, _, _, _ = locate(b0_ptr, b1_ptr, b2_ptr, width_0, width_1, width_2, NUM_WEIGHTS, GATED, BLOCK_O)
    total = width_0 if GATED else width_0 + width_1 + width_2
    finish(
        tl.sum(y, 1)[None, :], tl.sum(up, 1)[None, :], tl.sum(squares, 1), bias_ptr, b1_ptr, residual_ptr, out_ptr,
        tl.arange(0, 1), 1, column, width, begin, total, size, eps, NORM, BIAS, GATED,
    )  # fmt: skip
