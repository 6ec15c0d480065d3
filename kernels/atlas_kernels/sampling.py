"""Coupled sampling in one pass over the logits, and filters without a sort. Shapes as in `reference.sampling`."""

from __future__ import annotations

import math

import torch
import triton

from atlas_kernels.filter_kernels import threshold_kernel
from atlas_kernels.launching import num_multiprocessors
from atlas_kernels.sampling_kernels import combine_kernel, sample_kernel

BLOCK, NUM_WARPS, PROGRAMS_PER_PROCESSOR = 1024, 4, 4
FILTER_BLOCK, FILTER_WARPS = 8192, 16


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
