"""Keys and values into the paged cache, on their own or with the norms and the rotation before it.

Shapes: N tokens, heads of D features; a layer of the cache is [2, blocks, KV heads, S, D]; a slot is block * S + offset.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAM_FEATURES = 1024
"""A program of `rope_and_store` takes as many heads of a token as hold so many features."""


@triton.jit
def store_kv_kernel(
    key_ptr,
    value_ptr,
    slots_ptr,
    kv_ptr,
    stride_key_n,
    stride_key_h,
    stride_value_n,
    stride_value_h,
    stride_kv_2,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """cache[slot] = a token's keys and values, nothing where slot < 0. Grid: (N,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    h, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (h < NUM_KV_HEADS) & (d < HEAD_DIM) & (slot >= 0)
    key = tl.load(key_ptr + token * stride_key_n + h * stride_key_h + d, mask=mask)
    value = tl.load(value_ptr + token * stride_value_n + h * stride_value_h + d, mask=mask)
    head = slot // BLOCK_SIZE * NUM_KV_HEADS + h
    place = kv_ptr + (head * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + d
    tl.store(place, key.to(kv_ptr.dtype.element_ty), mask=mask)
    tl.store(place + stride_kv_2, value.to(kv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rope_and_store_kernel(
    query_ptr,
    qkv_ptr,
    query_norm_ptr,
    key_norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    kv_ptr,
    eps,
    stride_qkv_n,
    stride_kv_2,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """[a; b] · weight / sqrt(mean + eps) of a query's or key's halves, then [a cos - b sin; b cos + a sin]; values as they are.

    All in float32, rounded once. Queries go to their own tensor, keys and values to slots >= 0. Grid: (N, heads / BLOCK_H).
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_HALF)[None, :]
    is_query, is_value = h < NUM_HEADS, h >= NUM_HEADS + NUM_KV_HEADS
    mask = (h < NUM_HEADS + 2 * NUM_KV_HEADS) & (d < HALF)
    qkv_ptr += token * stride_qkv_n + h * HEAD_DIM + d
    a = tl.load(qkv_ptr, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(qkv_ptr + HALF, mask=mask, other=0.0).to(tl.float32)

    scale = 1.0 / tl.sqrt(tl.sum(a * a + b * b, 1) / HEAD_DIM + eps)[:, None]
    normed_a, normed_b = a, b
    if query_norm_ptr is not None:
        weight_a = tl.load(query_norm_ptr + d, mask=d < HALF, other=0.0).to(tl.float32)
        weight_b = tl.load(query_norm_ptr + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)
        normed_a = tl.where(is_query, a * scale * weight_a, normed_a)
        normed_b = tl.where(is_query, b * scale * weight_b, normed_b)
    if key_norm_ptr is not None:
        weight_a = tl.load(key_norm_ptr + d, mask=d < HALF, other=0.0).to(tl.float32)
        weight_b = tl.load(key_norm_ptr + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)
        normed_a = tl.where(is_query, normed_a, a * scale * weight_a)
        normed_b = tl.where(is_query, normed_b, b * scale * weight_b)
    angle = tl.load(positions_ptr + token) * HALF + d
    cos = tl.load(cos_ptr + angle, mask=d < HALF, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=d < HALF, other=0.0)
    rotated_a = tl.where(is_value, a, normed_a * cos - normed_b * sin)
    rotated_b = tl.where(is_value, b, normed_b * cos + normed_a * sin)

    query_ptr += (token * NUM_HEADS + h) * HEAD_DIM + d
    tl.store(query_ptr, rotated_a.to(query_ptr.dtype.element_ty), mask=mask & is_query)
    tl.store(query_ptr + HALF, rotated_b.to(query_ptr.dtype.element_ty), mask=mask & is_query)
    slot = tl.load(slots_ptr + token)
    head = slot // BLOCK_SIZE * NUM_KV_HEADS + h - NUM_HEADS - tl.where(is_value, NUM_KV_HEADS, 0)
    kv_ptr += (head * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + d + tl.where(is_value, 1, 0) * stride_kv_2
    mask_kv = mask & (h >= NUM_HEADS) & (slot >= 0)
    tl.store(kv_ptr, rotated_a.to(kv_ptr.dtype.element_ty), mask=mask_kv)
    tl.store(kv_ptr + HALF, rotated_b.to(kv_ptr.dtype.element_ty), mask=mask_kv)


def store_kv(key_NHD: torch.Tensor, value_NHD: torch.Tensor, slots_N: torch.Tensor, kv_2BHSD: torch.Tensor) -> None:
    """Same as `reference.store_kv`. Bound by bytes: reads each key and value once, writes it once."""
    _, _, num_kv_heads, block_size, head_dim = kv_2BHSD.shape
    assert kv_2BHSD[0].is_contiguous() and key_NHD.stride(2) == value_NHD.stride(2) == 1
    if len(slots_N) == 0:
        return
    store_kv_kernel[(len(slots_N),)](
        key_NHD,
        value_NHD,
        slots_N,
        kv_2BHSD,
        *key_NHD.stride()[:2],
        *value_NHD.stride()[:2],
        kv_2BHSD.stride(0),
        BLOCK_SIZE=block_size,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_H=triton.next_power_of_2(num_kv_heads),
        BLOCK_D=triton.next_power_of_2(head_dim),
    )


def choose_block_h(num_heads: int, head_dim: int) -> int:
    """Heads of a program of `rope_and_store`, of all heads of a token."""
    return triton.next_power_of_2(min(num_heads, max(1, PROGRAM_FEATURES // head_dim)))


def rope_and_store(
    qkv_ND: torch.Tensor,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
    cos_PD: torch.Tensor,
    sin_PD: torch.Tensor,
    positions_N: torch.Tensor,
    slots_N: torch.Tensor,
    kv_2BHSD: torch.Tensor,
) -> torch.Tensor:
    """Same as `reference.rope_and_store`, the queries in a tensor of their own. Bound by bytes: qkv read once, written once."""
    _, _, num_kv_heads, block_size, head_dim = kv_2BHSD.shape
    num_tokens, num_all_heads = len(qkv_ND), qkv_ND.shape[1] // head_dim
    num_heads = num_all_heads - 2 * num_kv_heads
    assert kv_2BHSD[0].is_contiguous() and qkv_ND.stride(1) == 1 and cos_PD.is_contiguous() and sin_PD.is_contiguous()
    query_NHD = qkv_ND.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens == 0:
        return query_NHD
    block_h = choose_block_h(num_all_heads, head_dim)
    rope_and_store_kernel[(num_tokens, triton.cdiv(num_all_heads, block_h))](
        query_NHD,
        qkv_ND,
        query_norm,
        key_norm,
        cos_PD,
        sin_PD,
        positions_N,
        slots_N,
        kv_2BHSD,
        eps,
        qkv_ND.stride(0),
        kv_2BHSD.stride(0),
        BLOCK_SIZE=block_size,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_H=block_h,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
    )
    return query_NHD
