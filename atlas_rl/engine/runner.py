"""Forwards over the paged cache. Later variants (captured, compiled) stand behind the same two calls."""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch

from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.kv_cache import KVCache
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.running_rows import RunningRows
from atlas_rl.engine.scheduler import PrefillChunk
from atlas_rl.engine.sequence import Sequence


class ModelRunner:
    def __init__(self, view: PolicyView, kv_cache: KVCache) -> None:
        self.view = view
        self.kv_cache = kv_cache
        self.rows = RunningRows()
        """Of the last `verify`."""

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

    def verify(
        self, sequences: list[Sequence], drafts: list[list[int]], tap: bool = True
    ) -> tuple[ForwardBatch, torch.Tensor]:
        """One forward over each row's last token and its draft: the batch, and the hidden states [N, D] after each token.

        Args:
            tap: whether anybody reads what layers leave.
        """
        num_rows = len(sequences)
        self.rows.follow(sequences)
        flat_ids = np.fromiter((seq.last_token for seq in sequences), np.int64, num_rows)
        query_lens = np.ones(num_rows, np.int64)
        if any(drafts):
            tokens = ((token, *draft) for token, draft in zip(flat_ids.tolist(), drafts, strict=True))
            query_lens += np.fromiter(map(len, drafts), np.int64, num_rows)
            flat_ids = np.fromiter(chain.from_iterable(tokens), np.int64, int(query_lens.sum()))
        start_R = np.fromiter((seq.num_computed for seq in sequences), np.int64, num_rows)
        batch = ForwardBatch.of_arrays(self.kv_cache, flat_ids, query_lens, start_R, self.rows.block_tables)
        batch.is_tapped = tap
        return batch, self.view.hidden_states(batch)
