"""Attention over a paged KV cache.

Shapes: N tokens of R rows back to back, M blocks of a row; a layer of the cache is [2, blocks, KV heads, S, D], keys and values,
of blocks of S slots. A slot is block * S + offset.
"""

from __future__ import annotations

import torch


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
