"""What rollouts leave for their drafter to learn from: the policy's hidden states, kept as they are computed.

Nothing is computed for it. A decode step's tensors are kept by reference, and copied a few steps at a time; of a long rollout,
rows are chosen at random, whole, until a bound is reached.

Shapes: N tokens, L tapped layers, D hidden size, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from atlas_rl.adapt.replay import Replay, group_numbers
from atlas_rl.drafters.base import DraftRow
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.types import SamplingParams

FLUSH_STEPS = 32
"""Steps whose tensors are kept whole."""


class Capture:
    """Completions of one rollout, each from the last token of its prompt on.

    Args:
        layers: whose outputs are kept, beside the last hidden states. max_tokens: kept at most. seed: of the choice of rows.
    """

    def __init__(self, layers: Sequence[int], max_tokens: int, seed: int = 0) -> None:
        self.layers = tuple(layers)
        self.max_tokens = max_tokens
        self.rng = np.random.default_rng(seed)
        self.share = 1.0
        """Of rows that are kept: what the last rollout would have needed to stay within the bound."""
        self.sampling = SamplingParams()
        """Of the last rollout."""
        self.begin()

    def begin(self) -> None:
        self.chosen: dict[int, bool] = {}
        self.finished: dict[int, DraftRow] = {}
        self.pending: list[tuple[Sequence[DraftRow], ForwardBatch, np.ndarray]] = []
        self.parts: list[tuple[list[torch.Tensor], np.ndarray, np.ndarray]] = []
        """Features, and their rows and positions within the completion (-1: the prompt's last token)."""
        self.num_kept = self.num_seen = 0

    def wake(self, sampling: SamplingParams) -> None:
        """A rollout begins."""
        self.sampling = sampling

    def verified(self, rows: Sequence[DraftRow], batch: ForwardBatch, num_right: np.ndarray) -> None:
        """A decode step (`Drafter.verified`)."""
        self.num_seen += len(rows) + int(num_right.sum())
        if self.num_kept >= self.max_tokens:
            return
        self.pending.append((list(rows), batch, num_right))  # the engine's own list changes as rows come and go
        if len(self.pending) >= FLUSH_STEPS:
            self._flush()

    def release(self, rows: Sequence[DraftRow], finished: bool) -> None:
        if finished:
            self.finished.update((row.row_id, row) for row in rows if self._is_chosen(row.row_id))

    def take(self) -> Replay | None:
        """What was kept of the completions that are finished (on the CPU or wherever the policy is), and start anew."""
        self._flush()
        replay = self._assemble() if self.parts and self.finished else None
        if self.num_seen:
            self.share = min(1.0, self.max_tokens / self.num_seen)
        self.begin()
        return replay

    def _is_chosen(self, row_id: int) -> bool:
        if row_id not in self.chosen:
            self.chosen[row_id] = self.share == 1.0 or bool(self.rng.random() < self.share)
        return self.chosen[row_id]

    def _flush(self) -> None:
        """Copy what the pending steps' chosen rows have emitted."""
        if not self.pending:
            return
        rows = [row for step_rows, _, _ in self.pending for row in step_rows]
        batches = [batch for _, batch, _ in self.pending]
        query_lens = np.concatenate([batch.query_lens for batch in batches])
        counts = np.concatenate([num_right for _, _, num_right in self.pending]) + 1
        counts = np.where([self._is_chosen(row.row_id) for row in rows], counts, 0)
        # beyond the bound nothing is kept, of this step and of all later ones: rows have no gap
        counts = np.diff(np.minimum(np.cumsum(counts), self.max_tokens - self.num_kept), prepend=0)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        places = np.repeat(np.cumsum(query_lens) - query_lens, counts) + within
        row_ids = np.repeat(np.array([row.row_id for row in rows], np.int64), counts)
        prompt_lens = np.repeat(np.array([len(row.prompt_ids) for row in rows], np.int64), counts)
        positions = np.concatenate([batch.positions for batch in batches])[places] - prompt_lens
        at = torch.from_numpy(places).to(batches[0].hidden_ND.device)
        layers = [[batch.tapped[layer] for batch in batches] for layer in self.layers]
        sources = [torch.cat(tensors)[at] for tensors in [*layers, [batch.hidden_ND for batch in batches]]]
        self.parts.append((sources, row_ids, positions))
        self.num_kept += len(places)
        self.pending.clear()

    def _assemble(self) -> Replay | None:
        *_, (sources, _, _) = self.parts
        row_ids = np.concatenate([part[1] for part in self.parts])
        positions = np.concatenate([part[2] for part in self.parts])
        # rows one after another, each in the order of its positions; what a preempted row computed twice is taken once
        order = np.lexsort((positions, row_ids))
        row_ids, positions = row_ids[order], positions[order]
        ends = np.array([len(self.finished[i].output_ids) if i in self.finished else -2 for i in row_ids.tolist()])
        keep = positions < ends - 1  # an emitted token after EOS or the last one leads to nothing
        keep[1:] &= (row_ids[1:] != row_ids[:-1]) | (positions[1:] != positions[:-1])
        row_ids, positions, order = row_ids[keep], positions[keep], order[keep]
        if not len(order):
            return None
        ids, starts, counts = np.unique(row_ids, return_index=True, return_counts=True)
        # a row is of use as far as it is without a gap
        whole = (positions[starts] == -1) & (positions[starts + counts - 1] == counts - 2)
        chosen = np.repeat(whole, counts)
        order, ids, counts = order[chosen], ids[whole], counts[whole]
        if not len(order):
            return None
        rows = [self.finished[i] for i in ids.tolist()]
        tokens, index = [], []
        for row, start, count in zip(rows, (np.cumsum(counts) - counts).tolist(), counts.tolist(), strict=True):
            tokens += [row.prompt_ids[-1], *row.output_ids[:count]]
            # the last token's features are not known, nor needed: a copy of those before it fills their place
            index += [*range(start, start + count), start + count - 1]
        with torch.inference_mode(False), torch.no_grad():  # autograd cannot read inference tensors: these are copies
            gathered = [torch.cat([part[0][s] for part in self.parts]) for s in range(len(sources))]
            at = torch.from_numpy(order[np.array(index)]).to(gathered[0].device)
            *tapped, hidden_ND = (source[at].clone() for source in gathered)
            tapped_NLD = (
                torch.stack(tapped, 1) if tapped else hidden_ND.new_empty(len(hidden_ND), 0, hidden_ND.shape[1])
            )
            return Replay(
                token_ids_N=torch.tensor(tokens, device=hidden_ND.device),
                hidden_ND=hidden_ND,
                tapped_NLD=tapped_NLD,
                lens_R=torch.from_numpy(counts + 1),
                prompt_lens_R=torch.ones(len(rows), dtype=torch.int64),
                seeds_R=torch.tensor([row.noise_seed or 0 for row in rows]),
                groups_R=group_numbers([row.prompt_ids for row in rows]),
            )
