"""Measures what a step costs before the first one: verify forwards over R rows with K drafts each, and proposals of drafters.

The controller corrects all of it as it decodes; measured beforehand, it need not try what cannot pay.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from atlas_rl.control.cost_model import MIN_SAMPLES
from atlas_rl.drafters.base import Drafter
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.captured import CaptureFailed
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.graphs import on
from atlas_rl.engine.kv_cache import KVCache
from atlas_rl.engine.step_program import StepKey
from atlas_rl.types import SamplingParams

logger = logging.getLogger(__name__)

ROWS = (1, 4, 16, 64)
DEPTHS = (0, 1, 3, 7)
CONTEXT = 128
"""Tokens that each row has in its cache."""
BLOCK_SIZE = 16


@dataclass(slots=True)
class FakeRow:
    row_id: int
    num_computed: int
    block_table: list[int]
    prompt_ids: tuple[int, ...]
    output_ids: list[int] = field(default_factory=list)
    noise_seed: int | None = 0


@torch.inference_mode()
def calibrate(engine: RolloutEngine, max_seconds: float = 0.5, rows: Sequence[int] = ROWS) -> float:
    """Fill the controller's tables, small batches first, until it is done or the time is over; returns the seconds it took.

    Between rollouts only. Nothing of the policy or of what drafters know is changed.
    """
    if engine.captured is not None and engine.captured.failure is None:
        with on(engine.view.device):
            return _calibrate_captured(engine, max_seconds, rows)
    start = time.perf_counter()
    num_blocks = -(-(CONTEXT + max(DEPTHS) + 1) // BLOCK_SIZE)
    cache = KVCache(engine.view.kv_shape(BLOCK_SIZE), max(rows) * num_blocks, engine.view.device)
    prompt = tuple(range(1, CONTEXT + 1)) if engine.view.vocab_size > CONTEXT else (1,) * CONTEXT
    for num_rows in rows:
        fakes = [
            FakeRow(-1 - i, CONTEXT - 1, list(range(i * num_blocks, (i + 1) * num_blocks)), prompt)
            for i in range(num_rows)
        ]
        batch = None
        for depth in DEPTHS:
            for repeat in range(MIN_SAMPLES + 1):
                begun = time.perf_counter()
                batch = _verify(engine, cache, fakes, depth)
                if repeat:  # the first one warms caches
                    engine.step_cost.record(batch.num_tokens, batch.num_cached, time.perf_counter() - begun)
            if time.perf_counter() - start > max_seconds:
                return time.perf_counter() - start
        for drafter in engine.speculator.readers:
            if not drafter.uses_blocks:  # one with a cache of its own is measured as it is used
                try:
                    _propose(engine, drafter, fakes, batch)
                except Exception as error:  # a drafter is never worth a rollout
                    engine.speculator.bench(drafter, f"{type(error).__name__} while its cost was measured: {error}")
    return time.perf_counter() - start


def _calibrate_captured(engine: RolloutEngine, max_seconds: float, rows: Sequence[int]) -> float:
    """The same with captured steps, over padding: what rows attend to is added as they decode."""
    start, captured, step_cost = time.perf_counter(), engine.captured, engine.step_cost
    cache = KVCache(engine.view.kv_shape(BLOCK_SIZE), 1, engine.view.device)
    engine.speculator.wake(SamplingParams(), cache.num_blocks, BLOCK_SIZE)
    captured.wake(cache, SamplingParams(), max(rows), CONTEXT, engine.controller.benched)
    try:
        for num_rows in rows:
            for depth in DEPTHS:
                for seconds in captured.measure(StepKey(num_rows, depth), MIN_SAMPLES):
                    step_cost.record(num_rows * (depth + 1), 0, seconds)
                if time.perf_counter() - start > max_seconds:
                    return time.perf_counter() - start
            for name, depth in itertools.product(captured.drafters, DEPTHS[1:]):
                verify = step_cost.seconds(num_rows * (depth + 1))
                for seconds in captured.measure(StepKey(num_rows, depth, name), MIN_SAMPLES):
                    drafting = max(0.0, seconds - verify)
                    engine.controller.record_draft_seconds(name, num_rows, depth, drafting)
    except CaptureFailed as error:
        logger.warning("decode steps are not captured, decoding is slower: %s", error)
    finally:
        engine.speculator.sleep()
        captured.sleep(keep=False)
    return time.perf_counter() - start


def _verify(engine: RolloutEngine, cache: KVCache, rows: list[FakeRow], depth: int) -> ForwardBatch:
    tokens = [[row.prompt_ids[-1]] * (depth + 1) for row in rows]
    batch = ForwardBatch.build(cache, tokens, [row.num_computed for row in rows], [row.block_table for row in rows])
    logits = engine.view.logits(engine.view.hidden_states(batch))
    logits.argmax(-1).cpu()  # the host waits, as it does for the tokens of a step
    return batch


def _propose(engine: RolloutEngine, drafter: Drafter, rows: list[FakeRow], batch: ForwardBatch) -> None:
    sampling = SamplingParams()
    drafter.wake(sampling, 0, BLOCK_SIZE)
    drafter.verified(rows, batch, np.zeros(len(rows), np.int64))
    for depth in DEPTHS[1:]:
        for repeat in range(MIN_SAMPLES + 1):
            begun = time.perf_counter()
            drafter.propose(rows, np.full(len(rows), depth), 0.0)
            if repeat:
                engine.controller.record_draft_seconds(drafter.name, len(rows), depth, time.perf_counter() - begun)
    drafter.sleep()


def cost_table(engine: RolloutEngine) -> list[tuple[str, ...]]:
    """Rows of text: what a step over R rows takes by lookahead, in milliseconds, for the policy and for each drafter."""
    table = [("", "rows", *(f"K = {depth}" for depth in DEPTHS))]
    for num_rows in ROWS:
        seconds = engine.step_cost.seconds(num_rows * (np.array(DEPTHS) + 1), num_rows * CONTEXT)
        if seconds is not None:
            table.append(("verify", str(num_rows), *(f"{1e3 * s:.2f}" for s in seconds)))
    for name, cost in engine.controller.draft_cost.items():
        for num_rows in ROWS:
            seconds = cost.seconds(num_rows, np.array(DEPTHS))
            if seconds is not None:
                table.append((name, str(num_rows), "", *(f"{1e3 * s:.2f}" for s in seconds[1:])))
    return table
