"""A captured step that was launched, and what the host learns of it.

Shapes: N = R * Q places of the step's rows; of these, those that were still running are back to back in what is handed on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.decode_state import to_device
from atlas_rl.engine.graphs import HostCopy, Stopwatch
from atlas_rl.engine.kv_cache import KVCache
from atlas_rl.engine.sequence import Sequence
from atlas_rl.engine.step_program import StepKey, StepOutputs


class Emitted(NamedTuple):
    """What a step brought for the R rows that were still running."""

    rows: np.ndarray
    """[R] their places among the rows of the step."""
    num_right: np.ndarray
    """[R] draft tokens that the policy drew too."""
    tokens_RQ: np.ndarray
    logprobs_RQ: np.ndarray


@dataclass(slots=True)
class InFlight:
    sequences: list[Sequence]
    key: StepKey
    copy: HostCopy
    watch: Stopwatch
    outputs: StepOutputs
    draft_lens: np.ndarray
    """[R] draft tokens of each row."""
    keeps_hidden: bool
    """Whether the hidden states in `outputs` are copies; else they are the next step's by now."""
    plan: Any = None
    """Whoever launched it keeps here what it was launched for, when, and how long drafting took before."""
    launched: float = 0.0
    drafting: float = 0.0

    @property
    def num_places(self) -> int:
        """Q, of each row."""
        return 1 + self.key.num_drafts

    def collect(self) -> Emitted:
        """What it emitted; waits until it is done."""
        out_RW, num_places = self.copy.wait()[: len(self.sequences)], self.num_places
        rows = np.flatnonzero(out_RW[:, 0] >= 0)
        out_RW = out_RW[rows]
        tokens_RQ = out_RW[:, 1 : 1 + num_places].astype(np.int64)
        return Emitted(rows, out_RW[:, 0].astype(np.int64), tokens_RQ, out_RW[:, 1 + num_places :])

    def batch(self, kv_cache: KVCache, sequences: list[Sequence], emitted: Emitted) -> ForwardBatch:
        """The step over rows that still ran, `sequences`, as an uncaptured one would leave it, without padding.

        To be called before what it emitted is appended. The hidden states are there if they were kept.
        """
        device = kv_cache.memory_L2NHSD.device
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        lens = np.array([seq.num_remaining for seq in sequences])
        lens = np.minimum(lens, 1 + self.draft_lens[emitted.rows])
        starts = np.array([seq.num_computed for seq in sequences])
        within = np.arange(lens.sum()) - np.repeat(np.cumsum(lens) - lens, lens)
        batch = ForwardBatch(
            kv_cache=kv_cache,
            input_ids_N=nothing,
            positions_N=nothing,
            slots_N=nothing,
            block_tables_RM=nothing,
            starts_R=nothing,
            query_lens_R=nothing,
            max_query_len=self.num_places,
            num_cached=int(starts.sum()),
            positions=np.repeat(starts, lens) + within,
            query_lens=lens,
        )
        if self.keeps_hidden:
            places_N = to_device(np.repeat(emitted.rows * self.num_places, lens) + within, device)
            batch.hidden_ND = self.outputs.hidden_ND[places_N]
            batch.tapped = {layer: x[places_N] for layer, x in self.outputs.tapped.items()}
        return batch
