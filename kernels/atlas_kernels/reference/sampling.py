"""Coupled sampling.

Shapes: N rows, V token ids.
"""

from __future__ import annotations

import torch

from atlas_kernels.reference.noise import gumbel_noise


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
