"""Forwards over the paged cache. Later variants (captured, compiled) stand behind the same two calls."""

from __future__ import annotations

import torch

from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.kv_cache import KVCache
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.scheduler import PrefillChunk
from atlas_rl.engine.sequence import Sequence


class ModelRunner:
    def __init__(self, view: PolicyView, kv_cache: KVCache) -> None:
        self.view = view
        self.kv_cache = kv_cache

    def prefill(self, chunks: list[PrefillChunk]) -> ForwardBatch | None:
        """Write the KV of prefix chunks, a row for each that is not empty; None if all are. No logits: the last prompt token is
        decoded by each sequence itself."""
        chunks = [c for c in chunks if c.end > c.start]
        if not chunks:
            return None
        tokens = [c.group.prefix_ids[c.start : c.end] for c in chunks]
        tables = [c.group.block_table for c in chunks]
        batch = ForwardBatch.build(self.kv_cache, tokens, [c.start for c in chunks], tables)
        self.view.hidden_states(batch)
        return batch

    def verify(self, sequences: list[Sequence], drafts: list[list[int]]) -> tuple[ForwardBatch, torch.Tensor]:
        """One forward over each row's last token and its draft: the batch, and the hidden states [N, D] after each token."""
        tokens = [[seq.last_token, *draft] for seq, draft in zip(sequences, drafts, strict=True)]
        starts = [seq.num_computed for seq in sequences]
        batch = ForwardBatch.build(self.kv_cache, tokens, starts, [seq.block_table for seq in sequences])
        return batch, self.view.hidden_states(batch)
