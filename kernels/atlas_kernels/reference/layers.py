"""The parts of a decoder layer.

Shapes: N tokens, D features, O outputs, I intermediate size; KV cache as in `attention`.
"""

from __future__ import annotations

import torch

from atlas_kernels.reference.attention import store_kv


def rms_norm(x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight, in x's dtype."""
    return torch.rms_norm(x_ND, weight_D.shape, weight_D.to(x_ND.dtype), eps)


def packed_linear(
    x_ND: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    residual_NO: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + b for each weight [O_i, D] and its bias, side by side, plus a residual. Returns [N, sum of O_i]."""
    outputs = [torch.nn.functional.linear(x_ND, w, b) for w, b in zip(weights, biases, strict=True)]
    return torch.cat(outputs, dim=-1) + (0 if residual_NO is None else residual_NO)


def fused_linear(
    x_ND: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None] | None = None,
    *,
    norm_D: torch.Tensor | None = None,
    eps: float = 0.0,
    residual_NO: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """h W^T + b for each of one to three weights [O_i, D], side by side; gated: silu of the first · the second; plus a residual.

    Args:
        norm_D: h = RMSNorm(x), in x's dtype; without it h = x. Either is then cast to the weights' dtype.
    Returns:
        [N, sum of O_i], or [N, O_0] if gated; in the residual's dtype, without one in the weights'.
    """
    hidden_ND = x_ND if norm_D is None else rms_norm(x_ND, norm_D, eps)
    out_NO = packed_linear(hidden_ND.to(weights[0].dtype), weights, biases or [None] * len(weights))
    if gated:
        out_NO = silu_mul(out_NO)
    return out_NO if residual_NO is None else (out_NO + residual_NO).to(residual_NO.dtype)


def silu_mul(gate_up_NI: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, of [N, 2 I] that holds gate and up side by side. Returns [N, I]."""
    gate_NI, up_NI = gate_up_NI.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_NI) * up_NI


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
    """Norm each head of queries and keys (where weights are given), rotate them, and put keys and values into the cache.

    Args:
        qkv_ND: [N, (heads + 2 KV heads) · D], queries, keys, values side by side; may be overwritten.
        cos_PD, sin_PD: [positions, D / 2], of the half-split rotation.
        slots_N: block · S + offset of each token's place in kv_2BHSD, one layer of the cache [2, blocks, KV heads, S, D];
            negative: its key and value are not stored.
    Returns:
        The queries [N, heads, D] in qkv's dtype.
    """
    num_kv_heads, head_dim = kv_2BHSD.shape[2], kv_2BHSD.shape[4]
    heads_NHD = qkv_ND.view(len(qkv_ND), -1, head_dim)
    num_heads = heads_NHD.shape[1] - 2 * num_kv_heads
    query, key, value = heads_NHD.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = cos_PD[positions_N][:, None], sin_PD[positions_N][:, None]

    def rotated(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = x if weight is None else rms_norm(x, weight, eps)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    store_kv(rotated(key, key_norm), value, slots_N, kv_2BHSD)
    return rotated(query, query_norm)
