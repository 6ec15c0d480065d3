"""Decode steps that run without the host: verify, sample and advance in one launch.

A step is captured for a number of rows (rounded up to a bucket, its other rows are padding), of draft tokens per row, and for who
drafts. The host learns what a step emitted when it asks, and may launch the next one before.

Shapes: N = R * Q places of R rows, Q = 1 + K draft tokens; D hidden size, V vocabulary; S, M as in `decode_state`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Hashable
from statistics import median

import numpy as np
import torch

from atlas_rl.drafters.base import StepDrafter
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.decode_state import DecodeState
from atlas_rl.engine.graphs import Graph, GraphBackend
from atlas_rl.engine.in_flight import InFlight
from atlas_rl.engine.kv_cache import KVCache
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.sequence import Sequence
from atlas_rl.engine.sharing import spans_of
from atlas_rl.engine.step_program import StepKey, StepOutputs, StepProgram, sampling_key
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
        self.program: StepProgram | None = None
        self.failure: str | None = None
        """Why nothing is captured any more, or in this rollout, where memory is short."""
        self.lacks_memory = False
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
        shape = kv_cache.shape
        num_blocks = 1 << (-(-num_tokens // shape.block_size) - 1).bit_length()
        num_positions = num_blocks * shape.block_size
        self.view.prepare_positions(num_positions)
        self.drafters = {name: drafter for name, drafter in self.all_drafters.items() if name not in benched}
        for drafter in self.drafters.values():
            drafter.wake(sampling, num_rows + 1, num_positions)
        memory = (kv_cache.memory_L2NHSD.data_ptr(), kv_cache.memory_L2NHSD.shape, shape, self.view.memory_key())
        drafters = tuple((name, drafter.memory_key()) for name, drafter in self.drafters.items())
        signature = (memory, drafters, sampling_key(sampling, self.view.vocab_size), num_rows, num_blocks)
        if signature != self.signature:
            self.forget()
            self.signature = signature
            self.state = DecodeState(num_rows, num_blocks, self.view.device)
            parts = (self.view, self.graphs, kv_cache, sampling, self.state, self.drafters)
            self.program = StepProgram(*parts, bucket_of(num_rows), self.max_drafts)
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
        if self.lacks_memory:  # as long as this rollout had it
            self.failure, self.lacks_memory = None, False
        for name, drafter in self.all_drafters.items():
            drafter.sleep(keep and name in self.drafters)

    def forget(self) -> None:
        """Drop what was captured, and the memory that it holds."""
        self.steps.clear()
        self.wanted.clear()
        self.state, self.program, self.signature = None, None, None
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
            self.program.write_rows(slots, self.sharing)
            self.uploaded = slots
        graph = self.steps[key]
        draft_lens = np.full(len(sequences), key.num_drafts)
        if drafts is not None:
            draft_lens = np.fromiter(map(len, drafts), np.int64, len(drafts))
            self.program.write_drafts(drafts, draft_lens, num_drafts)
        watch = self.graphs.stopwatch()
        graph.replay()
        watch.stop()
        outputs = graph.outputs
        copy = self.graphs.to_host(outputs.out_RW)
        if keep_hidden:
            tapped = {layer: x.clone() for layer, x in outputs.tapped.items()}
            outputs = StepOutputs(outputs.out_RW, outputs.hidden_ND.clone(), tapped)
        return InFlight(list(sequences), key, copy, watch, outputs, draft_lens, keep_hidden)

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
        self.program.slots_R.zero_()  # a step runs once before it is captured: on padding
        self.uploaded = None
        try:
            self.steps[key] = self.graphs.capture(self.program.step(key))
        except Exception as error:  # whatever a driver, a library or an architecture does not allow
            self.failure = f"{type(error).__name__}: {error}"
            self.lacks_memory = isinstance(error, torch.OutOfMemoryError)
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
            self.steps[key] = self.graphs.capture(self.program.step(key))
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
        self.program.slots_R.zero_()
        self.uploaded, watches = None, []
        for _ in range(repeats):
            watches.append(self.graphs.stopwatch())
            self.steps[key].replay()
            watches[-1].stop()
        self.graphs.to_host(self.steps[key].outputs.out_RW).wait()
        return [watch.seconds() for watch in watches]
