"""Coupled sampling and verification.

Every (seed, position, token id) owns one Gumbel noise value g, and the policy's token is argmax(log p / T + g) over the
tokens that the filters keep: a sample of the softmax (the Gumbel-max trick) that depends on nothing but weights, prompt and
seed. A draft is right where it equals that token, so verification is a prefix match, and no drafter or lookahead can change
a completion (drafter-invariant speculative decoding, Daliri, Musco, Suresh, arXiv 2408.07978).

Shapes: N tokens of all rows back to back, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from atlas_kernels import coupled_sample, row_keys
from atlas_rl.types import SamplingParams

MAX_LOGITS = 2**25
"""Logits made at once: 128 MiB in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """What the logits of N places are sampled with."""

    params: SamplingParams
    keys_2N: torch.Tensor
    """`row_keys` of each place's seed and position, the index in the completion of the token to draw."""
    too_early_N: torch.Tensor | None = None
    """Places where EOS and stop tokens cannot be drawn yet; None where they always can."""
    seen_NV: torch.Tensor | None = None
    """Tokens before each place, for the repetition penalty; None where there is no penalty."""

    def rows(self, part: slice) -> SamplingBatch:
        """Some of the places."""
        seen_NV = None if self.seen_NV is None else self.seen_NV[part]
        too_early_N = None if self.too_early_N is None else self.too_early_N[part]
        return replace(self, keys_2N=self.keys_2N[:, part], too_early_N=too_early_N, seen_NV=seen_NV)

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        seeds: np.ndarray,
        positions: np.ndarray,
        device: torch.device,
        seen_NV: torch.Tensor | None = None,
    ) -> SamplingBatch:
        """Places with these seeds [N] and positions [N], both int64."""
        early = torch.from_numpy(positions < params.min_new_tokens).to(device) if params.min_new_tokens else None
        return cls(params=params, keys_2N=row_keys(seeds, positions, device), too_early_N=early, seen_NV=seen_NV)


def sample(logits_NV: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row: token ids [N] int64, and their log softmax(logits / T) over the full vocabulary [N].

    A row of logits that holds NaN or +inf gets the log-prob NaN, whatever its token. `logits_NV` may be overwritten.
    """
    params = batch.params
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    temperature = 1.0 if params.is_greedy else params.temperature
    keys_2N = None if params.is_greedy else batch.keys_2N
    if not params.has_filters and batch.too_early_N is None:
        return coupled_sample(logits_NV, keys_2N, temperature)
    scaled_NV = logits_NV if temperature == 1 else logits_NV / temperature
    # the filters leave the log-prob alone: it is that of the unfiltered distribution
    tokens_N, _ = coupled_sample(filter_scores(logits_NV, scaled_NV, batch), keys_2N, 1.0)
    return tokens_N, scaled_NV.gather(-1, tokens_N[:, None])[:, 0] - scaled_NV.logsumexp(-1)


def filter_scores(logits_NV: torch.Tensor, scaled_NV: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """The scores that tokens compete with: logits / T after penalty and filters, -inf where a token is dropped.

    Same order and same boundaries as transformers' logits processors. Returns `scaled_NV` itself where nothing is to do.
    """
    params = batch.params
    scores = scaled_NV
    if params.repetition_penalty != 1:
        penalty = params.repetition_penalty
        penalised = torch.where(scaled_NV < 0, scaled_NV * penalty, scaled_NV / penalty)
        scores = torch.where(batch.seen_NV, penalised, scores)
    stopping_ids = [i for i in {*params.eos_token_ids, *params.stop_token_ids} if 0 <= i < scores.shape[-1]]
    if batch.too_early_N is not None and stopping_ids:
        forbidden_NV = torch.zeros_like(scores, dtype=torch.bool)
        forbidden_NV[:, stopping_ids] = batch.too_early_N[:, None]
        scores = scores.masked_fill(forbidden_NV, -torch.inf)
    if params.is_greedy:
        return scores
    if params.top_k:
        kth = scores.topk(min(params.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if params.top_p < 1:
        scores = scores.masked_fill(_outside_top_p(scores, params.top_p), -torch.inf)
    if params.min_p:
        probs = scores.softmax(-1)
        scores = scores.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), -torch.inf)
    return scores


def _outside_top_p(scores_NV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask of the tokens beyond the smallest set whose probability reaches `top_p`; the most probable one always stays."""
    sorted_scores, order = scores_NV.sort(dim=-1, stable=True)
    drop = sorted_scores.softmax(-1).cumsum(-1) <= 1 - top_p
    drop[:, -1] = False
    return torch.zeros_like(drop).scatter_(-1, order, drop)


def seen_tokens(seen_RV: torch.Tensor, query_lens: np.ndarray, input_ids_N: torch.Tensor) -> torch.Tensor:
    """Tokens before each of N places: those of its row, and the draft tokens between the row's end and the place.

    seen_RV holds each row's own tokens, its last one included; input_ids_N are that last token and the drafts.
    """
    seen_NV = seen_RV.repeat_interleave(torch.from_numpy(query_lens).to(seen_RV.device), dim=0)
    starts = np.cumsum(query_lens) - query_lens
    for depth in range(1, int(query_lens.max())):
        places = torch.from_numpy(starts[query_lens > depth] + depth).to(seen_RV.device)
        seen_NV[places] = seen_NV[places - 1]
        seen_NV[places, input_ids_N[places]] = True
    return seen_NV


def count_accepted(tokens: np.ndarray, input_ids: np.ndarray, query_lens: np.ndarray) -> np.ndarray:
    """Length of each row's right draft prefix.

    Args:
        tokens: [N] what the policy drew after each place. input_ids: [N] per row its last token, then its draft.
        query_lens: [R], 1 + draft length.
    Returns:
        [R] accepted draft tokens; row r emits one more: the token drawn after the last right one.
    """
    if len(tokens) == len(query_lens):
        return np.zeros(len(query_lens), np.int64)
    ends = np.cumsum(query_lens)
    # a row's last place has no draft token after it: a mismatch there ends every run of matches within its row
    wrong = np.ones(len(tokens), bool)
    wrong[:-1] = tokens[:-1] != input_ids[1:]
    wrong[ends - 1] = True
    wrong_places = np.flatnonzero(wrong)
    starts = ends - query_lens
    return wrong_places[np.searchsorted(wrong_places, starts)] - starts
