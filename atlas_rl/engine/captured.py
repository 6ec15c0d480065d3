"""Decode steps that run without the host: verify, sample and advance in one launch.

A step is captured for a number of rows (rounded up to a bucket, its other rows are padding), of draft tokens per row, and for who
drafts. The host learns what a step emitted when it asks, and may launch the next one before.

Shapes: N = R * Q places of R rows, Q = 1 + K draft tokens; D hidden size, V vocabulary; S, M as in `decode_state`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from atlas_kernels import SharedPrefixes, StepInputs, coupled_sample, filter_thresholds, finish_step, prepare_step
from atlas_rl.drafters.base import StepDrafter
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.decode_state import DecodeState, to_device
from atlas_rl.engine.graphs import Graph, GraphBackend, HostCopy, Stopwatch
from atlas_rl.engine.kv_cache import KVCache
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.sampling import MAX_LOGITS
from atlas_rl.engine.sequence import Sequence
from atlas_rl.engine.sharing import spans_of
from atlas_rl.types import SamplingParams

logger = logging.getLogger(__name__)

COMPARED = 7
"""Replays of a step with compiled layers, and without, of which the median decides."""
CAPTURE_AFTER = 4
"""Steps that a bucket is wanted for before it is captured, while a larger one serves: a draining batch passes some quickly."""
LADDER = ((8, 1), (16, 2), (32, 4), (64, 8), (128, 16), (256, 32))
"""Up to so many rows, buckets are so far apart: dense where a rollout's tail is."""


class CaptureFailed(Exception):
    """A step cannot be captured; the message says why. Decoding goes on without."""


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


@dataclass(slots=True)
class InFlight:
    """A step that was launched."""

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


class Emitted(NamedTuple):
    """What a step brought for the R rows that were still running."""

    rows: np.ndarray
    """[R] their places among the rows of the step."""
    num_right: np.ndarray
    """[R] draft tokens that the policy drew too."""
    tokens_RQ: np.ndarray
    logprobs_RQ: np.ndarray


def bucket_of(num_rows: int) -> int:
    """The number of rows that a step for so many is captured for."""
    below = 0
    for limit, step in LADDER:
        if num_rows <= limit:
            return below + -(-(num_rows - below) // step) * step
        below = limit
    return -(-num_rows // 64) * 64


class CapturedSteps:
    """Of one policy, over any number of rollouts: what is captured is kept as long as the memory that it reads stays."""

    def __init__(
        self,
        view: PolicyView,
        graphs: GraphBackend,
        drafters: dict[str, StepDrafter],
        max_drafts: int,
        compile_layers: bool = False,
    ) -> None:
        self.max_drafts = 1 << (max_drafts - 1).bit_length()
        """Per row, of the host: it makes them few lengths, the powers of two."""
        self.view = view
        self.graphs = graphs
        self.drafters = self.all_drafters = drafters
        """Who can draft within a step, by name; in this rollout, and at all."""
        self.steps: dict[StepKey, Graph[StepOutputs]] = {}
        self.wanted: dict[StepKey, int] = {}
        """Steps that ran in a larger bucket than they wanted."""
        self.signature: Hashable = None
        self.state: DecodeState | None = None
        self.failure: str | None = None
        """Why nothing is captured any more."""
        self.may_compile = compile_layers and view.fused is None
        """Whether compiled layers are still to be tried."""

    @staticmethod
    def supports(sampling: SamplingParams) -> bool:
        """A repetition penalty needs all tokens before each place, which are the host's."""
        return sampling.repetition_penalty == 1

    # ---- the life of a rollout -------------------------------------------------------------------------------------------

    def wake(
        self,
        kv_cache: KVCache,
        sampling: SamplingParams,
        num_rows: int,
        num_tokens: int,
        benched: Collection[str] = (),
    ) -> None:
        """A rollout of at most so many rows at once, of at most so many tokens each; the drafters in `benched` take no part."""
        shape, device = kv_cache.shape, self.view.device
        num_blocks = 1 << (-(-num_tokens // shape.block_size) - 1).bit_length()
        num_positions = num_blocks * shape.block_size
        self.view.prepare_positions(num_positions)
        memory = (kv_cache.memory_L2NHSD.data_ptr(), kv_cache.memory_L2NHSD.shape)
        sampled = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.min_new_tokens)
        stops = tuple(sorted(sampling.stopping_ids))
        early = tuple(i for i in {*sampling.eos_token_ids, *sampling.stop_token_ids} if 0 <= i < self.view.vocab_size)
        self.drafters = {name: drafter for name, drafter in self.all_drafters.items() if name not in benched}
        for drafter in self.drafters.values():
            drafter.wake(sampling, num_rows + 1, num_positions)
        keys = (self.view.memory_key(), *((name, drafter.memory_key()) for name, drafter in self.drafters.items()))
        signature = (memory, shape, sampled, stops, early, num_rows, num_blocks, keys)
        if signature != self.signature:
            self.forget()
            self.signature, self.sampling = signature, sampling
            self.state = DecodeState(num_rows, num_blocks, device)
            self.nothing = torch.zeros(0, dtype=torch.int64, device=device)
            self.stop_ids_E = torch.tensor(stops, dtype=torch.int64, device=device)
            self.early_ids_E = torch.tensor(sorted(early), dtype=torch.int64, device=device)
            """Tokens that cannot be drawn before `min_new_tokens`."""
            largest = bucket_of(num_rows)
            # what the host writes before a step: rows, their drafts, and what they share (`spans_of`)
            rows_6R = torch.zeros(6, largest, dtype=torch.int64, device=device)
            self.slots_R, self.draft_lens_R, self.shared_R, self.spans_3P = *rows_6R[:3], rows_6R[3:]
            self.drafts = torch.zeros(largest * self.max_drafts, dtype=torch.int64, device=device)
        self.kv_cache = kv_cache
        self.uploaded: list[int] | None = None
        """Slots of the rows that the device has been told of."""
        self.sharing: tuple[np.ndarray, np.ndarray] | None = None
        """What those rows have in common (`spans_of`)."""

    def admit(self, sequences: list[Sequence], batch: ForwardBatch | None, places: np.ndarray) -> None:
        """Rows begin; the last token of row i's prefix is at places[i] of the prefilled batch, -1: there is none."""
        slots = self.state.slots_of(sequences)
        self.state.upload_tables(sequences)
        self.uploaded = None  # these slots may be what others had, whose blocks were shared
        for drafter in self.drafters.values():
            drafter.admit(slots, batch, places, self.state)

    def sleep(self, keep: bool) -> None:
        """The rollout is over. What was captured goes with the KV memory, unless that is kept."""
        if self.state is not None:
            self.state.forget()
        if not keep:
            self.forget()
        for name, drafter in self.all_drafters.items():
            drafter.sleep(keep and name in self.drafters)

    def forget(self) -> None:
        """Drop what was captured, and the memory that it holds."""
        self.steps.clear()
        self.wanted.clear()
        self.state, self.signature = None, None
        self.graphs.reset()

    # ---- one step --------------------------------------------------------------------------------------------------------

    def launch(
        self,
        sequences: list[Sequence],
        num_drafts: int = 0,
        *,
        drafter: str = "",
        drafts: list[list[int]] | None = None,
        keep_hidden: bool = False,
    ) -> InFlight:
        """Start a step over rows whose blocks hold all that it may write.

        Args:
            num_drafts: per row at most. drafter: who drafts within the step; else `drafts` of the host, which knows the rows.
        Raises:
            CaptureFailed: it cannot be captured; nothing was started.
        """
        slots = self.state.slots_of(sequences)
        self.state.upload_tables(sequences)
        if slots != self.uploaded:
            self.sharing = spans_of(sequences, self.kv_cache.shape.block_size)
        key = self._runnable(StepKey(bucket_of(len(sequences)), num_drafts, drafter, self.sharing is not None))
        if slots != self.uploaded:  # also after a step was captured
            self._upload_rows(slots)
        graph = self.steps[key]
        draft_lens = np.full(len(sequences), key.num_drafts)
        if drafts is not None:
            draft_lens = np.fromiter(map(len, drafts), np.int64, len(drafts))
            self._upload_drafts(drafts, draft_lens, num_drafts)
        watch = self.graphs.stopwatch()
        graph.replay()
        watch.stop()
        outputs = graph.outputs
        copy = self.graphs.to_host(outputs.out_RW)
        if keep_hidden:
            tapped = {layer: x.clone() for layer, x in outputs.tapped.items()}
            outputs = StepOutputs(outputs.out_RW, outputs.hidden_ND.clone(), tapped)
        return InFlight(list(sequences), key, copy, watch, outputs, draft_lens, keep_hidden)

    @staticmethod
    def collect(step: InFlight) -> Emitted:
        """What a step emitted; waits until it is done."""
        out_RW, num_places = step.copy.wait()[: len(step.sequences)], step.num_places
        rows = np.flatnonzero(out_RW[:, 0] >= 0)
        out_RW = out_RW[rows]
        tokens_RQ = out_RW[:, 1 : 1 + num_places].astype(np.int64)
        return Emitted(rows, out_RW[:, 0].astype(np.int64), tokens_RQ, out_RW[:, 1 + num_places :])

    def batch_of(self, step: InFlight, sequences: list[Sequence], emitted: Emitted) -> ForwardBatch:
        """A step over rows that still ran, `sequences`, as an uncaptured one would leave it: back to back, without padding.

        To be called before what it emitted is appended. The hidden states are there if they were kept.
        """
        lens = np.array([seq.num_remaining for seq in sequences])
        lens = np.minimum(lens, 1 + step.draft_lens[emitted.rows])
        starts = np.array([seq.num_computed for seq in sequences])
        within = np.arange(lens.sum()) - np.repeat(np.cumsum(lens) - lens, lens)
        places = np.repeat(emitted.rows * step.num_places, lens) + within
        outputs, device = step.outputs, self.view.device
        batch = ForwardBatch(
            kv_cache=self.kv_cache,
            input_ids_N=self.nothing,
            positions_N=self.nothing,
            slots_N=self.nothing,
            block_tables_RM=self.nothing,
            starts_R=self.nothing,
            query_lens_R=self.nothing,
            max_query_len=step.num_places,
            num_cached=int(starts.sum()),
            positions=np.repeat(starts, lens) + within,
            query_lens=lens,
        )
        if step.keeps_hidden:
            places_N = to_device(places, device)
            batch.hidden_ND = outputs.hidden_ND[places_N]
            batch.tapped = {layer: x[places_N] for layer, x in outputs.tapped.items()}
        return batch

    # ---- capturing -------------------------------------------------------------------------------------------------------

    def _runnable(self, key: StepKey) -> StepKey:
        """The step to run for a key: captured for it, or for more rows while that is not worth capturing yet."""
        if key in self.steps:
            return key
        larger = [k for k in self.steps if k[1:] == key[1:] and k.num_rows > key.num_rows]
        self.wanted[key] = self.wanted.get(key, 0) + 1
        if larger and self.wanted[key] <= CAPTURE_AFTER:
            return min(larger)
        self.capture(key)
        return key

    def capture(self, key: StepKey) -> None:
        """Raises CaptureFailed."""
        self.slots_R.zero_()  # a step runs once before it is captured: on padding
        self.uploaded = None
        try:
            self.steps[key] = self.graphs.capture(self._program(key))
        except Exception as error:  # whatever a driver, a library or an architecture does not allow
            self.failure = f"{type(error).__name__}: {error}"
            raise CaptureFailed(self.failure) from error
        if self.may_compile:
            self.may_compile = False
            self._try_compiled(key)

    def _try_compiled(self, key: StepKey) -> None:
        """Compile the policy's layers, and keep that if the step is faster."""
        start, plain = time.perf_counter(), self.steps[key]
        seconds = median(self.measure(key, COMPARED))
        try:
            self.view.compile_layers()
            self.steps[key] = self.graphs.capture(self._program(key))
            compiled_seconds = median(self.measure(key, COMPARED))
        except Exception as error:  # of a compiler that does not know the architecture, or has no compiler of its own
            compiled_seconds, reason = math.inf, f"it fails: {type(error).__name__}: {error}"
        else:
            reason = f"a step takes {1e3 * compiled_seconds:.2f} ms with it, {1e3 * seconds:.2f} ms without"
        is_better = compiled_seconds < seconds
        if not is_better:
            self.view.drop_compiled_layers()
            self.steps[key] = plain
        verdict = "are compiled" if is_better else "stay as they are"
        logger.info("the policy's layers %s: %s (%.0f s)", verdict, reason, time.perf_counter() - start)

    def measure(self, key: StepKey, repeats: int) -> list[float]:
        """Seconds of a step over padding, for whoever chooses between steps."""
        if key not in self.steps:
            self.capture(key)
        self.slots_R.zero_()
        self.uploaded, watches = None, []
        for _ in range(repeats):
            watches.append(self.graphs.stopwatch())
            self.steps[key].replay()
            watches[-1].stop()
        self.graphs.to_host(self.steps[key].outputs.out_RW).wait()
        return [watch.seconds() for watch in watches]

    def _program(self, key: StepKey) -> Callable[[], StepOutputs]:
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

    def _upload_rows(self, slots: list[int]) -> None:
        """Tell the device which rows take part, and which of them begin with the same blocks."""
        self._fill(self.slots_R, np.array(slots))
        self.uploaded = slots
        if self.sharing is not None:
            spans_3P, shared_R = self.sharing
            self._fill(self.spans_3P, spans_3P)
            self._fill(self.shared_R, shared_R)

    def _fill(self, target: torch.Tensor, values: np.ndarray) -> None:
        """The first columns are these, zeros follow: of padding."""
        padded = np.zeros(target.shape, np.int64)
        padded[..., : values.shape[-1]] = values
        self.graphs.to_device(padded, target)

    def _upload_drafts(self, drafts: list[list[int]], lens: np.ndarray, num_drafts: int) -> None:
        padded_RK = np.zeros((len(drafts), num_drafts), np.int64)
        padded_RK[np.arange(num_drafts) < lens[:, None]] = list(chain.from_iterable(drafts))
        self.graphs.to_device(padded_RK.ravel(), self.drafts)
        self.graphs.to_device(lens, self.draft_lens_R)
