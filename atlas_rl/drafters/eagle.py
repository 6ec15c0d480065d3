"""EAGLE-3 drafter: an `EagleHead` over a paged cache, on the policy's hidden states.

Slot t of a row's KV holds the pair (features at t, token t + 1), whose output guesses token t + 2. A draft starts from the last
pair that is known, and goes on with pairs of its own: the state that it comes from, and the token that it guessed. As soon as the
policy has verified these tokens, its true features take their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from atlas_rl.drafters.base import DraftRow
from atlas_rl.drafters.eagle_forward import PagedEagle
from atlas_rl.drafters.eagle_head import EagleHead, default_layers
from atlas_rl.drafters.eagle_step import EagleStep
from atlas_rl.drafters.paged import PagedDrafter, tokens_between
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.kv_cache import KVShape
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import SamplingParams

__all__ = ["EagleDrafter", "EagleHead"]

MAX_BACKLOG = 64
"""Positions of a row whose features are kept for later; then the drafter catches up without being asked."""


@dataclass(slots=True)
class Features:
    """What the policy computed for some rows in one step: places [start, start + count) of its tensors."""

    tapped: list[torch.Tensor]
    """[N, D] per layer."""
    lives: np.ndarray
    """[R] of the rows (`EagleDrafter.lives`)."""
    starts: np.ndarray
    counts: np.ndarray
    positions: np.ndarray
    """[R] in its sequence, of each row's first place."""


class EagleDrafter(PagedDrafter):
    """
    Args:
        head: it is moved to the policy's device and cast to its compute dtype.
    """

    name: ClassVar[str] = "eagle"
    feeds_ahead = 0  # the first guess makes a pair with the state that it comes from, which stands for the last token's

    def __init__(self, head: EagleHead) -> None:
        super().__init__()
        self.head = head
        self.backlog: list[Features] = []
        """Of positions whose pairs are not in the KV yet, oldest first."""
        self.backlog_len = 0
        """Positions of a row in the backlog, at most."""
        self.lives: dict[int, int] = {}
        """A number for each row, a new one after each preemption: what was computed for a former life is void."""
        self.num_lives = 0

    def bind(self, view: PolicyView) -> None:
        head = self.head
        size, vocab_size = view.hidden_size, view.vocab_size
        if (head.hidden_size, head.vocab_size) != (size, vocab_size):
            raise ValueError(
                f"this EAGLE head was made for a policy of hidden size {head.hidden_size} and {head.vocab_size} tokens, but "
                f"this one has hidden size {size} and {vocab_size} tokens: name a head that was trained for this policy"
            )
        if head.layers is None:
            head.layers = default_layers(view.num_layers)
        if len(head.layers) * size != head.fc.in_features or not all(0 <= i < view.num_layers for i in head.layers):
            raise ValueError(
                f"this EAGLE head reads {head.fc.in_features // size} layers {list(head.layers)}, but the policy has "
                f"{view.num_layers} layers: name a head that was trained for this policy"
            )
        self.view, self.device, self.layers = view, view.device, head.layers
        embedding = view.model.get_input_embeddings().weight
        if head.embed_tokens is not None and torch.equal(head.embed_tokens.weight.to(embedding), embedding):
            head.embed_tokens = None  # a copy of the policy's: the live ones then, as vLLM has it
        head.to(view.device, view.compute_dtype)
        self.paged = PagedEagle(head)

    def within_step(self) -> EagleStep:
        return EagleStep(self)

    def refresh(self) -> None:
        """Take over the head's weights after they have changed in place."""
        self.paged.refresh()

    def kv_shape(self, block_size: int) -> KVShape:
        head = self.head
        return KVShape(
            num_layers=1,
            num_kv_heads=head.num_kv_heads,
            head_dim=head.head_dim,
            dtype=head.fc.weight.dtype,
            block_size=block_size,
        )

    def wake(self, sampling: SamplingParams, num_blocks: int, block_size: int) -> None:
        super().wake(sampling, num_blocks, block_size)
        self._drop_backlog()

    def sleep(self) -> None:
        super().sleep()
        self._drop_backlog()
        self.lives.clear()

    def prefilled(self, batch: ForwardBatch, next_token_ids: np.ndarray) -> None:
        token_ids = np.roll(batch.input_ids, -1)
        token_ids[np.cumsum(batch.query_lens) - 1] = next_token_ids
        token_ids_N = torch.from_numpy(token_ids).to(self.device)
        pairs = replace(batch, kv_cache=self.kv_cache, input_ids_N=token_ids_N, masks={})
        self.outputs(pairs, [batch.tapped[layer] for layer in self.layers])

    def admit(self, rows: Sequence[DraftRow]) -> None:
        super().admit(rows)
        for row in rows:
            self.num_lives += 1
            self.lives[row.row_id] = self.num_lives

    def started(self, rows: Sequence[DraftRow], batch: ForwardBatch, places: np.ndarray) -> None:
        """A prefix's last pair is in the KV already, but a row's first draft wants its output: it is computed once more."""
        known = np.flatnonzero(places >= 0)
        if len(known):
            index = torch.from_numpy(places[known]).to(self.device)
            tapped = [batch.tapped[layer].index_select(0, index) for layer in self.layers]
            positions = np.array([rows[i].num_computed - 1 for i in known.tolist()], np.int64)
            self._keep(tapped, [rows[i] for i in known.tolist()], np.arange(len(known)), np.ones_like(known), positions)

    def verified(self, rows: Sequence[DraftRow], batch: ForwardBatch, num_right: np.ndarray) -> None:
        if self.backlog_len >= MAX_BACKLOG:  # rows that ended in an earlier step have left, their tokens are complete
            self.catch_up([])
        starts = np.cumsum(batch.query_lens) - batch.query_lens
        tapped = [batch.tapped[layer] for layer in self.layers]
        self._keep(tapped, rows, starts, num_right + 1, batch.positions[starts])

    def release(self, rows: Sequence[DraftRow], finished: bool) -> None:
        super().release(rows, finished)
        for row in rows:
            del self.lives[row.row_id]

    def catch_up(self, rows: Sequence[DraftRow]) -> tuple[np.ndarray, torch.Tensor]:
        if len(rows) < len(self.rows):
            asked = {row.row_id for row in rows}
            others = [row for row in self.rows.values() if row.row_id not in asked]
        else:
            others = []
        able, ends, states = self._catch_up([*rows, *others])
        mine = able < len(rows)
        index = torch.from_numpy(ends[mine]).to(self.device)
        return able[mine], states.index_select(0, index)

    def _catch_up(self, rows: Sequence[DraftRow]) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """One forward over all pairs in the backlog: rows that had any, places of their last pairs, and outputs [N, D]."""
        index = {self.lives[row.row_id]: i for i, row in enumerate(rows)}
        num_features, parts = 0, []
        for kept in self.backlog:
            at = np.array([index.get(life, -1) for life in kept.lives.tolist()], np.int64)
            part = np.stack([at, kept.starts + num_features, kept.counts, kept.positions])
            parts.append(part[:, at >= 0])
            num_features += len(kept.tapped[0])
        tapped = [torch.cat(layer) if len(layer) > 1 else layer[0] for layer in zip(*(k.tapped for k in self.backlog))]
        self._drop_backlog()
        rows_P, starts_P, counts_P, positions_P = np.concatenate([*parts, np.zeros((4, 0), np.int64)], axis=1)
        if not len(rows_P):
            nothing = np.zeros(0, np.int64)
            return nothing, nothing, self.head.fc.weight.new_zeros(0, self.head.hidden_size)
        order = np.argsort(rows_P, kind="stable")  # pieces of a row follow each other in time
        able, first = np.unique(rows_P[order], return_index=True)
        counts = np.add.reduceat(counts_P[order], first)
        positions = positions_P[order][first]
        places = _ranges(starts_P[order], counts_P[order])
        if len(places) != num_features or (np.diff(places) != 1).any():
            chosen = torch.from_numpy(places).to(self.device)
            tapped = [layer.index_select(0, chosen) for layer in tapped]
        spans = zip(able.tolist(), positions.tolist(), counts.tolist())
        token_ids = [tokens_between(rows[i], start + 1, start + 1 + count) for i, start, count in spans]
        tables = [rows[i].block_table for i in able.tolist()]
        batch = ForwardBatch.build(self.kv_cache, token_ids, positions.tolist(), tables)
        return able, np.cumsum(counts) - 1, self.outputs(batch, tapped)

    def outputs(self, batch: ForwardBatch, tapped: list[torch.Tensor]) -> torch.Tensor:
        """Outputs [N, D] of pairs of a batch's tokens and the policy's features before them."""
        return self.advance(batch, self._fuse(tapped))

    def advance(self, batch: ForwardBatch, states_RD: torch.Tensor) -> torch.Tensor:
        return self.paged(batch, self._embed(batch.input_ids_N), states_RD)

    def logits(self, states_RD: torch.Tensor) -> torch.Tensor:
        logits_RV, token_ids_V = self.draft_logits(states_RD)
        if token_ids_V is None:
            return logits_RV
        whole_RV = logits_RV.new_full((len(states_RD), self.head.vocab_size), -torch.inf)
        return whole_RV.index_copy_(1, token_ids_V, logits_RV)

    def draft_logits(self, states_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        paged = self.paged
        normed_RD = torch.rms_norm(states_RD, paged.final_norm.shape, paged.final_norm, paged.eps)
        if paged.lm_head is None:
            return self.view.logits(normed_RD), None
        return paged.lm_head(normed_RD), self.head.draft_ids

    def _fuse(self, tapped: list[torch.Tensor]) -> torch.Tensor:
        return self.paged.fc(torch.cat(tapped, dim=1).to(self.head.fc.weight.dtype))

    def _embed(self, token_ids_N: torch.Tensor) -> torch.Tensor:
        embedding = self.head.embed_tokens or self.view.model.get_input_embeddings()
        return F.embedding(token_ids_N, embedding.weight.detach()).to(self.head.fc.weight.dtype)

    def _keep(
        self,
        tapped: list[torch.Tensor],
        rows: Sequence[DraftRow],
        starts: np.ndarray,
        counts: np.ndarray,
        positions: np.ndarray,
    ) -> None:
        lives = np.array([self.lives[row.row_id] for row in rows], np.int64)
        self.backlog.append(Features(tapped, lives, starts, counts, positions))
        self.backlog_len += int(counts.max())

    def _drop_backlog(self) -> None:
        self.backlog, self.backlog_len = [], 0


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[start, start + count) of each, back to back."""
    return np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)
