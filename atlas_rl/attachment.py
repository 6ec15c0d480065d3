"""Attachment: everything that belongs to one served model, from its hook to its counters. Detaching drops it as a whole."""

from __future__ import annotations

import hashlib
import logging
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from atlas_rl.adapt.adaptation import Adaptation
from atlas_rl.checkpoints import FOLDER, reopen
from atlas_rl.config import AtlasConfig
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.twin import UnsupportedModel, unsupported_reason
from atlas_rl.integrations.hf_generate import GenerationPlan, Unsupported, plan_generation
from atlas_rl.integrations.trl import (
    CheckpointingFlags,
    GatheringOption,
    GenerateHook,
    LogHook,
    bypass,
    calls_are_equal,
)
from atlas_rl.ranks import Ranks
from atlas_rl.served_policy import ServedPolicy
from atlas_rl.telemetry.ledger import Ledger
from atlas_rl.telemetry.stats import RolloutStats
from atlas_rl.together import agree, generate_together
from atlas_rl.types import Rollout, RolloutRequest, SamplingParams

logger = logging.getLogger(__name__)

PHASES = ("train", "eval")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of `generate`."""

    place: dict[str, Any]
    """Phase, step, number of the call within the step, rank: its place in the log, and the words of its seed."""
    ranks: Ranks
    """Those that are sure to make this very call: all of the run, or this one alone."""


class Attachment:
    """Serves `generate` of one model: plans the call, seeds its rows, runs the engine, keeps and logs the figures."""

    def __init__(self, model: PreTrainedModel, wrapper: nn.Module, args: Any | None, config: AtlasConfig) -> None:
        self.model = model
        self.args = args
        """The trainer's arguments; None for a bare model."""
        self.config = config
        self.state: Any | None = None
        """The trainer's live state; the one seen in `on_init_end` is not the one that trains."""
        self.policy = ServedPolicy(model, wrapper, args, config, self._base_seed)
        self.ledger = Ledger()
        self.calls: dict[str, tuple[int, int]] = {}
        """By phase, the step of the last generate call and how many there have been within it."""
        self.in_step = False
        self.is_first_of_step = False
        """Whether the next call within this optimizer step is its first: the one that all ranks make."""
        self.met_step: int | None = None
        """The last step at which ranks have met for a rollout."""
        self.checkpointing = CheckpointingFlags(model)
        self.told_reasons: set[str] = set()
        self.hook = GenerateHook(model, self.serve)
        self.gathering = GatheringOption(None if bypass(args) or unsupported_reason(model) else args)
        LogHook.acquire()
        if option := bypass(args):
            logger.warning("Atlas is not in use: %s sends the rollouts past model.generate. Set it to False", option)

    def close(self) -> None:
        self.hook.restore()
        self.gathering.restore()
        LogHook.release()

    @property
    def stats(self) -> RolloutStats:
        """Of the last rollout."""
        return self.ledger.stats

    @property
    def engine(self) -> RolloutEngine | None:
        return self.policy.engine

    @property
    def adaptation(self) -> Adaptation | None:
        return self.policy.adaptation

    def follow(self, state: Any) -> None:
        """Count steps by a trainer's state from now on."""
        self.state = state
        self.policy.remaining = lambda: float(max(0, self.state.max_steps - self.state.global_step))
        self.policy.ranks = Ranks.of_run() if calls_are_equal(self.args) else Ranks.alone()

    # ---- generating ------------------------------------------------------------------------------------------------------

    def serve(self, *args: Any, **kwargs: Any) -> Any:
        """What `model.generate` does while attached."""
        call = self.begin_call()
        try:
            plan = agree(call.ranks, "planning a rollout", lambda: self._plan(args, kwargs))
            rollouts = self.generate(plan.prompts, plan.sampling, call=call)
        except (Unsupported, UnsupportedModel) as reason:
            return self._fall_back(str(reason), call, args, kwargs)
        except BaseException:
            self.checkpointing.restore()
            self.in_step = False
            raise
        return plan.to_output(rollouts)

    def generate(
        self,
        rows: list[tuple[int, ...]],
        sampling: SamplingParams,
        seed: int | None = None,
        call: Call | None = None,
    ) -> list[Rollout]:
        """One completion per row, logged whether it succeeds or not.

        Raises:
            Unsupported, UnsupportedModel: only the original `generate` can make them exactly.
        """
        call = call or self.begin_call()
        gathered_before = self.policy.gathered_bytes
        engine = self.ready_engine(call.ranks)
        gathered = self.policy.gathered_bytes - gathered_before
        words = (seed,) if seed is not None else self._seed_words(call.place)
        counts = call.ranks.meet("counting the rows", len(rows))
        # where only this rank calls, the others' rows are taken to be as many
        first_row = sum(counts[: call.ranks.rank]) if call.ranks.size > 1 else rank() * len(rows)
        requests = [
            RolloutRequest(prompt_ids=prompt, seed=mix_seed(*words, first_row + i), max_new_tokens=max_len)
            for i, (prompt, max_len) in enumerate(zip(rows, sampling.max_lens(len(rows)), strict=True))
        ]
        row = call.place | ({"gathered_bytes": gathered} if gathered else {})
        self.open_log()
        return self.ledger.record(row, lambda: self._completed(engine, call, requests, sampling), lambda: engine.stats)

    def ready_engine(self, ranks: Ranks | None = None) -> RolloutEngine:
        """The engine for the model as it is now."""
        return self.policy.ready_engine(self._step(), ranks or Ranks.alone())

    def _completed(
        self, engine: RolloutEngine, call: Call, requests: list[RolloutRequest], sampling: SamplingParams
    ) -> list[Rollout]:
        ranks = call.ranks
        # drafters of several ranks learn where all meet, and an evaluation may have taken the weights over before that
        meets_anew = ranks.size > 1 and call.place["step"] != self.met_step
        self.adaptation.may_update = self.policy.ranks.size == 1 or meets_anew
        if ranks.size == 1:
            return engine.generate(requests, sampling)
        if meets_anew:
            engine.weights_changed, self.met_step = True, call.place["step"]
        balance = self.config.engine.balance_ranks
        return generate_together(engine, ranks, requests, sampling, self.policy.lengths, balance=balance)

    def begin_call(self) -> Call:
        # GKD generates before the training step switches its model to train mode
        phase = "train" if self.model.training or self.in_step else "eval"
        step = self._step()
        last_step, num_calls = self.calls.get(phase, (step, 0))
        number = num_calls if last_step == step else 0
        self.calls[phase] = (step, number + 1)
        place = {"phase": phase, "call": number, "step": step, "rank": rank()}
        return Call(place=place, ranks=self._callers(step))

    def _callers(self, step: int) -> Ranks:
        """Those that are sure to make this very call.

        Within an optimizer step that is all ranks, the first time; later turns of tools are a rank's own. Between steps callbacks
        may generate on some ranks only; but where sharded weights are to be gathered, any generation would be collective.
        """
        is_first, self.is_first_of_step = self.is_first_of_step, False
        if self.in_step and not is_first:
            return Ranks.alone()
        if Ranks.of_run().size > 1 and self.policy.needs_ranks(step):
            return Ranks.of_run()
        return self.policy.ranks if self.in_step else Ranks.alone()

    def free(self) -> None:
        """Drop the twin and its weight copies; what the drafter knows stays."""
        self.policy.free()

    def _plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GenerationPlan:
        if len(args) > 2:
            raise Unsupported("arguments after generation_config are given by position")
        named = kwargs | dict(zip(("inputs", "generation_config"), args))
        return plan_generation(self.model, named.pop("inputs", None), named.pop("generation_config", None), named)

    def _fall_back(self, reason: str, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original `generate`, with one line per reason."""
        if reason not in self.told_reasons:
            self.told_reasons.add(reason)
            logger.warning("generate() goes to transformers, not through Atlas: %s", reason)
        self.gathering.restore()  # from the next call on: in this one the trainer has made its choice
        stats, start = RolloutStats(), time.perf_counter()

        def timed() -> RolloutStats:
            stats.seconds["total"] = time.perf_counter() - start
            return stats

        self.open_log()
        row = call.place | {"fallback": reason}
        return self.ledger.record(row, lambda: self.hook.original(*args, **kwargs), timed)

    # ---- seeds -----------------------------------------------------------------------------------------------------------

    def _step(self) -> int:
        return 0 if self.state is None else self.state.global_step

    def _seed_words(self, place: dict[str, Any]) -> tuple[int, ...]:
        return self._base_seed(), PHASES.index(place["phase"]), place["step"], place["call"]

    def _base_seed(self) -> int:
        return torch.initial_seed() if self.args is None else self.args.seed

    # ---- the run ---------------------------------------------------------------------------------------------------------

    def begin_run(self, resume_from: Path | None = None) -> None:
        """Training begins; the trainer has switched the recomputation of activations on.

        Args:
            resume_from: the checkpoint that it goes on from.
        """
        self.checkpointing = CheckpointingFlags(self.model)
        self.in_step = self.is_first_of_step = False
        self.met_step = None
        self.calls.clear()
        self.policy.begin_run(resume_from)
        # every rank passes here: none may write a row before rank 0 has put an earlier run's log aside
        agree(Ranks.of_run(), "the start of training", self._begin_run)

    def _begin_run(self) -> None:
        self.open_log()
        resume_from = self.policy.resume_from
        if resume_from is not None and rank() == 0 and not (resume_from / FOLDER).is_dir():
            lost = f"{resume_from} holds no folder {FOLDER}/: drafters start anew"
            if self.config.deterministic:
                raise ValueError(
                    f"{lost}, and the run would not repeat. Name the checkpoint in the trainer's argument resume_from_checkpoint "
                    "as well, or set deterministic=False"
                )
            logger.warning(lost)
        self.policy.check_fits()

    def open_log(self) -> None:
        """A run that starts at step 0 puts an earlier run's log aside; a resumed one goes on with its own."""
        path = self.config.log_path
        if path is None and self.args is not None and self.args.output_dir:
            path = f"{self.args.output_dir}/rollouts.jsonl"
        self.ledger.open(path, rank() == 0 and self.state is not None and self.state.global_step == 0)

    def before_save(self, checkpoint: Path) -> None:
        """The trainer is about to write a checkpoint, maybe over an earlier run's."""
        if rank() == 0:
            reopen(checkpoint)

    def save(self, checkpoint: Path) -> None:
        """Write what drafters have learned into a checkpoint of the trainer; all ranks come here."""
        self.policy.save(checkpoint)

    def begin_step(self) -> None:
        self.checkpointing = CheckpointingFlags(self.model)
        self.ledger.begin_step()
        self.in_step = self.is_first_of_step = True
        self.calls["train"] = (self._step(), 0)  # a callback on some ranks may have generated before

    def end_step(self) -> None:
        self.in_step = False
        self.open_log()
        self.ledger.end_step(self._step(), rank())

    def pop_metrics(self, phase: str) -> dict[str, float]:
        return self.ledger.pop_metrics(phase)

    def record_metrics(self, phase: str, metrics: dict[str, Any]) -> None:
        if rank() == 0:
            self.open_log()
            self.ledger.record_metrics(phase, self._step(), metrics)


def last_checkpoint(args: Any, step: int) -> Path:
    """Where a resumed run has come from: the trainer tells its callbacks no more than the step."""
    if isinstance(args.resume_from_checkpoint, str) and Path(args.resume_from_checkpoint).is_dir():
        return Path(args.resume_from_checkpoint)
    return Path(args.output_dir) / f"checkpoint-{step}"


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def mix_seed(*words: int) -> int:
    """A signed 64-bit seed of some integers."""
    packed = b"".join(struct.pack("<Q", word & (2**64 - 1)) for word in words)
    return struct.unpack("<q", hashlib.blake2b(packed, digest_size=8).digest())[0]
