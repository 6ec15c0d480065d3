"""Coupled sampling, and the filters of what it may draw.

Shapes: N rows, V columns (token ids, unless `token_ids_V` says which), F forbidden token ids.
"""

from __future__ import annotations

import math

import torch

from atlas_kernels.reference.noise import gumbel_noise


def coupled_sample(
    logits_NV: torch.Tensor,
    keys_2N: torch.Tensor | None,
    temperature: float,
    *,
    thresholds_N: torch.Tensor | None = None,
    forbidden: tuple[torch.Tensor, torch.Tensor] | None = None,
    token_ids_V: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """argmax(logits / T + Gumbel noise) per row and its log softmax(logits / T); without keys the plain argmax.

    Args:
        logits_NV: 16-bit logits are read as they are, arithmetic is float32. keys_2N: of `row_keys`.
        thresholds_N: float32, of `filter_thresholds`; columns whose logits / T are below cannot be drawn. The log-prob stays
            that of the unfiltered row.
        forbidden: token ids [F] int64, and the rows [N] bool in which they cannot be drawn.
        token_ids_V: int64, the token id that each column stands for: its noise is that id's, and the id is what is returned.
            A column of -1 is no token: neither drawn nor in the softmax.
    Returns:
        [N] int64 token ids, [N] log-probs; NaN where a row of logits holds NaN or +inf.
    """
    scaled_NV = _scaled(logits_NV, temperature)
    if token_ids_V is not None:
        scaled_NV = scaled_NV.masked_fill(token_ids_V < 0, -torch.inf)
    scores_NV = scaled_NV
    if keys_2N is not None:
        scores_NV = gumbel_noise(keys_2N, logits_NV.shape[1], scaled_NV.dtype, token_ids_V).add_(scaled_NV)
    if thresholds_N is not None:
        scores_NV = scores_NV.masked_fill(scaled_NV.float() < thresholds_N[:, None], -torch.inf)
    if forbidden is not None:
        scores_NV = scores_NV.masked_fill(_forbidden(logits_NV, forbidden, token_ids_V), -torch.inf)
    columns_N = scores_NV.argmax(-1)
    normalizers_N = scaled_NV.logsumexp(-1)
    normalizers_N = normalizers_N.masked_fill(normalizers_N == torch.inf, torch.nan)
    logprobs_N = scaled_NV.gather(-1, columns_N[:, None])[:, 0] - normalizers_N
    return columns_N if token_ids_V is None else token_ids_V[columns_N], logprobs_N


def filter_thresholds(
    logits_NV: torch.Tensor,
    temperature: float,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    forbidden: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The smallest logit / T that may be drawn after top-k, then top-p among what is left, then min-p.

    Boundaries are those of transformers' logits processors, but that equal logits at a boundary are kept together: top-k keeps
    what is not below the k-th value; top-p the smallest set whose share reaches top_p, of which the most probable token always
    is one; min-p what is at least min_p times as probable as that token.

    Args:
        top_k: 0: all. forbidden: token ids [F] int64, and the rows [N] bool that are filtered as if these had no probability.
    Returns:
        [N] float32.
    """
    scores_NV = _scaled(logits_NV, temperature)
    if forbidden is not None:
        scores_NV = scores_NV.masked_fill(_forbidden(logits_NV, forbidden), -torch.inf)
    thresholds_N = scores_NV.amax(-1) + (math.log(min_p) if min_p else -torch.inf)
    if top_k:
        kth_N = scores_NV.topk(min(top_k, scores_NV.shape[1])).values[:, -1]
        scores_NV = scores_NV.masked_fill(scores_NV < kth_N[:, None], -torch.inf)
        thresholds_N = thresholds_N.maximum(kth_N)
    if top_p < 1:
        sorted_NV = scores_NV.sort(descending=True).values
        probs_NV = sorted_NV.softmax(-1)
        is_dropped_NV = probs_NV.cumsum(-1) - probs_NV >= top_p
        is_dropped_NV[:, 0] = False
        thresholds_N = thresholds_N.maximum(sorted_NV.masked_fill(is_dropped_NV, torch.inf).amin(-1))
    return thresholds_N.float()


def _scaled(logits_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return logits_NV if temperature == 1 else logits_NV / temperature


def _forbidden(
    logits_NV: torch.Tensor, forbidden: tuple[torch.Tensor, torch.Tensor], token_ids_V: torch.Tensor | None = None
) -> torch.Tensor:
    """Mask [N, V] of the columns that cannot be drawn."""
    ids_F, is_forbidden_N = forbidden
    if token_ids_V is None:
        token_ids_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    return is_forbidden_N[:, None] & (token_ids_V[:, None] == ids_F).any(-1)
