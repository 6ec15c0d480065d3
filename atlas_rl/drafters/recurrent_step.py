"""The recurrent drafter within a captured decode step: the same guesses as `RecurrentDrafter` makes, without the host.

Shapes: S slots, R rows, K draft tokens, L tapped layers, D hidden size, V tokens of the draft vocabulary (rounded up).
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from atlas_kernels import coupled_sample, device_row_keys, filter_thresholds, fused_linear
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.decode_state import DecodeState, to_device
from atlas_rl.engine.twin import scale_logits
from atlas_rl.types import SamplingParams

if TYPE_CHECKING:
    from atlas_rl.drafters.recurrent import RecurrentDrafter


class RecurrentStep:
    """Serves a drafter's head from a copy in the policy's dtype, and from a slice of the policy's output head.

    Copies are refreshed in place, between rollouts: captured steps go on reading them.
    """

    def __init__(self, drafter: RecurrentDrafter) -> None:
        self.drafter = drafter
        self.view = drafter.view
        self.head = copy.deepcopy(drafter.head).to(self.view.compute_dtype)
        self.ids_V: torch.Tensor | None = None
        """The draft vocabulary, -1 where it is filled up; None: all of the policy's tokens."""
        self.features_SLD: torch.Tensor | None = None
        """The tapped layers' outputs and the last hidden state where each slot's last token was drawn."""

    def wake(self, sampling: SamplingParams, num_slots: int) -> None:
        """A rollout begins; weights and words may have changed since the last one."""
        view, head = self.view, self.drafter.head
        self.sampling = sampling
        with torch.no_grad():
            for mine, theirs in zip(self.head.parameters(), head.parameters(), strict=True):
                mine.copy_(theirs)
        self._take_words()
        dims = (num_slots, len(head.layers) + 1, head.hidden_size)
        if self.features_SLD is None or self.features_SLD.shape != dims:
            self.features_SLD = torch.zeros(dims, dtype=view.hidden_dtype, device=view.device)

    def memory_key(self) -> Hashable:
        """Changes with the memory that captured steps read."""
        words = (0, 0) if self.ids_V is None else (self.ids_V.data_ptr(), self.weight_VD.data_ptr())
        return (self.features_SLD.data_ptr(), *words)

    def admit(self, slots: list[int], batch: ForwardBatch | None, places: np.ndarray) -> None:
        """Rows begin; the last token of row i's prefix is at places[i] of the batch, -1: there is none."""
        at = to_device(np.array([slots, places], np.int64), self.view.device)
        self.features_SLD.index_fill_(0, at[0], 0)
        if batch is not None:
            known = to_device(np.flatnonzero(places >= 0), self.view.device)
            self.keep(at[0][known], batch, at[1][known])

    def keep(self, slots_R: torch.Tensor, batch: ForwardBatch, places_R: torch.Tensor) -> None:
        """The features that each row's next draft starts from are at these places of the batch."""
        sources = [*(batch.tapped[layer] for layer in self.head.layers), batch.hidden_ND]
        features = torch.stack([source[places_R].to(self.features_SLD.dtype) for source in sources], dim=1)
        self.features_SLD.index_copy_(0, slots_R, features)

    def draft(self, num_drafts: int, slots_R: torch.Tensor, state: DecodeState) -> torch.Tensor:
        """Guesses [R, K] of what follows each row's last token."""
        features_RLD = self.features_SLD[slots_R]
        states_RD = self.head.start(features_RLD[:, :-1], features_RLD[:, -1])
        last_R, seeds_R = state.last_tokens_S[slots_R], state.seeds_S[slots_R]
        # the last token is drawn already: the first guess is of the one that the policy draws next
        drawn_R = state.starts_S[slots_R] + 1 - state.prompt_lens_S[slots_R]
        embedding = self.view.model.get_input_embeddings().weight
        guesses = []
        for depth in range(num_drafts):
            states_RD = self.head.step(states_RD, F.embedding(last_R, embedding))
            guesses_R = self._draw(self._logits(states_RD), seeds_R, drawn_R + depth)
            last_R = guesses_R.clamp(min=0)  # of logits that are NaN anything may come
            guesses.append(last_R)
        return torch.stack(guesses, dim=1)

    def _logits(self, states_RD: torch.Tensor) -> torch.Tensor:
        hidden_RD = self.head.output(states_RD)
        if self.ids_V is None:
            return self.view.logits(hidden_RD.to(self.view.hidden_dtype))
        logits_RV = fused_linear(hidden_RD, [self.weight_VD], [self.bias_V])
        return scale_logits(logits_RV, self.view.model.config) if self.view.scales_logits else logits_RV

    def _draw(self, logits_RV: torch.Tensor, seeds_R: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
        """The policy's way of drawing, with its noise; a token that cannot be drawn yet may be guessed."""
        params = self.sampling
        if params.is_greedy:
            return coupled_sample(logits_RV, None, 1.0, token_ids_V=self.ids_V)[0]
        thresholds_R = None
        if params.has_filters:
            cuts = {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
            thresholds_R = filter_thresholds(logits_RV, params.temperature, **cuts)
        keys_2R = device_row_keys(seeds_R, positions_R)
        options = {"thresholds_N": thresholds_R, "token_ids_V": self.ids_V}
        return coupled_sample(logits_RV, keys_2R, params.temperature, **options)[0]

    def _take_words(self) -> None:
        """Copy the output head's rows of the draft vocabulary; other memory is taken only where it has outgrown its own."""
        view, words = self.view, self.drafter.vocabulary
        if len(words.ids) > view.vocab_size // 2:
            self.ids_V = None
            return
        capacity = 1 << (len(words.ids) - 1).bit_length()
        head = view.model.get_output_embeddings()
        if self.ids_V is None or len(self.ids_V) != capacity:
            self.ids_V = torch.empty(capacity, dtype=torch.int64, device=view.device)
            self.weight_VD = torch.empty(capacity, head.weight.shape[1], dtype=view.compute_dtype, device=view.device)
            self.bias_V = None if head.bias is None else self.weight_VD.new_empty(capacity)
        padding = np.full(capacity - len(words.ids), -1)
        self.ids_V.copy_(to_device(np.concatenate([words.ids, padding]), view.device))
        rows_V = self.ids_V.clamp(min=0)
        with torch.no_grad():
            self.weight_VD.copy_(head.weight[rows_V])
            if self.bias_V is not None:
                self.bias_V.copy_(head.bias[rows_V])
