"""RolloutEngine: prompts in, completions out, speculation inside."""

from __future__ import annotations

import logging
import math
import time

import numpy as np
import torch

from atlas_rl.config import AtlasConfig
from atlas_rl.control.cost_model import FixedStepCost, StepCost
from atlas_rl.drafters.base import Drafter
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


class RolloutEngine:
    """Generates completions with the weights that a `PolicyView` holds.

    A completion is a function of (weights, prompt, sampling parameters, seed) alone: not of the drafter, the lookahead, the
    batch, the schedule or the page layout.
    """

    def __init__(self, view: PolicyView, config: AtlasConfig | None = None, drafter: Drafter | None = None) -> None:
        self.view = view
        self.config = config or AtlasConfig()
        self.step_cost = StepCost()
        decision_cost = FixedStepCost() if self.config.deterministic else self.step_cost
        self.speculator = Speculator(
            drafter,
            lookahead=self.config.lookahead,
            step_seconds=decision_cost.seconds,
            vocab_size=view.vocab_size,
            count_draft_seconds=not self.config.deterministic,
        )
        self.stats = RolloutStats()
        """Figures of the last rollout, also of one that was interrupted."""
        self.scheduler: Scheduler | None = None
        self.runner: ModelRunner | None = None
        self.num_rows = 0
        self.unbilled_seconds = 0.0
        """What building the view took: the next rollout's time, counted as its refresh."""

    def refresh(self) -> None:
        """Take over the trainer's weights if they have changed since the last rollout."""
        if self.view.is_stale():
            self.view.refresh()
            self.speculator.policy_updated()

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
        self.unbilled_seconds = 0.0
        requests = self._checked(requests)
        sequences = self._make_sequences(requests, sampling)
        groups = self._group(sequences)
        self.stats.num_prompts = len(groups)
        self.stats.prompt_tokens = sum(len(group.sequences[0].prompt_ids) for group in groups)
        try:
            self.refresh()
            self.stats.seconds["refresh"] = time.perf_counter() - start
            self.wake(groups)
            while not self.scheduler.is_done:
                self._step(sampling)
        finally:
            self._finish(sequences, start)
        return [seq.to_rollout() for seq in sequences]

    def wake(self, groups: list[PromptGroup]) -> None:
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

    def sleep(self) -> None:
        """Give the KV memory back. Nothing of it outlives a rollout, so no policy update can leave it stale."""
        self.runner = None
        self.scheduler = None

    def _step(self, sampling: SamplingParams) -> None:
        chunks = self.scheduler.next_prefill()
        if chunks:
            start = time.perf_counter()
            self.runner.prefill(chunks)
            started, copies = self.scheduler.commit_prefill(chunks)
            self.runner.kv_cache.copy_blocks(*map(list, zip(*copies, strict=True))) if copies else None
            self.stats.seconds["prefill"] += time.perf_counter() - start
            self.speculator.admit(started)
        else:
            self._decode(sampling)

    def _decode(self, sampling: SamplingParams) -> None:
        """One decode step: draft, verify, sample, commit."""
        start, drafting_before = time.perf_counter(), self.stats.seconds["draft"]
        preempted = self.scheduler.reserve()
        self.speculator.release(preempted, finished=False)
        sequences = self.scheduler.running
        if not sequences:
            return
        drafts = self.speculator.draft(self.scheduler, self.stats)

        drafted = time.perf_counter()
        batch, logits_NV = self.runner.verify(sequences, drafts)
        verified = time.perf_counter()
        tokens_N, logprobs_N = sample(logits_NV, self._sampling_batch(sampling, sequences, batch))
        tokens, logprobs = tokens_N.cpu().numpy(), logprobs_N.cpu().numpy()
        accepted = count_accepted(tokens, batch.input_ids_N.cpu().numpy(), batch.query_lens)
        finished, num_accepted = self._commit(sequences, batch.query_lens, tokens, logprobs, accepted, sampling)
        sampled = time.perf_counter()
        self.speculator.observe(sequences, [len(draft) for draft in drafts], num_accepted, self.stats)
        self.speculator.release(finished, finished=True)
        self.scheduler.retire(finished)

        stats = self.stats
        stats.decode_steps += 1
        stats.row_steps += len(sequences)
        stats.seconds["verify"] += verified - drafted
        stats.seconds["sample"] += sampled - verified
        if stats.decode_steps > 1:  # the first step of a rollout runs on cold caches, after a training step
            drafting = stats.seconds["draft"] - drafting_before
            self.step_cost.record(batch.num_tokens, time.perf_counter() - start - drafting)

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
        for seq, query_len, num_right in zip(sequences, query_lens.tolist(), accepted.tolist(), strict=True):
            emitted = slice(place, place + num_right + 1)
            place += query_len
            if not all(map(math.isfinite, logprob_list[emitted])):
                raise FloatingPointError(
                    f"the policy's logits are NaN or infinite after token {seq.num_tokens} of completion {seq.index}: its "
                    "weights have diverged. Lower the learning rate or clip gradients, and resume from the last good checkpoint"
                )
            taken = seq.append(token_list[emitted], logprob_list[emitted], stopping_ids)
            num_accepted.append(min(num_right, taken))
            if seq.finish_reason is not None:
                finished.append(seq)
        return finished, num_accepted

    def _sampling_batch(self, sampling: SamplingParams, sequences: list[Sequence], batch) -> SamplingBatch:
        """Seeds and completion positions of every place in the batch."""
        device = batch.input_ids_N.device
        seeds = np.repeat(np.fromiter((s.request.seed for s in sequences), np.int64, len(sequences)), batch.query_lens)
        # place p of a row (0: after its last token) draws completion token num_tokens - prompt_len + p
        shift = np.fromiter((len(s.prompt_ids) - 1 for s in sequences), np.int64, len(sequences))
        positions = batch.positions_N.cpu().numpy() - np.repeat(shift, batch.query_lens)
        seen_NV = None
        if sampling.repetition_penalty != 1:
            seen_NV = seen_tokens(torch.stack([s.seen_V for s in sequences]), batch.query_lens, batch.input_ids_N)
        return SamplingBatch(
            params=sampling,
            seeds_N=torch.from_numpy(seeds).to(device),
            positions_N=torch.from_numpy(positions).to(device),
            seen_NV=seen_NV,
        )

    def _finish(self, sequences: list[Sequence], start: float) -> None:
        """Close the books and free KV memory, after success and after an exception alike."""
        stats = self.stats
        stats.completion_tokens = sum(len(seq.output_ids) for seq in sequences)
        if self.scheduler is not None:
            self.speculator.release(self.scheduler.abort(), finished=False)
            self.scheduler.check_integrity()
            stats.preemptions = self.scheduler.num_preemptions
            stats.kv_peak_bytes = self.scheduler.pool.peak_used * self.runner.kv_cache.shape.block_bytes
        self.sleep()
        stats.seconds["total"] = time.perf_counter() - start
        in_one_batch = not stats.preemptions and len(sequences) <= self.config.engine.max_num_seqs
        if self.speculator.drafter is not None and in_one_batch and self.step_cost.counts:
            fixed = stats.seconds["prefill"] + stats.seconds["refresh"]
            stats.plain_seconds_estimate = fixed + self._plain_decode_seconds(
                [len(seq.output_ids) for seq in sequences]
            )

    def _plain_decode_seconds(self, lens: list[int]) -> float:
        """Measured seconds of the steps that decode these completions one token at a time, the batch draining as they end."""
        total, previous = 0.0, 0
        for num_shorter, length in enumerate(sorted(lens)):
            total += (length - previous) * self.step_cost.seconds(len(lens) - num_shorter)
            previous = length
        return total

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
