"""Attention over a paged KV cache.

Shapes: N tokens of R rows, M blocks of a row, P spans of tokens; a layer of the cache is [2, blocks, KV heads, S, D], keys and
values, of blocks of S slots. A slot is block * S + offset.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class SharedPrefixes(NamedTuple):
    """Spans of neighbouring tokens, such as those of a prompt's samples, whose rows all begin with the same blocks.

    Span p covers query_lens_P[p] places (0: unused) from query_starts_P[p] on; its blocks are those of row rows_P[p].
    Row r shares its first num_shared_R[r] tokens, as many as its span's other rows do: whole blocks, all before starts_R[r].
    A row in no span shares 0.
    """

    query_starts_P: torch.Tensor
    query_lens_P: torch.Tensor
    rows_P: torch.Tensor
    num_shared_R: torch.Tensor
    max_query_len: int
    """At least each of query_lens_P; the host's."""


def store_kv(key_NHD: torch.Tensor, value_NHD: torch.Tensor, slots_N: torch.Tensor, kv_2BHSD: torch.Tensor) -> None:
    """Put one key and value per token into one layer of the cache; none where the slot is negative."""
    kept_N = slots_N >= 0
    block_N, offset_N = slots_N[kept_N] // kv_2BHSD.shape[3], slots_N[kept_N] % kv_2BHSD.shape[3]
    kv_2BHSD[0, block_N, :, offset_N] = key_NHD[kept_N].to(kv_2BHSD.dtype)
    kv_2BHSD[1, block_N, :, offset_N] = value_NHD[kept_N].to(kv_2BHSD.dtype)


def paged_attention(
    query_NHD: torch.Tensor,
    kv_2BHSD: torch.Tensor,
    block_tables_RM: torch.Tensor,
    starts_R: torch.Tensor,
    query_lens_R: torch.Tensor,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    query_starts_R: torch.Tensor | None = None,
    max_query_len: int | None = None,
    shared: SharedPrefixes | None = None,
) -> torch.Tensor:
    """Causal attention of each row's tokens over the row's own keys and values, which include those tokens'.

    Args:
        query_NHD: [N, heads, D], cast to the cache's dtype. Row r has query_lens_R[r] of the N tokens (0: it is padding), from
            place query_starts_R[r] on (ascending from 0; None: back to back), at positions starts_R[r], ….
        kv_2BHSD: one layer of the cache, [2, blocks, KV heads, S, D]. block_tables_RM: [R, M] int64 blocks of each row.
        sliding_window: a token sees itself and this many less one before it. softcap: scores become c · tanh(score / c).
        max_query_len: at least each of query_lens_R, at most N (None: N). shared: what rows have in common, not with a window.
            Neither changes the result: kernels read less.
    Returns:
        [N, heads, D] in the query's dtype, zeros at places of no row.
    """
    assert not (shared and sliding_window)
    output_NHD = torch.zeros_like(query_NHD)
    if query_starts_R is None:
        query_starts_R = query_lens_R.cumsum(0) - query_lens_R
    if shared:
        block_tables_RM = _tables_as_shared(block_tables_RM, query_starts_R, shared, kv_2BHSD.shape[3])
    groups = query_NHD.shape[1] // kv_2BHSD.shape[2]
    slots_S = torch.arange(block_tables_RM.shape[1] * kv_2BHSD.shape[3], device=query_NHD.device)
    rows = zip(block_tables_RM, starts_R.tolist(), query_starts_R.tolist(), query_lens_R.tolist(), strict=True)
    for blocks_M, start, first, length in rows:
        keys, values = kv_2BHSD[:, blocks_M].transpose(1, 2).flatten(2, 3).repeat_interleave(groups, 1).unbind(0)
        query_HQD = query_NHD[first : first + length].transpose(0, 1).to(keys.dtype)
        scores = query_HQD @ keys.transpose(1, 2) * scaling
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        distance = torch.arange(start, start + length, device=slots_S.device)[:, None] - slots_S
        hidden = (distance < 0) | (distance >= (sliding_window or len(slots_S)))
        attended_HQD = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
        output_NHD[first : first + length] = attended_HQD.transpose(0, 1).to(output_NHD.dtype)
    return output_NHD


def _tables_as_shared(
    block_tables_RM: torch.Tensor, query_starts_R: torch.Tensor, shared: SharedPrefixes, block_size: int
) -> torch.Tensor:
    """The blocks that kernels read: for what a row shares, those of its span's row, which should be the row's own."""
    tables_RM, num_spans_R = block_tables_RM.clone(), torch.zeros_like(shared.num_shared_R)
    spans = zip(shared.query_starts_P.tolist(), shared.query_lens_P.tolist(), shared.rows_P.tolist())
    for first, length, source in spans:
        within_R = (query_starts_R >= first) & (query_starts_R < first + length)
        num_spans_R += within_R
        for row in within_R.nonzero()[:, 0].tolist():
            num_blocks = int(shared.num_shared_R[row]) // block_size
            tables_RM[row, :num_blocks] = block_tables_RM[source, :num_blocks]
    assert (num_spans_R[shared.num_shared_R > 0] == 1).all(), "a row that shares is in one span"
    return tables_RM
