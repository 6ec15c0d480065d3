"""CPU kernels in float32 (`cpu_ops.cpp`), with the signatures of their torch twins in `reference`."""

from __future__ import annotations

from ctypes import Structure, addressof, c_float, c_int64, c_void_p

import numpy as np
import torch

from atlas_kernels import native

POINTER, INT, FLOAT = c_void_p, c_int64, c_float
SIGNATURES = {
    "rms_norm": [POINTER] * 2 + [FLOAT] + [INT] * 2 + [POINTER],
    "packed_size": [INT] * 2,
    "pack": [POINTER] + [INT] * 3 + [POINTER],
    "packed_linear": [POINTER] * 2 + [INT] + [POINTER] * 2,
    "silu_mul": [POINTER] + [INT] * 2 + [POINTER],
    "rope_and_store": [POINTER] * 3 + [FLOAT] + [POINTER] * 6 + [INT] * 5,
    "decode": [POINTER] * 4 + [INT] + [POINTER] * 2,
    "store_kv": [POINTER] * 2 + [INT] * 2 + [POINTER] * 3 + [INT] * 4,
    "paged_attention": [POINTER] + [INT] * 2 + [POINTER] * 5 + [INT] * 6 + [FLOAT] * 2 + [INT] + [POINTER],
    "row_keys": [POINTER] * 2 + [INT] + [POINTER],
    "coupled_sample": [POINTER] + [INT] * 2 + [FLOAT] + [POINTER] * 4,
}


LIBRARY = native.Library(native.FOLDER / "cpu_ops.cpp", SIGNATURES, restypes={"packed_size": INT})


def unavailable_reason() -> str | None:
    """Why the kernels cannot be used on this machine; None where they can."""
    return LIBRARY.unavailable_reason


def supports(head_dim: int) -> bool:
    """Whether attention takes heads of this size."""
    return head_dim % 16 == 0 and head_dim <= 256


def rms_norm(x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """See `reference.rms_norm`."""
    out = torch.empty_like(x_ND)
    LIBRARY.functions.rms_norm(x_ND.data_ptr(), weight_D.data_ptr(), eps, *x_ND.shape, out.data_ptr())
    return out


class PackedWeight(Structure):
    """`atlas::Weight`: the float32 weights of one or several Linears over the same input, side by side, packed into panels.

    A copy of the weights. Each row of a product is the same to the last bit whatever rows it is computed with.
    """

    _fields_ = [("panels", POINTER), ("in_features", INT), ("out_features", INT), ("bias", POINTER)]

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> None:
        width, size = sum(map(len, weights)), weights[0].shape[1]
        panels = weights[0].new_zeros(LIBRARY.functions.packed_size(size, width))
        bias = weights[0].new_zeros(width) if any(b is not None for b in biases) else None
        super().__init__(panels.data_ptr(), size, width, None if bias is None else bias.data_ptr())
        self.tensors = (panels, bias)  # the pointers are theirs
        self.address = addressof(self)
        self.pack(weights, biases)

    def pack(self, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> None:
        """Take over new weights of the same shapes, in place."""
        (panels, packed_bias), column = self.tensors, 0
        for weight, bias in zip(weights, biases, strict=True):
            weight = weight.contiguous()
            LIBRARY.functions.pack(weight.data_ptr(), *weight.shape, column, panels.data_ptr())
            if bias is not None:
                packed_bias[column : column + len(weight)] = bias
            column += len(weight)

    def __call__(self, x_ND: torch.Tensor, residual_NO: torch.Tensor | None = None) -> torch.Tensor:
        """See `reference.packed_linear`."""
        x_ND = x_ND.contiguous()
        num_tokens = len(x_ND)
        out = x_ND.new_empty(num_tokens, self.out_features)
        residual = None if residual_NO is None else residual_NO.data_ptr()
        LIBRARY.functions.packed_linear(self.address, x_ND.data_ptr(), num_tokens, residual, out.data_ptr())
        return out


def silu_mul(gate_up_NI: torch.Tensor) -> torch.Tensor:
    """See `reference.silu_mul`."""
    num_tokens, width = gate_up_NI.shape
    out = gate_up_NI.new_empty(num_tokens, width // 2)
    LIBRARY.functions.silu_mul(gate_up_NI.data_ptr(), num_tokens, width // 2, out.data_ptr())
    return out


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
    """See `reference.rope_and_store`; the queries are written over qkv_ND."""
    _, _, num_kv_heads, block_size, head_dim = kv_2BHSD.shape
    keys = kv_2BHSD.data_ptr()
    num_tokens, width = qkv_ND.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    LIBRARY.functions.rope_and_store(
        qkv_ND.data_ptr(),
        query_norm.data_ptr() if query_norm is not None else None,
        key_norm.data_ptr() if key_norm is not None else None,
        eps,
        cos_PD.data_ptr(),
        sin_PD.data_ptr(),
        positions_N.data_ptr(),
        slots_N.data_ptr(),
        keys,
        keys + 4 * kv_2BHSD.stride(0),
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
    )
    return qkv_ND.view(num_tokens, -1, head_dim)[:, :num_heads]


def store_kv(key_NHD: torch.Tensor, value_NHD: torch.Tensor, slots_N: torch.Tensor, kv_2BHSD: torch.Tensor) -> None:
    """See `reference.store_kv`."""
    if not (key_NHD.stride() == value_NHD.stride() and key_NHD.stride(2) == 1):
        key_NHD, value_NHD = key_NHD.contiguous(), value_NHD.contiguous()
    keys = kv_2BHSD.data_ptr()
    LIBRARY.functions.store_kv(
        key_NHD.data_ptr(),
        value_NHD.data_ptr(),
        key_NHD.stride(0),
        key_NHD.stride(1),
        slots_N.data_ptr(),
        keys,
        keys + 4 * kv_2BHSD.stride(0),
        *key_NHD.shape,
        kv_2BHSD.shape[3],
    )


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
    """See `reference.paged_attention`."""
    if query_NHD.stride(2) != 1:
        query_NHD = query_NHD.contiguous()
    num_tokens, num_heads, head_dim = query_NHD.shape
    _, _, num_kv_heads, block_size, _ = kv_2BHSD.shape
    keys = kv_2BHSD.data_ptr()
    out = query_NHD.new_empty(num_tokens, num_heads, head_dim)
    LIBRARY.functions.paged_attention(
        query_NHD.data_ptr(),
        query_NHD.stride(0),
        query_NHD.stride(1),
        keys,
        keys + 4 * kv_2BHSD.stride(0),
        block_tables_RM.data_ptr(),
        starts_R.data_ptr(),
        query_lens_R.data_ptr(),
        *block_tables_RM.shape,
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        scaling,
        softcap or 0.0,
        sliding_window or 0,
        out.data_ptr(),
    )
    return out


def row_keys(seeds: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    """See `reference.row_keys`."""
    keys_2N = torch.empty(2, len(seeds), dtype=torch.int32)
    seeds, positions = np.ascontiguousarray(seeds), np.ascontiguousarray(positions)
    LIBRARY.functions.row_keys(seeds.ctypes.data, positions.ctypes.data, len(seeds), keys_2N.data_ptr())
    return keys_2N


def coupled_sample(
    logits_NV: torch.Tensor, keys_2N: torch.Tensor | None, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.coupled_sample`."""
    num_rows, vocab_size = logits_NV.shape
    tokens_N = torch.empty(num_rows, dtype=torch.int64)
    logprobs_N = torch.empty(num_rows)
    offsets, strides = (None, None) if keys_2N is None else (keys_2N[0].data_ptr(), keys_2N[1].data_ptr())
    LIBRARY.functions.coupled_sample(
        logits_NV.data_ptr(),
        num_rows,
        vocab_size,
        temperature,
        offsets,
        strides,
        tokens_N.data_ptr(),
        logprobs_N.data_ptr(),
    )
    return tokens_N, logprobs_N
