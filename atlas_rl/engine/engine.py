"""RolloutEngine: prompts in, completions out, speculation inside."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from atlas_kernels import fix_routes
from atlas_rl.config import AtlasConfig
from atlas_rl.control.controller import Controller
from atlas_rl.control.cost_model import FixedStepCost, StepCost
from atlas_rl.drafters import ADAPTIVE, arms_of
from atlas_rl.drafters.base import Drafter
from atlas_rl.engine.captured import CapturedSteps
from atlas_rl.engine.decoding import Decoding
from atlas_rl.engine.graphs import GraphBackend, backend_for, on
from atlas_rl.engine.kv_cache import BlockPool, KVCache
from atlas_rl.engine.memory import give_back, is_little, take_kv
from atlas_rl.engine.pipelined import PipelinedDecoding
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.runner import ModelRunner
from atlas_rl.engine.scheduler import PrefillChunk, Scheduler
from atlas_rl.engine.sequence import PromptGroup, Sequence
from atlas_rl.engine.speculation import MAX_DRAFT_LEN, Speculator
from atlas_rl.telemetry.stats import RolloutStats
from atlas_rl.telemetry.timeline import Timeline
from atlas_rl.types import Rollout, RolloutRequest, SamplingParams

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Traffic:
    """What was generated since drafters were last retrained."""

    tokens: int = 0
    seconds: float = 0.0
    """Of decoding."""
    drafted_seconds: float = 0.0
    """Of these, in steps that a neural drafter drafted for."""

    def clear(self) -> None:
        self.tokens, self.seconds, self.drafted_seconds = 0, 0.0, 0.0


class RolloutEngine:
    """Generates completions with the weights that a `PolicyView` holds.

    A completion is a function of (weights, prompt, sampling parameters, seed) alone: not of the drafter, the lookahead, the
    batch, the schedule or the page layout.
    """

    def __init__(
        self,
        view: PolicyView,
        config: AtlasConfig | None = None,
        drafters: Drafter | Iterable[Drafter] | None = None,
        *,
        graphs: GraphBackend | None = None,
    ) -> None:
        """
        Args:
            graphs: how decode steps are captured; None: as the view's device has it.
        Raises:
            ValueError: a drafter was made for another policy.
        """
        drafters = [drafters] if isinstance(drafters, Drafter) else list(drafters or ())
        self.view = view
        self.config = config or AtlasConfig()
        self.step_cost = StepCost()
        self.controller = Controller(
            arms_of(drafters),
            FixedStepCost() if self.config.deterministic else self.step_cost,
            deterministic=self.config.deterministic,
            may_decode_plainly=self.config.lookahead is None,
        )
        self.speculator = Speculator(drafters, self.controller, view, lookahead=self.config.lookahead)
        if graphs is None and self.config.engine.capture_steps:
            graphs = backend_for(view.device)
        if self.config.deterministic and view.device.type == "cuda":
            fix_routes()
        self.captured = None if graphs is None else self._capturing(graphs)
        self.stats = RolloutStats()
        """Figures of the last rollout, also of one that was interrupted."""
        self.scheduler: Scheduler | None = None
        self.runner: ModelRunner | None = None
        self.decoding: Decoding | None = None
        self.kv_cache: KVCache | None = None
        self.between_rollouts: Callable[[RolloutEngine, bool], None] | None = None
        """Called before each rollout, with whether the weights have changed: what retrains drafters."""
        self.traffic = Traffic()
        self.weights_changed = False
        """Set by whoever knows that the weights have changed; changes that show in them are found without it."""
        self.unbilled: Counter[str] = Counter()
        """Seconds that were spent on the next rollout before it began, by what on."""

    def refresh(self) -> None:
        """Take over the trainer's weights if they have changed since the last rollout."""
        start = time.perf_counter()
        has_changed = self.view.refresh(force=self.weights_changed)
        self.weights_changed = False
        refreshed = time.perf_counter()
        if self.between_rollouts is not None:
            self.between_rollouts(self, has_changed)
        retrained = time.perf_counter()
        if has_changed:
            self.speculator.policy_updated()
        self.stats.seconds["refresh"] += time.perf_counter() - start - (retrained - refreshed)
        self.stats.seconds["retrain"] += retrained - refreshed

    @torch.inference_mode()
    def generate(self, requests: list[RolloutRequest], sampling: SamplingParams) -> list[Rollout]:
        """One completion per request, in their order.

        Raises:
            ValueError: a prompt is empty, longer than the model, or holds an unknown token; or KV memory cannot hold one
                sequence. Nothing has been computed then.
            FloatingPointError: the policy's logits are not finite.
        """
        self.stats = RolloutStats(num_completions=len(requests))
        start = time.perf_counter() - self.unbilled.total()
        self.stats.timeline = Timeline(start)
        self.stats.seconds.update(self.unbilled)
        self.unbilled.clear()
        requests = self.checked(requests)
        sequences = self._make_sequences(requests, sampling)
        groups = self._group(sequences)
        self.stats.num_prompts = len(groups)
        self.stats.prompt_tokens = sum(len(group.sequences[0].prompt_ids) for group in groups)
        with on(self.view.device):
            try:
                self.refresh()  # also for no request at all: other ranks may be waiting to retrain together
                if groups:
                    self.wake(groups, sampling)
                    while not self.scheduler.is_done:
                        self._step()
            finally:
                self._finish(sequences, start)
        return [seq.to_rollout() for seq in sequences]

    def wake(self, groups: list[PromptGroup], sampling: SamplingParams) -> None:
        """Take KV memory for these groups: what they can need at most, within the configured bound."""
        config = self.config.engine
        self.kv_cache = take_kv(
            self.view, groups, config, self.speculator.kv_block_bytes(config.block_size), self.kv_cache
        )
        num_blocks = self.kv_cache.num_blocks
        self.runner = ModelRunner(self.view, self.kv_cache)
        self.scheduler = Scheduler(
            BlockPool(num_blocks, config.block_size), config.max_num_seqs, config.max_prefill_tokens
        )
        for group in groups:
            self.scheduler.add(group)
        self.speculator.wake(sampling, num_blocks, config.block_size)
        parts = (self.scheduler, self.speculator, self.step_cost, sampling, self.stats)
        if self.captured is not None and self.captured.failure is None and self.captured.supports(sampling):
            longest = max(seq.max_tokens for group in groups for seq in group.sequences)
            rows = (config.max_num_seqs, longest)
            self.captured.wake(self.kv_cache, sampling, *rows, self.controller.benched)
            self.speculator.within = frozenset(self.captured.drafters)
            self.decoding = PipelinedDecoding(self.captured, self.runner, *parts)
        else:
            self.speculator.within = frozenset()
            self.decoding = Decoding(self.runner, *parts)

    def sleep(self) -> None:
        """Give the KV memory back (if it is little, steps stay captured over it instead). What it holds outlives no rollout, so
        that no policy update can leave it stale."""
        self.runner = self.scheduler = self.decoding = None
        self.speculator.sleep()
        captures = self.captured is not None and self.captured.failure is None
        block_bytes = self.speculator.kv_block_bytes(self.config.engine.block_size)
        keep = captures and self.kv_cache is not None and is_little(self.kv_cache, block_bytes)
        if self.captured is not None:
            self.captured.sleep(keep)
        if not keep:
            self.kv_cache = None
            give_back(self.view.device)

    def _step(self) -> None:
        chunks = self.scheduler.next_prefill()
        if not chunks:
            self.decoding.step()
            return
        self.decoding.drain()
        start = time.perf_counter()
        batch = self.runner.prefill(chunks)
        if self.view.device.type == "cuda":
            torch.cuda.current_stream(self.view.device).synchronize()  # or the next decode step would be billed for it
        started, copies = self.scheduler.commit_prefill(chunks)
        self.speculator.prefilled(batch, chunks, copies)
        self.runner.kv_cache.copy_blocks(copies)
        places = last_places(started, chunks)
        self.speculator.admit(started, batch, places)
        self.decoding.started(started, batch, places)
        self.stats.seconds["prefill"] += time.perf_counter() - start

    def _capturing(self, graphs: GraphBackend) -> CapturedSteps:
        within = {drafter.name: drafter.within_step() for drafter in self.speculator.active}
        within = {name: drafter for name, drafter in within.items() if drafter is not None}
        self.speculator.alone = alone = frozenset(within)
        self.controller.arms = [arm for arm in self.controller.arms if len(arm) < 2 or not alone.intersection(arm)]
        longest = max(MAX_DRAFT_LEN, self.config.lookahead or 0)
        return CapturedSteps(self.view, graphs, within, longest, self.config.engine.compile_layers)

    def _finish(self, sequences: list[Sequence], start: float) -> None:
        """Close the books and free KV memory, after success and after an exception alike."""
        stats, plain_decode_seconds = self.stats, 0.0
        stats.completion_lens = [len(seq.output_ids) for seq in sequences]
        stats.completion_tokens = sum(stats.completion_lens)
        if self.decoding is not None:
            self.speculator.release(self.scheduler.abort(), finished=False)
            self.scheduler.check_integrity()
            plain_decode_seconds = self.decoding.plain_seconds
            stats.preemptions = self.scheduler.num_preemptions
            stats.kv_peak_bytes = self.scheduler.pool.peak_used * self.runner.kv_cache.shape.block_bytes
        self.speculator.describe(stats)
        self.sleep()
        self.traffic.tokens += stats.completion_tokens
        self.traffic.drafted_seconds += self.speculator.drafted_seconds
        self.traffic.seconds += sum(stats.seconds[name] for name in ("draft", "verify", "sample"))
        shares = self.controller.shares_of_parts()
        stats.seconds["total"] = time.perf_counter() - start
        if self.speculator.drafters:
            others = sum(stats.seconds[name] for name in ("prefill", "refresh", "exchange"))
            stats.plain_seconds_estimate = others + plain_decode_seconds
            for name, share in shares.items():
                retraining = stats.seconds["retrain"] if name == ADAPTIVE else 0.0
                stats.seconds_by_part[name] = others + share * plain_decode_seconds + retraining

    def checked(self, requests: list[RolloutRequest]) -> list[RolloutRequest]:
        """The requests, with lengths cut to what the model was made for; raises as `generate` does for those it refuses."""
        limit, vocab_size = self.view.max_len, self.view.model.get_input_embeddings().weight.shape[0]
        checked = []
        for index, request in enumerate(requests):
            num_prompt = len(request.prompt_ids)
            if num_prompt == 0:
                raise ValueError(f"prompt {index} is empty: give it at least one token, for instance BOS")
            if limit is not None and num_prompt >= limit:
                raise ValueError(
                    f"prompt {index} has {num_prompt} tokens, the model's limit (max_position_embeddings) is {limit}: "
                    "shorten the prompts or filter the dataset"
                )
            if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocab_size:
                raise ValueError(
                    f"prompt {index} holds a token id outside 0 … {vocab_size - 1}: is it the model's own tokenizer?"
                )
            room = request.max_new_tokens if limit is None else min(request.max_new_tokens, limit - num_prompt)
            if room < request.max_new_tokens:
                _warn_once(f"completions are cut where prompt and completion reach the model's {limit} positions")
                request = RolloutRequest(prompt_ids=request.prompt_ids, seed=request.seed, max_new_tokens=room)
            checked.append(request)
        return checked

    def _make_sequences(self, requests: list[RolloutRequest], sampling: SamplingParams) -> list[Sequence]:
        sequences = [Sequence(request, next(_row_ids), i) for i, request in enumerate(requests)]
        for seq in sequences:
            seq.noise_seed = None if sampling.is_greedy else seq.request.seed
        if sampling.repetition_penalty != 1:
            for seq in sequences:
                seq.seen_V = torch.zeros(self.view.vocab_size, dtype=torch.bool, device=self.view.device)
                seq.seen_V[list(seq.prompt_ids)] = True
        return sequences

    @staticmethod
    def _group(sequences: list[Sequence]) -> list[PromptGroup]:
        """Merge identical prompts by content, in order of first appearance."""
        by_prompt: dict[tuple[int, ...], list[Sequence]] = {}
        for seq in sequences:
            by_prompt.setdefault(seq.prompt_ids, []).append(seq)
        return [PromptGroup.of(group) for group in by_prompt.values()]


def last_places(sequences: list[Sequence], chunks: list[PrefillChunk]) -> np.ndarray:
    """[R] where the last token of each row's prefix is in the forward over these chunks; -1: it has none."""
    places, end = {}, 0
    for chunk in chunks:
        end += chunk.end - chunk.start
        if chunk.end > chunk.start:
            places.update((seq.row_id, end - 1) for seq in chunk.group.sequences)
    return np.array([places.get(seq.row_id, -1) for seq in sequences], np.int64)


_row_ids = count()
"""Of all engines."""
_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)
