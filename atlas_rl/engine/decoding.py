"""Decode steps: draft, verify, sample, commit, one after the other and call by call.

`pipelined` launches captured steps instead, and looks at what they emitted while the next one runs.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch

from atlas_rl.control.cost_model import StepCost
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.runner import ModelRunner
from atlas_rl.engine.sampling import MAX_LOGITS, SamplingBatch, count_accepted, sample, seen_tokens
from atlas_rl.engine.scheduler import Scheduler
from atlas_rl.engine.sequence import Sequence
from atlas_rl.engine.speculation import Speculator
from atlas_rl.telemetry.stats import RolloutStats
from atlas_rl.types import SamplingParams


class Decoding:
    """The decode steps of one rollout."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        speculator: Speculator,
        step_cost: StepCost,
        sampling: SamplingParams,
        stats: RolloutStats,
    ) -> None:
        self.runner = runner
        self.view = runner.view
        self.scheduler = scheduler
        self.speculator = speculator
        self.step_cost = step_cost
        self.sampling = sampling
        self.stats = stats
        self.plain_seconds = 0.0
        """Estimate: the rollout's decode steps as they would have been without drafts."""

    def started(self, sequences: list[Sequence], batch: ForwardBatch | None, places: np.ndarray) -> None:
        """Rows begin; the last token of row i's prefix is at places[i] of the prefilled batch, -1: there is none."""

    def drain(self) -> None:
        """Have no step in flight: what rows have emitted is known."""

    def step(self) -> None:
        """Every running sequence gets at least one more token, or is preempted."""
        stats, speculator = self.stats, self.speculator
        start, drafting_before = time.perf_counter(), stats.seconds["draft"]
        speculator.release(self.scheduler.reserve(), finished=False)
        sequences = self.scheduler.running
        if not sequences:  # a lone sequence made room for prefills in flight
            return
        drafts = speculator.draft(self.scheduler, stats)

        drafted = time.perf_counter()
        batch, hidden_ND = self.runner.verify(sequences, drafts, tap=speculator.plan.rest is None)
        verified = time.perf_counter()
        tokens, logprobs = self._sample(sequences, batch, hidden_ND)
        accepted = count_accepted(tokens, batch.input_ids, batch.query_lens)
        finished, num_accepted = self._commit(sequences, batch.query_lens, tokens, logprobs, accepted)
        sampled = time.perf_counter()
        speculator.observe(sequences, batch, accepted, num_accepted, stats)
        self._retire(finished)

        stats.seconds["verify"] += verified - drafted
        stats.seconds["sample"] += sampled - verified
        drafting = stats.seconds["draft"] - drafting_before
        num_emitted = len(sequences) + sum(num_accepted)
        seconds = time.perf_counter() - start - drafting
        self._record(batch.num_rows, batch.num_tokens, batch.num_cached, num_emitted, seconds, drafting)

    def _commit(
        self,
        sequences: list[Sequence],
        num_places: np.ndarray,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        accepted: np.ndarray,
    ) -> tuple[list[Sequence], list[int]]:
        """Append what each row emitted, cut after its EOS; returns finished sequences and accepted drafts per row.

        Args:
            num_places: [R] of each row among the tokens and log-probs [N].
        """
        stopping_ids = self.sampling.stopping_ids
        token_list, logprob_list = tokens.tolist(), logprobs.tolist()
        all_finite = np.isfinite(logprobs).all()
        if all_finite and len(token_list) == len(sequences):  # no drafts: the shorter way
            for seq, token, logprob in zip(sequences, token_list, logprob_list):
                seq.append_one(token, logprob, stopping_ids)
            return [seq for seq in sequences if seq.finish_reason is not None], [0] * len(sequences)
        finished, num_accepted, place = [], [], 0
        for seq, width, num_right in zip(sequences, num_places.tolist(), accepted.tolist(), strict=True):
            emitted = slice(place, place + num_right + 1)
            place += width
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

    def _retire(self, finished: list[Sequence]) -> None:
        self.speculator.release(finished, finished=True)
        self.scheduler.retire(finished)

    def _record(
        self, num_rows: int, num_tokens: int, num_cached: int, num_emitted: int, seconds: float, drafting: float
    ) -> None:
        """Count a decode step, and what plain decoding would have taken to emit as much: as many steps as rows emitted tokens
        on average, each as much shorter as measured steps over as many tokens as rows are than steps over the batch's."""
        stats = self.stats
        stats.decode_steps += 1
        stats.row_steps += num_rows
        if stats.decode_steps > 1:  # the first step of a rollout runs on cold caches, after a training step
            self.step_cost.record(num_tokens, num_cached, seconds)
        scale, plain_step = 1.0, seconds
        if num_tokens > num_rows:
            estimates = self.step_cost.seconds(np.array([num_rows, num_tokens]), num_cached)
            if estimates is not None:
                scale, plain_step = min(1.0, estimates[0] / estimates[1]), float(estimates[0])
        self.plain_seconds += seconds * scale * num_emitted / num_rows
        plan, seconds, now = self.speculator.plan, seconds + drafting, time.perf_counter()
        if stats.timeline is not None:
            stats.timeline.record(now - seconds, now, num_rows, plan.arm)
        self.speculator.controller.parts.record(plan.asked, num_rows, num_cached, num_emitted, seconds, plain_step)
        self.speculator.settle(num_rows, seconds)

    def _sample(
        self, sequences: list[Sequence], batch: ForwardBatch, hidden_ND: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token and log-prob after each of the batch's N places, in slices of rows that bound the logits' memory."""
        places = self._sampling_batch(sequences, batch)
        num_rows = max(1, MAX_LOGITS // self.view.vocab_size)
        drawn = [
            sample(self.view.logits(hidden_ND[i : i + num_rows]), places.rows(slice(i, i + num_rows)))
            for i in range(0, len(hidden_ND), num_rows)
        ]
        tokens_N, logprobs_N = drawn[0] if len(drawn) == 1 else (torch.cat(part) for part in zip(*drawn, strict=True))
        if tokens_N.is_cpu:
            return tokens_N.numpy(), logprobs_N.numpy()
        # one copy to the host: float64 holds every token id and every log-prob exactly
        tokens, logprobs = torch.stack([tokens_N.double(), logprobs_N.double()]).cpu().numpy()
        return tokens.astype(np.int64), logprobs

    def _sampling_batch(self, sequences: list[Sequence], batch: ForwardBatch) -> SamplingBatch:
        """Seeds and completion positions of every place in the batch."""
        lens, device = batch.query_lens, batch.input_ids_N.device
        seeds, prompt_lens = self.runner.rows.seeds, self.runner.rows.prompt_lens
        if batch.num_tokens > len(seeds):
            seeds, prompt_lens = np.repeat(seeds, lens), np.repeat(prompt_lens, lens)
        seen_NV = None
        if self.sampling.repetition_penalty != 1:
            seen_NV = seen_tokens(torch.stack([seq.seen_V for seq in sequences]), lens, batch.input_ids_N)
        # the token after position p is completion token p + 1 - prompt_len
        return SamplingBatch.of(self.sampling, seeds, batch.positions + 1 - prompt_lens, device, seen_NV)
