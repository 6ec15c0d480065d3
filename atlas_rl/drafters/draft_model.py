"""Draft-model drafter: a smaller language model with the policy's tokenizer guesses what the policy says next.

It runs as the policy does: as a `PolicyView`, over a paged cache of its own in the rows' blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from atlas_rl.drafters.base import DraftRow
from atlas_rl.drafters.draft_model_step import DraftModelStep
from atlas_rl.drafters.paged import PagedDrafter, tokens_between
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.kv_cache import KVShape
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.twin import UnsupportedModel

MAX_PIECE = 64
"""Tokens of a row in one forward that catches up."""


class DraftModelDrafter(PagedDrafter):
    name: ClassVar[str] = "draft_model"
    layers = ()
    feeds_ahead = 1
    keeps_up = False
    can_rest = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.num_stored: dict[int, int] = {}
        """Tokens of each row whose keys and values are in the cache, and right."""

    @classmethod
    def load(cls, path: str) -> DraftModelDrafter:
        """From a folder or hub id.

        Raises:
            ValueError: there is no model that can be read.
        """
        try:
            return cls(AutoModelForCausalLM.from_pretrained(path).eval())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a draft model that can be read: {error}") from error

    def bind(self, view: PolicyView) -> None:
        self._check_vocabulary(view)
        self.model.to(view.device, view.compute_dtype)
        self.device, self.policy_vocab_size = view.device, view.vocab_size
        try:
            self.view = PolicyView(self.model)
        except UnsupportedModel as reason:
            raise ValueError(f"the draft model {self.model.name_or_path} cannot be run: {reason}") from None

    def _check_vocabulary(self, view: PolicyView) -> None:
        """Where both models come with a tokenizer, these have to agree on every token; the models of a family often pad their
        vocabularies to different sizes. Where they do not, the sizes tell."""
        path, policy_path = self.model.name_or_path, view.model.name_or_path
        ours, policys = _token_ids(path), _token_ids(policy_path)
        size = self.model.get_output_embeddings().weight.shape[0]
        if ours is None or policys is None:
            if size != view.vocab_size:
                raise ValueError(
                    f"the draft model {path} has a vocabulary of {size} tokens and the policy one of {view.vocab_size}: a draft "
                    "model needs the policy's tokenizer"
                )
        elif ours != policys:
            differing = sorted(token for token in ours.keys() | policys.keys() if ours.get(token) != policys.get(token))
            raise ValueError(
                f"the draft model {path} has another tokenizer than the policy {policy_path}: {len(differing)} tokens differ, "
                f"{differing[0]!r} among them. A draft model needs the policy's tokenizer"
            )

    def within_step(self) -> DraftModelStep:
        return DraftModelStep(self)

    def kv_shape(self, block_size: int) -> KVShape:
        return self.view.kv_shape(block_size)

    def sleep(self) -> None:
        super().sleep()
        self.num_stored.clear()

    def prefilled(self, batch: ForwardBatch, next_token_ids: np.ndarray) -> None:
        self.hidden_states(replace(batch, kv_cache=self.kv_cache, tapped={}, masks={}))

    def admit(self, rows: Sequence[DraftRow]) -> None:
        super().admit(rows)
        self.num_stored.update((row.row_id, row.num_computed) for row in rows)

    def started(self, rows: Sequence[DraftRow], batch: ForwardBatch, places: np.ndarray) -> None:
        """Their prefixes are in the cache: `prefilled` saw to it."""

    def verified(self, rows: Sequence[DraftRow], batch: ForwardBatch, num_right: np.ndarray) -> None:
        """Emitted tokens are found in `output_ids` when they are wanted."""

    def release(self, rows: Sequence[DraftRow], finished: bool) -> None:
        super().release(rows, finished)
        for row in rows:
            del self.num_stored[row.row_id]

    def catch_up(self, rows: Sequence[DraftRow]) -> tuple[np.ndarray, torch.Tensor]:
        """Piece by piece, so that a row that was not drafted for in a long time needs no more memory than a prefill."""
        ends = np.array([row.num_computed + 1 for row in rows], np.int64)
        # the last token is computed in any case: its state is what the first guess comes from
        stored = np.minimum([self.num_stored[row.row_id] for row in rows], ends - 1)
        self._store_pieces(rows, stored, ends - MAX_PIECE)
        states_ND = self._forward(rows, stored, ends)
        self.num_stored.update(zip((row.row_id for row in rows), ends.tolist()))
        last = torch.from_numpy(np.cumsum(ends - stored) - 1).to(self.device)
        return np.arange(len(rows)), states_ND.index_select(0, last)

    def rejoin(self, rows: Sequence[DraftRow]) -> None:
        """Within a step it computes the last two tokens of a row: the rest of those that it lacks is computed now."""
        ends = np.array([row.num_computed - 1 for row in rows], np.int64)
        stored = np.array([self.num_stored[row.row_id] for row in rows], np.int64)
        self._store_pieces(rows, stored, ends)
        self.num_stored.update(zip((row.row_id for row in rows), np.maximum(stored, ends).tolist()))

    def drafted_within(self, rows: Sequence[DraftRow]) -> None:
        self.num_stored.update((row.row_id, row.num_computed - 1) for row in rows)

    def _store_pieces(self, rows: Sequence[DraftRow], stored: np.ndarray, ends: np.ndarray) -> None:
        """Have at least so many tokens of each row in the cache; `stored`, how many there are, is brought up to date."""
        while (late := np.flatnonzero(stored < ends)).size:
            until = np.minimum(stored[late] + MAX_PIECE, ends[late])
            self._forward([rows[i] for i in late.tolist()], stored[late], until)
            stored[late] = until

    def _forward(self, rows: Sequence[DraftRow], starts: np.ndarray, ends: np.ndarray) -> torch.Tensor:
        """Hidden states after tokens [start, end) of each row."""
        spans = zip(rows, starts.tolist(), ends.tolist())
        token_ids = [tokens_between(row, start, end) for row, start, end in spans]
        tables = [row.block_table for row in rows]
        return self.hidden_states(ForwardBatch.build(self.kv_cache, token_ids, starts.tolist(), tables))

    def hidden_states(self, batch: ForwardBatch) -> torch.Tensor:
        if self.view.vocab_size < self.policy_vocab_size:  # padding of the policy's has no embedding here
            batch.input_ids_N = batch.input_ids_N.clamp(max=self.view.vocab_size - 1)
        return self.view.hidden_states(batch)

    def advance(self, batch: ForwardBatch, states_RD: torch.Tensor) -> torch.Tensor:
        return self.hidden_states(batch)

    def logits(self, states_RD: torch.Tensor) -> torch.Tensor:
        logits_RV = self.view.logits(states_RD)
        excess = self.policy_vocab_size - logits_RV.shape[1]
        return logits_RV if excess == 0 else F.pad(logits_RV, (0, excess), value=-torch.inf)  # a negative one cuts

    def judged(self, rows: Sequence[DraftRow], num_right_fed: np.ndarray) -> None:
        for row, num_right in zip(rows, num_right_fed.tolist()):
            self.num_stored[row.row_id] += num_right


def _token_ids(path: str) -> dict[str, int] | None:
    """The tokenizer that lies beside a model, if one does."""
    if not path or not Path(path, "tokenizer_config.json").exists():
        return None
    return AutoTokenizer.from_pretrained(path).get_vocab()
