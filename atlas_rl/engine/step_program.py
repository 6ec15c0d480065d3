"""What a captured decode step is: draft, verify, sample and advance, and the memory that the host writes before it.

Shapes: N = R * Q places of R rows, Q = 1 + K draft tokens; D hidden size, V vocabulary; S, M as in `decode_state`; P spans.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from atlas_kernels import SharedPrefixes, StepInputs, coupled_sample, filter_thresholds, finish_step, prepare_step
from atlas_rl.drafters.base import StepDrafter
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.decode_state import DecodeState
from atlas_rl.engine.graphs import GraphBackend
from atlas_rl.engine.kv_cache import KVCache
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.sampling import MAX_LOGITS
from atlas_rl.types import SamplingParams


class StepKey(NamedTuple):
    num_rows: int
    num_drafts: int
    drafter: str = ""
    """Who drafts within the step; empty: the host, or nobody."""
    shares: bool = False
    """Whether samples of a prompt read it together."""


class StepOutputs(NamedTuple):
    out_RW: torch.Tensor
    """What the host reads (`finish_step`)."""
    hidden_ND: torch.Tensor
    tapped: dict[int, torch.Tensor]


class StepProgram:
    """For rollouts of one kind: their sampling, their memory, at most so many rows at once and drafts of the host."""

    def __init__(
        self,
        view: PolicyView,
        graphs: GraphBackend,
        kv_cache: KVCache,
        sampling: SamplingParams,
        state: DecodeState,
        drafters: dict[str, StepDrafter],
        num_rows: int,
        max_drafts: int,
    ) -> None:
        self.view, self.graphs, self.kv_cache, self.sampling = view, graphs, kv_cache, sampling
        self.state, self.drafters = state, drafters
        device = view.device
        stops, early = token_ids_of(sampling, view.vocab_size)
        self.stop_ids_E = torch.tensor(stops, dtype=torch.int64, device=device)
        self.early_ids_E = torch.tensor(early, dtype=torch.int64, device=device)
        """Tokens that cannot be drawn before `min_new_tokens`."""
        rows_6R = torch.zeros(6, num_rows, dtype=torch.int64, device=device)
        self.slots_R, self.draft_lens_R, self.shared_R, self.spans_3P = *rows_6R[:3], rows_6R[3:]
        self.drafts = torch.zeros(num_rows * max_drafts, dtype=torch.int64, device=device)

    def step(self, key: StepKey) -> Callable[[], StepOutputs]:
        """The step of a key, to be captured."""
        num_rows, num_drafts, name, shares = key
        state, num_places = self.state, 1 + num_drafts
        slots_R, drafts_RK = self.slots_R[:num_rows], self.drafts[: num_rows * num_drafts].view(num_rows, num_drafts)
        draft_lens_R = self.draft_lens_R[:num_rows] if num_drafts and not name else None
        query_starts_R = torch.arange(num_rows, device=slots_R.device) * num_places
        (first_P, num_rows_P), shared_R = self.spans_3P[:2, : num_rows // 2], self.shared_R[:num_rows]

        def step() -> StepOutputs:
            rows = (state.last_tokens_S, state.starts_S, state.remaining_S)
            guesses_RK = self.drafters[name].draft(num_drafts, slots_R, state) if name else drafts_RK
            inputs = prepare_step(
                slots_R,
                *rows,
                state.seeds_S,
                state.prompt_lens_S,
                state.tables_SM,
                guesses_RK,
                draft_lens_R,
                self.kv_cache.shape.block_size,
            )
            batch = ForwardBatch.of_step(self.kv_cache, inputs, query_starts_R, num_places)
            if shares:
                places = (first_P * num_places, num_rows_P * num_places)
                batch.shared = SharedPrefixes(*places, first_P, shared_R, num_rows * num_places)
            hidden_ND = self.view.hidden_states(batch)
            tokens_N, logprobs_N = self._draw(hidden_ND, inputs, slots_R, num_places)
            drawn = (inputs.input_ids_N, tokens_N, logprobs_N, inputs.query_lens_R)
            out_RW, last_places_R = finish_step(slots_R, *drawn, self.stop_ids_E, *rows)
            for drafter in self.drafters.values():  # also those that are not asked: they may be at any step
                drafter.keep(slots_R, batch, last_places_R, tokens_N)
            return StepOutputs(out_RW, hidden_ND, batch.tapped)

        return step

    def write_rows(self, slots: list[int], sharing: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Which rows take part, and which of them begin with the same blocks (`spans_of`)."""
        self._fill(self.slots_R, np.array(slots))
        if sharing is not None:
            spans_3P, shared_R = sharing
            self._fill(self.spans_3P, spans_3P)
            self._fill(self.shared_R, shared_R)

    def write_drafts(self, drafts: list[list[int]], lens: np.ndarray, num_drafts: int) -> None:
        """The host's drafts: R rows, lens[r] of num_drafts tokens each."""
        padded_RK = np.zeros((len(drafts), num_drafts), np.int64)
        padded_RK[np.arange(num_drafts) < lens[:, None]] = list(chain.from_iterable(drafts))
        self.graphs.to_device(padded_RK.ravel(), self.drafts)
        self.graphs.to_device(lens, self.draft_lens_R)

    def _fill(self, target: torch.Tensor, values: np.ndarray) -> None:
        """The first columns are these, zeros follow: of padding."""
        padded = np.zeros(target.shape, np.int64)
        padded[..., : values.shape[-1]] = values
        self.graphs.to_device(padded, target)

    def _draw(
        self, hidden_ND: torch.Tensor, inputs: StepInputs, slots_R: torch.Tensor, num_places: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token and log-prob after each place, in slices of rows that bound the logits' memory."""
        params, forbidden_N = self.sampling, None
        if params.min_new_tokens and len(self.early_ids_E):
            prompt_lens_RQ = self.state.prompt_lens_S[slots_R][:, None].expand(-1, num_places)
            forbidden_N = inputs.positions_N + 1 - prompt_lens_RQ.flatten() < params.min_new_tokens
        temperature = 1.0 if params.is_greedy else params.temperature
        step, parts = max(1, MAX_LOGITS // self.view.vocab_size), []
        for start in range(0, len(hidden_ND), step):
            part = slice(start, start + step)
            logits_NV = self.view.logits(hidden_ND[part])
            forbidden = None if forbidden_N is None else (self.early_ids_E, forbidden_N[part])
            thresholds_N = None
            if params.has_filters and not params.is_greedy:
                cuts = {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
                thresholds_N = filter_thresholds(logits_NV, temperature, **cuts, forbidden=forbidden)
            keys_2N = None if params.is_greedy else inputs.keys_2N[:, part]
            options = {"thresholds_N": thresholds_N, "forbidden": forbidden}
            parts.append(coupled_sample(logits_NV, keys_2N, temperature, **options))
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def token_ids_of(sampling: SamplingParams, vocab_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens that end a completion, and those that cannot be drawn before `min_new_tokens`."""
    early = {i for i in (*sampling.eos_token_ids, *sampling.stop_token_ids) if 0 <= i < vocab_size}
    return tuple(sorted(sampling.stopping_ids)), tuple(sorted(early))


def sampling_key(sampling: SamplingParams, vocab_size: int) -> Hashable:
    """All that a step depends on."""
    cuts = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.min_new_tokens)
    return (*cuts, *token_ids_of(sampling, vocab_size))
