"""RolloutEngine: prompts in, completions out, speculation inside."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from atlas_rl.config import AtlasConfig
from atlas_rl.control.controller import Controller
from atlas_rl.control.cost_model import FixedStepCost, StepCost
from atlas_rl.drafters import arms_of
from atlas_rl.drafters.base import Drafter
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.kv_cache import BlockPool, KVCache
from atlas_rl.engine.memory import kv_blocks
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.runner import ModelRunner
from atlas_rl.engine.sampling import SamplingBatch, count_accepted, sample, seen_tokens
from atlas_rl.engine.scheduler import Scheduler
from atlas_rl.engine.sequence import PromptGroup, Sequence
from atlas_rl.engine.speculation import Speculator
from atlas_rl.telemetry.stats import RolloutStats
from atlas_rl.types import Rollout, RolloutRequest, SamplingParams

logger = logging.getLogger(__name__)

MAX_LOGITS = 2**25
"""Logits made at once: 128 MiB in float32."""


@dataclass(slots=True)
class Traffic:
    """What was generated since drafters were last retrained."""

    tokens: int = 0
    seconds: float = 0.0
    """Of decoding."""

    def clear(self) -> None:
        self.tokens, self.seconds = 0, 0.0


class RolloutEngine:
    """Generates completions with the weights that a `PolicyView` holds.

    A completion is a function of (weights, prompt, sampling parameters, seed) alone: not of the drafter, the lookahead, the
    batch, the schedule or the page layout.
    """

    def __init__(
        self, view: PolicyView, config: AtlasConfig | None = None, drafters: Drafter | Iterable[Drafter] | None = None
    ) -> None:
        """Raises ValueError if a drafter was made for another policy."""
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
        self.stats = RolloutStats()
        """Figures of the last rollout, also of one that was interrupted."""
        self.scheduler: Scheduler | None = None
        self.runner: ModelRunner | None = None
        self.between_rollouts: Callable[[RolloutEngine, bool], None] | None = None
        """Called before each rollout, with whether the weights have changed: what retrains drafters."""
        self.traffic = Traffic()
        self.num_rows = 0
        self.weights_changed = False
        """Set by whoever knows that the weights have changed; changes that show in them are found without it."""
        self.plain_decode_seconds = 0.0
        """Estimate for the current rollout: its decode steps as they would have been without drafts."""
        self.unbilled_seconds = 0.0
        """What building the view took: the next rollout's time, counted as its refresh."""

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
        if not requests:
            return []
        start = time.perf_counter() - self.unbilled_seconds
        self.stats.seconds["refresh"] = self.unbilled_seconds
        self.unbilled_seconds = self.plain_decode_seconds = 0.0
        requests = self._checked(requests)
        sequences = self._make_sequences(requests, sampling)
        groups = self._group(sequences)
        self.stats.num_prompts = len(groups)
        self.stats.prompt_tokens = sum(len(group.sequences[0].prompt_ids) for group in groups)
        try:
            self.refresh()
            self.wake(groups, sampling)
            while not self.scheduler.is_done:
                self._step(sampling)
        finally:
            self._finish(sequences, start)
        return [seq.to_rollout() for seq in sequences]

    def wake(self, groups: list[PromptGroup], sampling: SamplingParams) -> None:
        """Take KV memory for these groups: what they can need at most, within the configured bound."""
        config = self.config.engine
        shape = self.view.kv_shape(config.block_size)
        num_blocks = kv_blocks(shape, groups, config, self.view.device)
        self.runner = ModelRunner(self.view, KVCache(shape, num_blocks, self.view.device))
        self.scheduler = Scheduler(
            BlockPool(num_blocks, config.block_size), config.max_num_seqs, config.max_prefill_tokens
        )
        for group in groups:
            self.scheduler.add(group)
        self.speculator.wake(sampling, num_blocks, config.block_size)

    def sleep(self) -> None:
        """Give the KV memory back. Nothing of it outlives a rollout, so no policy update can leave it stale."""
        self.runner = None
        self.scheduler = None
        self.speculator.sleep()

    def _step(self, sampling: SamplingParams) -> None:
        chunks = self.scheduler.next_prefill()
        if chunks:
            start = time.perf_counter()
            batch = self.runner.prefill(chunks)
            started, copies = self.scheduler.commit_prefill(chunks)
            self.speculator.prefilled(batch, chunks, copies)
            self.runner.kv_cache.copy_blocks(copies)
            self.speculator.admit(started, batch, chunks)
            self.stats.seconds["prefill"] += time.perf_counter() - start
        else:
            self._decode(sampling)

    def _decode(self, sampling: SamplingParams) -> None:
        """One decode step: draft, verify, sample, commit."""
        start, drafting_before = time.perf_counter(), self.stats.seconds["draft"]
        self.speculator.release(self.scheduler.reserve(), finished=False)
        sequences = self.scheduler.running
        if not sequences:  # a lone sequence made room for prefills in flight
            return
        drafts = self.speculator.draft(self.scheduler, self.stats)

        drafted = time.perf_counter()
        batch, hidden_ND = self.runner.verify(sequences, drafts)
        verified = time.perf_counter()
        tokens, logprobs = self._sample(sampling, sequences, batch, hidden_ND)
        accepted = count_accepted(tokens, batch.input_ids, batch.query_lens)
        finished, num_accepted = self._commit(sequences, batch.query_lens, tokens, logprobs, accepted, sampling)
        sampled = time.perf_counter()
        self.speculator.observe(sequences, batch, accepted, num_accepted, self.stats)
        self.speculator.release(finished, finished=True)
        self.scheduler.retire(finished)

        self.stats.seconds["verify"] += verified - drafted
        self.stats.seconds["sample"] += sampled - verified
        drafting = self.stats.seconds["draft"] - drafting_before
        num_emitted = len(sequences) + sum(num_accepted)
        self._record_step(batch, num_emitted, time.perf_counter() - start - drafting, drafting)

    def _record_step(self, batch: ForwardBatch, num_emitted: int, seconds: float, drafting: float) -> None:
        """Count a decode step, and what plain decoding would have taken to emit as much: as many steps as rows emitted tokens
        on average, each as much shorter as measured steps over as many tokens as rows are than steps over the batch's."""
        stats, num_rows, num_tokens, num_cached = self.stats, batch.num_rows, batch.num_tokens, batch.num_cached
        stats.decode_steps += 1
        stats.row_steps += num_rows
        if stats.decode_steps > 1:  # the first step of a rollout runs on cold caches, after a training step
            self.step_cost.record(num_tokens, num_cached, seconds)
        scale = 1.0
        estimates = self.step_cost.seconds(np.array([num_rows, num_tokens]), num_cached)
        if num_tokens > num_rows and estimates is not None:
            scale = min(1.0, estimates[0] / estimates[1])
        self.plain_decode_seconds += seconds * scale * num_emitted / num_rows
        self.speculator.settle(num_rows, seconds + drafting)

    def _sample(
        self, sampling: SamplingParams, sequences: list[Sequence], batch: ForwardBatch, hidden_ND: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token and log-prob after each of the batch's N places, in slices of rows that bound the logits' memory."""
        places = self._sampling_batch(sampling, sequences, batch)
        num_rows = max(1, MAX_LOGITS // self.view.vocab_size)
        drawn = [
            sample(self.view.logits(hidden_ND[i : i + num_rows]), places.rows(slice(i, i + num_rows)))
            for i in range(0, len(hidden_ND), num_rows)
        ]
        tokens_N, logprobs_N = drawn[0] if len(drawn) == 1 else (torch.cat(part) for part in zip(*drawn, strict=True))
        # one copy to the host: float64 holds every token id and every log-prob exactly
        tokens, logprobs = torch.stack([tokens_N.double(), logprobs_N.double()]).cpu().numpy()
        return tokens.astype(np.int64), logprobs

    def _commit(
        self,
        sequences: list[Sequence],
        query_lens: np.ndarray,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        accepted: np.ndarray,
        sampling: SamplingParams,
    ) -> tuple[list[Sequence], list[int]]:
        """Append what each row emitted, cut after its EOS; returns finished sequences and accepted drafts per row."""
        stopping_ids = sampling.stopping_ids
        token_list, logprob_list = tokens.tolist(), logprobs.tolist()
        finished, num_accepted, place = [], [], 0
        all_finite = np.isfinite(logprobs).all()
        for seq, query_len, num_right in zip(sequences, query_lens.tolist(), accepted.tolist(), strict=True):
            emitted = slice(place, place + num_right + 1)
            place += query_len
            if not (all_finite or all(map(math.isfinite, logprob_list[emitted]))):
                raise FloatingPointError(
                    f"the policy's logits are NaN or infinite after token {seq.num_tokens} of completion {seq.index}: its "
                    "weights have diverged. Lower the learning rate or clip gradients, and resume from the last good checkpoint"
                )
            taken = seq.append(token_list[emitted], logprob_list[emitted], stopping_ids)
            num_accepted.append(min(num_right, taken))
            if seq.finish_reason is not None:
                finished.append(seq)
        return finished, num_accepted

    def _sampling_batch(
        self, sampling: SamplingParams, sequences: list[Sequence], batch: ForwardBatch
    ) -> SamplingBatch:
        """Seeds and completion positions of every place in the batch."""
        num_rows, lens, device = len(sequences), batch.query_lens, batch.input_ids_N.device
        seeds = np.repeat(np.fromiter((seq.request.seed for seq in sequences), np.int64, num_rows), lens)
        # the token after position p is completion token p + 1 - prompt_len
        shift = np.repeat(np.fromiter((len(seq.prompt_ids) - 1 for seq in sequences), np.int64, num_rows), lens)
        seen_NV = None
        if sampling.repetition_penalty != 1:
            seen_NV = seen_tokens(torch.stack([seq.seen_V for seq in sequences]), lens, batch.input_ids_N)
        return SamplingBatch.of(sampling, seeds, batch.positions - shift, device, seen_NV)

    def _finish(self, sequences: list[Sequence], start: float) -> None:
        """Close the books and free KV memory, after success and after an exception alike."""
        stats = self.stats
        stats.completion_tokens = sum(len(seq.output_ids) for seq in sequences)
        if self.scheduler is not None:
            self.speculator.release(self.scheduler.abort(), finished=False)
            self.scheduler.check_integrity()
            stats.preemptions = self.scheduler.num_preemptions
            stats.kv_peak_bytes = self.scheduler.pool.peak_used * self.runner.kv_cache.shape.block_bytes
        self.speculator.describe(stats)
        self.sleep()
        self.traffic.tokens += stats.completion_tokens
        self.traffic.seconds += sum(stats.seconds[name] for name in ("draft", "verify", "sample"))
        stats.seconds["total"] = time.perf_counter() - start
        if self.speculator.drafters:
            stats.plain_seconds_estimate = (
                stats.seconds["prefill"] + stats.seconds["refresh"] + self.plain_decode_seconds
            )

    def _checked(self, requests: list[RolloutRequest]) -> list[RolloutRequest]:
        """The requests, with lengths cut to what the model was made for."""
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
        sequences = [Sequence(request, self.num_rows + i, i) for i, request in enumerate(requests)]
        for seq in sequences:
            seq.noise_seed = None if sampling.is_greedy else seq.request.seed
        self.num_rows += len(requests)
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


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)
