"""Counter-based Gumbel noise.

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
    return _bits_of(keys_2N, torch.arange(vocab_size, dtype=torch.int32, device=keys_2N.device))


def _bits_of(keys_2N: torch.Tensor, token_ids_V: torch.Tensor) -> torch.Tensor:
    offset, stride = keys_2N
    x = (token_ids_V * stride[:, None]).add_(offset[:, None])
    shifted = x >> 16
    x.bitwise_xor_(shifted.bitwise_and_(0xFFFF)).mul_(HASH_A)  # int32's >> is arithmetic: the mask makes it logical
    torch.bitwise_right_shift(x, 15, out=shifted)
    x.bitwise_xor_(shifted.bitwise_and_(0x1FFFF)).mul_(HASH_B)
    torch.bitwise_right_shift(x, 16, out=shifted)
    x.bitwise_xor_(shifted.bitwise_and_(0xFFFF))
    return x.bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF)


def gumbel_noise(
    keys_2N: torch.Tensor,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    token_ids_V: torch.Tensor | None = None,
) -> torch.Tensor:
    """Standard Gumbel noise g = -log(-log(1 - v)), v = (bits + 1/2) / 2^31, per (seed, position, token id).

    `log1p` keeps the resolution where it matters: a large g comes from a small v, and 2^-32 is the smallest.

    Args:
        keys_2N: [2, N] int32 of `row_keys`. dtype: float32, or float64.
        token_ids_V: the token ids that the columns stand for; None: each for its own index.
    Returns:
        [N, V] of dtype, between MIN_GUMBEL and MAX_GUMBEL.
    """
    bits_NV = noise_bits(keys_2N, vocab_size) if token_ids_V is None else _bits_of(keys_2N, token_ids_V.int())
    v = bits_NV.float().add_(0.5).mul_(2.0**-31).clamp_(max=MAX_UNIFORM)
    return v.to(dtype).neg_().log1p_().neg_().log_().neg_()  # v is float32 in either dtype: near 1 its rounding shows


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The generator of Steele, Lea, Flood (2014): one step from state x."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * MIX_A
    x = (x ^ (x >> np.uint64(27))) * MIX_B
    return x ^ (x >> np.uint64(31))
