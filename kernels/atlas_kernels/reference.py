"""Torch twins of the kernels: the oracle of their tests, and what runs on CPU.

Shapes: N rows, V token ids.
"""

from __future__ import annotations

import numpy as np
import torch

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
MIX_A, MIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's multipliers
HASH_A, HASH_B = 0x7FEB352D, 0x846CA68B - (1 << 32)  # lowbias32's multipliers, as signed 32-bit integers
MAX_UNIFORM = 1.0 - 2.0**-24  # the largest float32 below 1

MIN_GUMBEL, MAX_GUMBEL = -2.82, 22.19
"""Every noise value lies between these: 31 bits bound it above, MAX_UNIFORM below."""


def row_keys(seeds: np.ndarray, positions: np.ndarray, device: torch.device) -> torch.Tensor:
    """Two 32-bit keys per row, of splitmix64(splitmix64(seed) + GOLDEN * position). [N] int64 each -> [2, N] int32.

    Made by the host: N is small, and the seeds and positions are the host's.
    """
    mixed = _splitmix64(_splitmix64(seeds.view(np.uint64)) + positions.view(np.uint64) * GOLDEN)
    offset = mixed.astype(np.uint32)  # the low 32 bits
    stride = (mixed >> np.uint64(32)).astype(np.uint32) | np.uint32(1)  # odd, so that token ids never meet
    return torch.from_numpy(np.stack([offset, stride]).view(np.int32)).to(device, non_blocking=True)


def noise_bits(keys_2N: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """31 uniform bits per (seed, position, token id): lowbias32(stride * token + offset) >> 1, with the row's two keys.

    A pure function of integers, hence the same on every device and in every batch.

    Args:
        keys_2N: [2, N] int32, offsets and strides of `row_keys`.
    Returns:
        [N, V] int32, in 0 … 2^31 - 1.
    """
    offset, stride = keys_2N
    token = torch.arange(vocab_size, dtype=torch.int32, device=keys_2N.device)
    x = (token * stride[:, None]).add_(offset[:, None])
    shifted = x >> 16
    x.bitwise_xor_(shifted.bitwise_and_(0xFFFF)).mul_(HASH_A)  # int32's >> is arithmetic: the mask makes it logical
    torch.bitwise_right_shift(x, 15, out=shifted)
    x.bitwise_xor_(shifted.bitwise_and_(0x1FFFF)).mul_(HASH_B)
    torch.bitwise_right_shift(x, 16, out=shifted)
    x.bitwise_xor_(shifted.bitwise_and_(0xFFFF))
    return x.bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF)


def gumbel_noise(keys_2N: torch.Tensor, vocab_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard Gumbel noise g = -log(-log(1 - v)), v = (bits + 1/2) / 2^31, per (seed, position, token id).

    `log1p` keeps the resolution where it matters: a large g comes from a small v, and 2^-32 is the smallest.

    Args:
        keys_2N: [2, N] int32 of `row_keys`. dtype: float32, or float64.
    Returns:
        [N, V] of dtype, between MIN_GUMBEL and MAX_GUMBEL.
    """
    v = noise_bits(keys_2N, vocab_size).float().add_(0.5).mul_(2.0**-31).clamp_(max=MAX_UNIFORM)
    return v.to(dtype).neg_().log1p_().neg_().log_().neg_()  # v is float32 in either dtype: near 1 its rounding shows


def rms_norm(x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight."""
    return torch.rms_norm(x_ND, weight_D.shape, weight_D, eps)


def packed_linear(
    x_ND: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    residual_NO: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + b for each weight [O_i, D] and its bias, side by side, plus a residual. Returns [N, sum of O_i]."""
    outputs = [torch.nn.functional.linear(x_ND, w, b) for w, b in zip(weights, biases, strict=True)]
    return torch.cat(outputs, dim=-1) + (0 if residual_NO is None else residual_NO)


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
        slots_N: block · S + offset of each token's place in kv_2BHSD, one layer of the cache [2, blocks, KV heads, S, D].
    Returns:
        The queries [N, heads, D].
    """
    num_kv_heads, head_dim = kv_2BHSD.shape[2], kv_2BHSD.shape[4]
    heads_NHD = qkv_ND.view(len(qkv_ND), -1, head_dim)
    num_heads = heads_NHD.shape[1] - 2 * num_kv_heads
    query, key, value = heads_NHD.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = cos_PD[positions_N][:, None], sin_PD[positions_N][:, None]

    def rotated(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = x if weight is None else rms_norm(x, weight, eps)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    store_kv(rotated(key, key_norm), value, slots_N, kv_2BHSD)
    return rotated(query, query_norm)


def store_kv(key_NHD: torch.Tensor, value_NHD: torch.Tensor, slots_N: torch.Tensor, kv_2BHSD: torch.Tensor) -> None:
    """Put one key and value per token into one layer of the cache."""
    block_N, offset_N = slots_N // kv_2BHSD.shape[3], slots_N % kv_2BHSD.shape[3]
    kv_2BHSD[0, block_N, :, offset_N] = key_NHD
    kv_2BHSD[1, block_N, :, offset_N] = value_NHD


def paged_attention(
    query_NHD: torch.Tensor,
    kv_2BHSD: torch.Tensor,
    block_tables_RM: torch.Tensor,
    starts_R: torch.Tensor,
    query_lens_R: torch.Tensor,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of each row's tokens over the row's own keys and values, which include those tokens'.

    Args:
        query_NHD: [N, heads, D], the tokens of R rows back to back, query_lens_R each; row r's sit at positions starts_R[r], ….
        kv_2BHSD: one layer of the cache, [2, blocks, KV heads, S, D]. block_tables_RM: [R, M] int64 blocks of each row.
        sliding_window: a token sees itself and this many less one before it. softcap: scores become c · tanh(score / c).
    Returns:
        [N, heads, D].
    """
    outputs, token = [], 0
    groups = query_NHD.shape[1] // kv_2BHSD.shape[2]
    for blocks_M, start, length in zip(block_tables_RM, starts_R.tolist(), query_lens_R.tolist(), strict=True):
        keys, values = kv_2BHSD[:, blocks_M].transpose(1, 2).flatten(2, 3).repeat_interleave(groups, 1).unbind(0)
        query_HQD = query_NHD[token : token + length].transpose(0, 1)
        token += length
        scores = query_HQD @ keys.transpose(1, 2) * scaling
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        distance = torch.arange(start, start + length)[:, None] - torch.arange(keys.shape[1])
        hidden = (distance < 0) | (distance >= (sliding_window or keys.shape[1]))
        outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


def coupled_sample(
    logits_NV: torch.Tensor, keys_2N: torch.Tensor | None, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """argmax(logits / T + Gumbel noise) per row and its log softmax(logits / T); without keys the plain argmax.

    Returns:
        [N] int64 token ids, [N] log-probs; NaN where a row of logits holds NaN or +inf.
    """
    scaled_NV = logits_NV if temperature == 1 else logits_NV / temperature
    scores_NV = scaled_NV
    if keys_2N is not None:
        scores_NV = gumbel_noise(keys_2N, logits_NV.shape[1], logits_NV.dtype).add_(scaled_NV)
    tokens_N = scores_NV.argmax(-1)
    return tokens_N, scaled_NV.gather(-1, tokens_N[:, None])[:, 0] - scaled_NV.logsumexp(-1)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The generator of Steele, Lea, Flood (2014): one step from state x."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * MIX_A
    x = (x ^ (x >> np.uint64(27))) * MIX_B
    return x ^ (x >> np.uint64(31))
