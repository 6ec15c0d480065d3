"""Guesses from a drafter's logits: drawn with the policy's own noise, each with the probability that it is right.

The policy takes argmax(log p / T + g), the guess is argmax(log q / T + g) with the same noise g. What p and q differ by has to
overcome the margin by which the guess won, so that the margin tells how likely the guess is to be right; how likely for this
drafter and policy is counted as they decode.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from atlas_kernels import coupled_sample, device_row_keys, filter_thresholds, gumbel_noise
from atlas_rl.engine.sampling import SamplingBatch, filter_scores
from atlas_rl.types import SamplingParams

MARGIN_EDGES = np.array([0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 2.75, 3.5, 4.5, 6.0, 8.0])
"""Of the margins' buckets, in nats."""
PRIOR = np.array([0.4, 0.42, 0.42, 0.42, 0.43, 0.45, 0.5, 0.58, 0.62, 0.7, 0.8, 0.9, 0.97, 0.993])
"""How often a guess that won by such a margin is right, before there is evidence: what a trained head came to."""
MAX_DEPTH = 8
"""Deeper guesses are judged as those at this depth are."""
HALF_LIFE = 2000.0
"""Guesses of a cell after which a count weighs half."""


def draw(
    logits_RV: torch.Tensor, params: SamplingParams, seeds: np.ndarray, positions: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guesses [R] and the margins [R] by which they won over the second best.

    Args:
        logits_RV: the drafter's, over its vocabulary if that is the policy's. seeds, positions: [R] of the tokens to draw
            (positions within the completion). Repetition penalties are left out: a guess may be a little worse for it.
    """
    logits_RV = logits_RV.float()
    params = replace(params, repetition_penalty=1.0)
    places = SamplingBatch.of(params, seeds, positions, logits_RV.device)
    scaled_RV = logits_RV if params.is_greedy or params.temperature == 1 else logits_RV / params.temperature
    scores_RV = filter_scores(logits_RV, scaled_RV, places)
    if not params.is_greedy:
        scores_RV = scores_RV + gumbel_noise(places.keys_2N, scores_RV.shape[1])
    best = scores_RV.topk(2, dim=-1)
    return best.indices[:, 0], best.values[:, 0] - best.values[:, 1]


def draw_within(
    logits_RV: torch.Tensor,
    params: SamplingParams,
    seeds_R: torch.Tensor,
    positions_R: torch.Tensor,
    token_ids_V: torch.Tensor | None = None,
) -> torch.Tensor:
    """`draw` within a captured step: guesses alone. `token_ids_V`: the tokens that the columns stand for (-1: none).

    The policy's way of drawing, with its noise; a token that cannot be drawn yet may be guessed.
    """
    if params.is_greedy:
        return coupled_sample(logits_RV, None, 1.0, token_ids_V=token_ids_V)[0]
    thresholds_R = None
    if params.has_filters:
        cuts = {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
        thresholds_R = filter_thresholds(logits_RV, params.temperature, **cuts)
    keys_2R = device_row_keys(seeds_R, positions_R)
    options = {"thresholds_N": thresholds_R, "token_ids_V": token_ids_V}
    return coupled_sample(logits_RV, keys_2R, params.temperature, **options)[0]


class Calibration:
    """How often guesses were right, by depth and margin."""

    def __init__(self) -> None:
        self.right_KM = np.tile(4 * PRIOR, (MAX_DEPTH, 1))
        self.total_KM = np.full_like(self.right_KM, 4.0)

    @staticmethod
    def cells(margins: np.ndarray) -> np.ndarray:
        return np.searchsorted(MARGIN_EDGES, margins)

    def probs(self, cells_RK: np.ndarray) -> np.ndarray:
        """[R, K] probability that a guess and all before it are right."""
        depths = np.minimum(np.arange(cells_RK.shape[1]), MAX_DEPTH - 1)
        return (self.right_KM[depths, cells_RK] / self.total_KM[depths, cells_RK]).cumprod(axis=1)

    def prob_at(self, depth: int, cells_R: np.ndarray) -> np.ndarray:
        """[R] probability that guesses at one depth are right where all before them are."""
        depth = min(depth, MAX_DEPTH - 1)
        return self.right_KM[depth, cells_R] / self.total_KM[depth, cells_R]

    def record(self, cells_RK: np.ndarray, num_judged: np.ndarray, num_right: np.ndarray) -> None:
        """Of the first `num_judged[r]` guesses of row r the first `num_right[r]` were right and the next one, if judged, wrong;
        those after a wrong one tell nothing."""
        depths = np.arange(cells_RK.shape[1])
        right = depths < num_right[:, None]
        known = right | ((depths == num_right[:, None]) & (depths < num_judged[:, None]))
        rows, columns = np.nonzero(known)
        place = (np.minimum(columns, MAX_DEPTH - 1), cells_RK[rows, columns])
        np.add.at(self.total_KM, place, 1.0)
        np.add.at(self.right_KM, place, right[rows, columns].astype(float))
        full = self.total_KM > HALF_LIFE
        self.right_KM[full] /= 2
        self.total_KM[full] /= 2
