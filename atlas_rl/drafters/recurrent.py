"""Recurrent drafter: goes on from the policy's own hidden states, one light step per guess, without a KV cache.

What it knows of a row are the features of its last token, which the policy leaves at every step anyway: it can be switched to
and away from at any step for nothing. Guesses are drawn through the policy's live output head, over the words that recent
rollouts use.

On CPU in float32 a proposal is one call of C++ (recurrent.cpp): a step of a small policy takes half a millisecond, and a module
call of torch some microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_double, c_float, c_int64, c_void_p
from pathlib import Path

import numpy as np
import torch

from atlas_kernels.native import Library
from atlas_rl.drafters.base import Drafter, DraftRow, Drafts
from atlas_rl.drafters.guess import HALF_LIFE, MARGIN_EDGES, MAX_DEPTH, Calibration, draw
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.drafters.recurrent_step import RecurrentStep
from atlas_rl.drafters.vocab import DraftVocabulary
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import SamplingParams

__all__ = ["RecurrentDrafter", "RecurrentHead"]

POINTER, INT = c_void_p, c_int64
LIBRARY = Library(
    Path(__file__).with_suffix(".cpp"),
    {
        "recurrent_new": [INT] * 3 + [c_float],
        "recurrent_free": [POINTER],
        "recurrent_load": [POINTER] * 6,
        "recurrent_bind": [POINTER] * 2 + [INT] + [POINTER] * 2 + [INT] * 2,
        "recurrent_propose": [POINTER] * 7
        + [INT]
        + [c_float] * 2
        + [POINTER, INT]
        + [POINTER] * 2
        + [INT] * 2
        + [POINTER] * 3,
        "recurrent_judge": [POINTER] * 3 + [INT] * 4 + [c_double] + [POINTER] * 2,
    },
    {"recurrent_new": c_void_p},
)
MAX_TOKEN_PART = 2**24
"""Numbers kept for what tokens add to the state's gates; a larger vocabulary has them computed per guess."""
MAX_DRAFT = 16
EDGES = MARGIN_EDGES.astype(np.float32)


class RecurrentDrafter(Drafter):
    """Serves a `RecurrentHead`.

    Args:
        name: what logs and the controller call it: the same head may be served twice, as a static and as an adaptive drafter.
        vocabulary: another drafter's, who keeps it up to date; None: its own.
    """

    can_rest = True

    def __init__(
        self, head: RecurrentHead, *, name: str = "recurrent", vocabulary: DraftVocabulary | None = None
    ) -> None:
        self.head = head.eval().requires_grad_(False)
        self.name = name
        self.layers = head.layers
        self.calibration = Calibration()
        self.vocabulary = vocabulary
        self.owns_vocabulary = vocabulary is None
        self.native: NativeHead | None = None
        self.is_stale = True
        """Whether `native` lacks weights or words that have changed."""
        self.view: PolicyView | None = None
        self.forget()

    def forget(self) -> None:
        """Of a rollout: which rows there are, and where their features lie."""
        self.rows: list[DraftRow] = []
        self.sources: list[torch.Tensor] = []
        """Features [N, D], of which row i reads place places[i]; -1: it has none yet."""
        self.places = np.zeros(0, np.int64)
        self.latest: tuple[list[DraftRow], ForwardBatch, np.ndarray] | None = None
        """What `verified` was told last, and `started` since; looked at when it is needed."""
        self.begun: list[tuple[list[DraftRow], ForwardBatch | None, np.ndarray]] = []
        self.proposed: tuple[list[DraftRow], np.ndarray] | None = None
        """Rows and cells [R, K] of the last proposal."""

    # ---- life ------------------------------------------------------------------------------------------------------------

    def bind(self, view: PolicyView) -> None:
        if view.hidden_size != self.head.hidden_size or max(self.layers, default=0) >= view.num_layers:
            raise ValueError(
                f"drafter {self.name} was made for a policy of hidden size {self.head.hidden_size} with at least "
                f"{max(self.layers, default=0) + 1} layers, this one has {view.hidden_size} and {view.num_layers}: train one for "
                "it with `atlas-rl drafter train`"
            )
        self.view = view
        self.head.to(view.device)
        if self.owns_vocabulary and (self.vocabulary is None or self.vocabulary.size != view.vocab_size):
            self.vocabulary = DraftVocabulary(view.vocab_size)
        self.native = NativeHead(self.head) if NativeHead.serves(view) else None
        self.weights_updated()

    def within_step(self) -> RecurrentStep:
        return RecurrentStep(self)

    def weights_updated(self) -> None:
        """Take over the head's weights, the policy's, and the draft vocabulary, which may all have changed.

        Raises:
            FloatingPointError: the head's weights are not finite.
        """
        if not self.head.is_finite:
            raise FloatingPointError(f"the weights of drafter {self.name} are NaN or infinite")
        self.is_stale = True  # packing takes milliseconds: it waits until the drafter is asked

    def wake(self, sampling: SamplingParams, num_blocks: int, block_size: int) -> None:
        self.sampling = sampling
        self.forget()

    def sleep(self) -> None:
        self.forget()

    def policy_updated(self) -> None:
        if self.owns_vocabulary:
            self.vocabulary.choose()
        self.weights_updated()

    # ---- rows ------------------------------------------------------------------------------------------------------------

    def started(self, rows: Sequence[DraftRow], batch: ForwardBatch | None, places: np.ndarray) -> None:
        self.begun.append((list(rows), batch, places))

    def _start(self, rows: list[DraftRow], batch: ForwardBatch | None, places: np.ndarray) -> None:
        # features of the rows that decode already move to the front
        parts = [(self.sources, self.places)] if (self.places >= 0).any() else []
        if (places >= 0).any():
            parts.append((self._sources_of(batch), places))
        if parts:
            at = [torch.from_numpy(known[known >= 0]) for _, known in parts]
            pieces = [[source[i] for source in sources] for (sources, _), i in zip(parts, at, strict=True)]
            self.sources = [torch.cat(same) for same in zip(*pieces, strict=True)]
        has_features = np.concatenate([self.places, places]) >= 0
        self.places = np.where(has_features, has_features.cumsum() - 1, -1)
        self.rows = [*self.rows, *rows]

    def verified(self, rows: Sequence[DraftRow], batch: ForwardBatch, num_right: np.ndarray) -> None:
        self.latest = (list(rows), batch, num_right)  # the engine's own list changes as rows come and go
        self.begun.clear()  # these rows are among them

    def rest(self) -> None:
        self.forget()

    def observe(self, rows: Sequence[DraftRow], num_drafted: np.ndarray, num_accepted: np.ndarray) -> None:
        if self.proposed is None or self.proposed[0] != rows:
            return
        cells_RK, self.proposed = self.proposed[1], None
        if self.native is not None:
            self.native.judge(cells_RK, num_drafted, num_accepted, self.calibration)
        else:
            self.calibration.record(cells_RK, num_drafted, num_accepted)

    def release(self, rows: Sequence[DraftRow], finished: bool) -> None:
        if finished and self.owns_vocabulary:
            self.vocabulary.count([row.output_ids for row in rows])

    # ---- guesses ---------------------------------------------------------------------------------------------------------

    def propose(self, rows: Sequence[DraftRow], max_lens: np.ndarray, min_prob: float = 0.0) -> Drafts:
        if self.is_stale and self.native is not None:
            self.native.load(self.view, self.vocabulary.ids)
        self.is_stale = False
        places = self._places_of(rows)
        max_lens = np.where(places < 0, 0, np.minimum(max_lens, MAX_DRAFT))
        tokens = np.array([row.output_ids[-1] if row.output_ids else row.prompt_ids[-1] for row in rows], np.int64)
        seeds = np.array([row.noise_seed or 0 for row in rows], np.int64)
        # the last token is drawn already: the first guess is of the one that the policy draws next
        positions = np.array([len(row.output_ids) for row in rows], np.int64)
        arguments = (np.maximum(places, 0), tokens, seeds, positions, max_lens, min_prob)
        if self.native is not None and not self.sampling.has_filters and self.sources:
            token_ids, cells, probs = self.native.propose(
                self.sources, *arguments, self.sampling.temperature, self.calibration
            )
        else:
            token_ids, cells, probs = self._propose(*arguments)
        self.proposed = (list(rows), cells)
        return Drafts(token_ids, probs)

    def _propose(
        self,
        places: np.ndarray,
        tokens: np.ndarray,
        seeds: np.ndarray,
        positions: np.ndarray,
        max_lens: np.ndarray,
        min_prob: float,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same as in C++, on any device; guesses are from the whole vocabulary."""
        width = int(max_lens.max())
        token_ids, cells = np.zeros((len(places), width), np.int64), np.zeros((len(places), width), np.int64)
        probs = np.zeros((len(places), width))
        if not width:
            return token_ids, cells, probs
        at = torch.from_numpy(places).to(self.view.device)
        *tapped, hidden = (source[at] for source in self.sources)
        states = self.head.start(torch.stack([*tapped, hidden], dim=1)[:, : len(tapped)], hidden)
        embeddings = self.view.model.get_input_embeddings().weight
        last, alive = torch.from_numpy(tokens).to(self.view.device), np.ones(len(places), bool)
        running = np.ones(len(places))
        for depth in range(width):
            states = self.head.step(states, torch.nn.functional.embedding(last, embeddings))
            logits = self.view.logits(self.head.output(states).to(hidden.dtype))
            last, margins = draw(logits, self.sampling, seeds, positions + depth)
            cells[:, depth] = self.calibration.cells(margins.cpu().numpy())
            running *= self.calibration.prob_at(depth, cells[:, depth])
            alive &= (depth < max_lens) & (running >= min_prob)
            if not alive.any():
                break
            token_ids[:, depth], probs[:, depth] = last.cpu().numpy(), np.where(alive, running, 0.0)
        return token_ids, cells, probs

    def _look(self) -> None:
        """Take over the features of the latest step, and of rows that have begun since."""
        if self.latest is not None:
            (self.rows, batch, num_right), self.latest = self.latest, None
            self.sources = self._sources_of(batch)
            self.places = np.cumsum(batch.query_lens) - batch.query_lens + num_right
        for begun in self.begun:
            self._start(*begun)
        self.begun.clear()

    def _sources_of(self, batch: ForwardBatch) -> list[torch.Tensor]:
        return [*(batch.tapped[layer] for layer in self.layers), batch.hidden_ND]

    def _places_of(self, rows: Sequence[DraftRow]) -> np.ndarray:
        """[R] where rows' features are; rows that have left are forgotten."""
        self._look()
        if rows != self.rows:
            places = dict(zip((row.row_id for row in self.rows), self.places.tolist(), strict=True))
            self.places = np.array([places.get(row.row_id, -1) for row in rows], np.int64)
            self.rows = list(rows)
        return self.places


class NativeHead:
    """The C++ side of a head: packed copies of its weights, and what a proposal needs of the policy."""

    def __init__(self, head: RecurrentHead) -> None:
        self.head = head
        self.functions = LIBRARY.functions
        sizes = (head.hidden_size, head.intermediate_size, len(head.layers) + 1)
        self.model = c_void_p(self.functions.recurrent_new(*sizes, head.out_norm.eps))

    def __del__(self) -> None:
        if hasattr(self, "model"):
            self.functions.recurrent_free(self.model)

    @staticmethod
    def serves(view: PolicyView) -> bool:
        """Whether features come in float32 on CPU, and logits are nothing but states times the output head."""
        head = view.model.get_output_embeddings()
        plain = not view.scales_logits and head.bias is None
        return (
            view.device.type == "cpu"
            and view.compute_dtype == torch.float32
            and plain
            and not LIBRARY.unavailable_reason
        )

    def load(self, view: PolicyView, ids: np.ndarray) -> None:
        head = self.head
        norms = [*head.feature_norms, head.state_norm, head.token_norm, head.out_norm]
        norms_D = torch.cat([norm.weight.detach() for norm in norms]).float()
        linears = (head.fc, head.state_gate_up, head.token_gate_up, head.down)
        weights = [linear.weight.detach().float().contiguous() for linear in linears]
        self.functions.recurrent_load(self.model, *(w.data_ptr() for w in weights), norms_D.data_ptr())
        self.embeddings = view.model.get_input_embeddings().weight.detach()  # its memory is read at every proposal
        output = view.model.get_output_embeddings().weight.detach()
        assert self.embeddings.is_contiguous() and output.is_contiguous()
        keeps_part = len(self.embeddings) * 2 * head.intermediate_size <= MAX_TOKEN_PART
        self.functions.recurrent_bind(
            self.model,
            self.embeddings.data_ptr(),
            len(self.embeddings),
            output.data_ptr(),
            ids.ctypes.data,
            len(ids),
            keeps_part,
        )

    def propose(
        self,
        sources: list[torch.Tensor],
        places: np.ndarray,
        tokens: np.ndarray,
        seeds: np.ndarray,
        positions: np.ndarray,
        max_lens: np.ndarray,
        min_prob: float,
        temperature: float,
        calibration: Calibration,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        num_rows, width = len(places), max(1, int(max_lens.max()))
        token_ids, cells = np.zeros((num_rows, width), np.int64), np.zeros((num_rows, width), np.int64)
        probs = np.zeros((num_rows, width))
        self.functions.recurrent_propose(
            self.model,
            (POINTER * len(sources))(*(source.data_ptr() for source in sources)),
            *(array.ctypes.data for array in (places, tokens, seeds, positions, max_lens)),
            num_rows,
            temperature,
            min_prob,
            EDGES.ctypes.data,
            len(EDGES),
            calibration.right_KM.ctypes.data,
            calibration.total_KM.ctypes.data,
            MAX_DEPTH,
            width,
            *(array.ctypes.data for array in (token_ids, cells, probs)),
        )
        return token_ids, cells, probs

    def judge(self, cells: np.ndarray, drafted: np.ndarray, accepted: np.ndarray, calibration: Calibration) -> None:
        self.functions.recurrent_judge(
            *(array.ctypes.data for array in (cells, drafted, accepted)),
            *cells.shape,
            len(EDGES) + 1,
            MAX_DEPTH,
            HALF_LIFE,
            calibration.right_KM.ctypes.data,
            calibration.total_KM.ctypes.data,
        )
