"""Counter-based Gumbel noise: one value per (seed, position, token id), the same whatever batch it is drawn in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048


@triton.jit
def hash_rounds(token, offset, stride):
    """lowbias32(stride * token + offset) up to its last step, which leaves the upper 16 bits as they are. All uint32."""
    x = token * stride + offset
    x = (x ^ (x >> 16)) * 0x7FEB352D
    return (x ^ (x >> 15)) * 0x846CA68B


@triton.jit
def hash_token(token, offset, stride):
    """lowbias32(stride * token + offset) >> 1: 31 uniform bits. All uint32."""
    x = hash_rounds(token, offset, stride)
    return (x ^ (x >> 16)) >> 1


@triton.jit
def gumbel_of_bits(bits):
    """-log(-log1p(-v)), v = (bits + 1/2) / 2^31 <= 1 - 2^-24.

    With u = 1 - v rounded, -log1p(-v) = -log(u) + (v - (1 - u)) / u: accurate for small v with nothing but `log`.
    """
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.9999999403953552)
    u = 1.0 - v
    return -tl.log((v - (1.0 - u)) / u - tl.log(u))


@triton.jit
def noise_kernel(out_ptr, offset_ptr, stride_ptr, vocab_size, GUMBEL: tl.constexpr, BLOCK: tl.constexpr):
    """out[row, token] = bits, or Gumbel noise, of the row's keys. Grid: (rows, blocks of tokens)."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = tl.load(offset_ptr + row).to(tl.uint32, bitcast=True)
    stride = tl.load(stride_ptr + row).to(tl.uint32, bitcast=True)
    bits = hash_token(token.to(tl.uint32), offset, stride)
    value = gumbel_of_bits(bits) if GUMBEL else bits.to(tl.int32, bitcast=True)
    tl.store(out_ptr + row * vocab_size + token, value, mask=token < vocab_size)


def noise_bits(keys_2N: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Same as `reference.noise_bits`, bit for bit."""
    return _launch(keys_2N, vocab_size, torch.int32)


def gumbel_noise(keys_2N: torch.Tensor, vocab_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Same as `reference.gumbel_noise` within 2 ulp of max(|g|, 1), float32 only."""
    assert dtype == torch.float32, dtype
    return _launch(keys_2N, vocab_size, dtype)


def _launch(keys_2N: torch.Tensor, vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    offset, stride = keys_2N
    num_rows = keys_2N.shape[1]
    out = torch.empty(num_rows, vocab_size, dtype=dtype, device=keys_2N.device)
    if out.numel():
        grid = (num_rows, triton.cdiv(vocab_size, BLOCK))
        noise_kernel[grid](out, offset, stride, vocab_size, GUMBEL=dtype != torch.int32, BLOCK=BLOCK)
    return out
