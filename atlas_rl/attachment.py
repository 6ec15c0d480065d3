"""Attachment: everything that belongs to one served model, from its hook to its counters. Detaching drops it as a whole."""

from __future__ import annotations

import hashlib
import logging
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from atlas_rl.adapt.adaptation import Adaptation
from atlas_rl.adapt.state import load_state, save_state
from atlas_rl.checkpoints import FOLDER, check_saving, reopen, warn_of_total_limit
from atlas_rl.config import AtlasConfig
from atlas_rl.drafters import build_drafters
from atlas_rl.engine.calibrate import calibrate
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.twin import UnsupportedModel
from atlas_rl.integrations.hf_generate import Unsupported, plan_generation
from atlas_rl.integrations.trl import CheckpointingFlags, GenerateHook, LogHook, autocast_dtype, bypass
from atlas_rl.telemetry.log import RolloutLog, keep_earlier_log
from atlas_rl.telemetry.stats import RolloutStats
from atlas_rl.types import Rollout, RolloutRequest, SamplingParams

logger = logging.getLogger(__name__)

PHASES = ("train", "eval")


class Attachment:
    """Serves `generate` of one model: plans the call, seeds its rows, runs the engine, keeps and logs the figures."""

    def __init__(self, model: PreTrainedModel, args: Any | None, config: AtlasConfig) -> None:
        self.model = model
        self.args = args
        """The trainer's arguments; None for a bare model."""
        self.config = config
        self.state: Any | None = None
        """The trainer's live state; the one seen in `on_init_end` is not the one that trains."""
        self.engine: RolloutEngine | None = None
        self.engine_key: Any = None
        self.adaptation: Adaptation | None = None
        """The model's drafters, made with the first engine; what they know outlives it."""
        self.resume_from: Path | None = None
        """Checkpoint whose drafters the first engine takes over."""
        self.log: RolloutLog | None = None
        self.stats = RolloutStats()
        self.calls: dict[str, tuple[int, int]] = {}
        """By phase, the step of the last generate call and how many there have been within it."""
        self.refreshed_step = -1
        self.unlogged: dict[str, RolloutStats] = {}
        """By phase, the sums since `Trainer.log` last took them."""
        self.step_stats: RolloutStats | None = None
        self.step_start = time.perf_counter()
        self.in_step = False
        self.checkpointing = CheckpointingFlags(model)
        self.told_reasons: set[str] = set()
        self.hook = GenerateHook(model, self.serve)
        LogHook.acquire()
        if option := bypass(args):
            logger.warning("Atlas is not in use: %s sends the rollouts past model.generate. Set it to False", option)

    def close(self) -> None:
        self.hook.restore()
        LogHook.release()

    # ---- generating ------------------------------------------------------------------------------------------------------

    def serve(self, *args: Any, **kwargs: Any) -> Any:
        """What `model.generate` does while attached."""
        try:
            if len(args) > 2:
                raise Unsupported("arguments after generation_config are given by position")
            named = kwargs | dict(zip(("inputs", "generation_config"), args))
            plan = plan_generation(self.model, named.pop("inputs", None), named.pop("generation_config", None), named)
            engine = self.ready_engine()
        except (Unsupported, UnsupportedModel) as reason:
            return self._fall_back(str(reason), args, kwargs)
        try:
            return plan.to_output(self.generate(plan.prompts, plan.sampling, None, engine))
        except BaseException:
            self.checkpointing.restore()
            self.in_step = False
            raise

    def generate(
        self, rows: list[tuple[int, ...]], sampling: SamplingParams, seed: int | None, engine: RolloutEngine
    ) -> list[Rollout]:
        """One completion per row, logged whether it succeeds or not."""
        max_lens = sampling.max_lens(len(rows))
        place = self._next_call()
        words = (seed,) if seed is not None else self._seed_words(place)
        first_row = place["rank"] * len(rows)
        requests = [
            RolloutRequest(prompt_ids=prompt, seed=mix_seed(*words, first_row + i), max_new_tokens=max_len)
            for i, (prompt, max_len) in enumerate(zip(rows, max_lens, strict=True))
        ]
        if self.state is not None and self.state.global_step != self.refreshed_step:
            engine.weights_changed = True  # an optimizer step may write where neither counters nor sums show it
            self.refreshed_step = self.state.global_step
        return self._recorded(place, lambda: engine.generate(requests, sampling), lambda: engine.stats)

    def ready_engine(self) -> RolloutEngine:
        """The engine for the model as it is now: a changed dtype, device or set of parameters needs a new twin."""
        dtype = autocast_dtype(self.model, self.args)
        key = (dtype, [(id(p), p.dtype, p.device) for p in self.model.parameters()])
        if self.engine is None or key != self.engine_key:
            start = time.perf_counter()
            view = PolicyView(self.model, autocast_dtype=dtype, pack_linears=self.config.engine.pack_linears)
            with torch.inference_mode(False):  # the caller may be under it, and heads are to be trained
                if self.adaptation is None:
                    self.adaptation = self._build_adaptation(view)
                self.engine, self.engine_key = RolloutEngine(view, self.config, self.adaptation.drafters.all), key
                self.adaptation.attach(self.engine)
            if self.state is not None and not self.config.deterministic:  # a run has many rollouts to gain it back
                calibrate(self.engine)
            self.engine.unbilled_seconds = time.perf_counter() - start
        if self.resume_from is not None:
            with torch.inference_mode(False):
                load_state(self.resume_from, self.adaptation, self.engine)
            self.resume_from = None
        return self.engine

    def _build_adaptation(self, view: PolicyView) -> Adaptation:
        seed = self._base_seed()
        with torch.random.fork_rng(devices=[]):  # a new head's weights are no business of the trainer's generator
            torch.default_generator.manual_seed(seed)
            drafters = build_drafters(self.config, view)
        return Adaptation(
            self.config, drafters, remaining=None if self.state is None else self._remaining_updates, seed=seed
        )

    def free(self) -> None:
        """Drop the twin and its weight copies; what the drafter knows stays."""
        self.engine = self.engine_key = None

    def _fall_back(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original `generate`, with one line per reason."""
        if reason not in self.told_reasons:
            self.told_reasons.add(reason)
            logger.warning("generate() goes to transformers, not through Atlas: %s", reason)
        stats, start = RolloutStats(), time.perf_counter()

        def timed() -> RolloutStats:
            stats.seconds["total"] = time.perf_counter() - start
            return stats

        return self._recorded(
            self._next_call() | {"fallback": reason}, lambda: self.hook.original(*args, **kwargs), timed
        )

    # ---- seeds -----------------------------------------------------------------------------------------------------------

    def _next_call(self) -> dict[str, Any]:
        """Phase, step, call within the step, and rank of a generate call: its place in the log, and the words of its seed."""
        # GKD generates before the training step switches its model to train mode
        phase = "train" if self.model.training or self.in_step else "eval"
        step = 0 if self.state is None else self.state.global_step
        last_step, num_calls = self.calls.get(phase, (step, 0))
        call = num_calls if last_step == step else 0
        self.calls[phase] = (step, call + 1)
        return {"phase": phase, "call": call, "step": step, "rank": rank()}

    def _seed_words(self, place: dict[str, Any]) -> tuple[int, ...]:
        return self._base_seed(), PHASES.index(place["phase"]), place["step"], place["call"]

    def _base_seed(self) -> int:
        return torch.initial_seed() if self.args is None else self.args.seed

    def _remaining_updates(self) -> float:
        return float(max(0, self.state.max_steps - self.state.global_step))

    # ---- figures ---------------------------------------------------------------------------------------------------------

    def begin_run(self) -> None:
        """Training begins; the trainer has switched the recomputation of activations on."""
        if self.args is not None:
            check_saving(self.args, self.config.deterministic, self.state.save_steps)
            if rank() == 0:
                warn_of_total_limit(self.args)
        self.checkpointing = CheckpointingFlags(self.model)
        self.open_log()
        if self.args is not None and self.state is not None and self.state.global_step:
            self.resume_from = last_checkpoint(self.args, self.state.global_step)
        # every rank passes here: none may write a row before rank 0 has put an earlier run's log aside
        PartialState().wait_for_everyone()

    def open_log(self) -> None:
        """A run that starts at step 0 puts an earlier run's log aside; a resumed one goes on with its own."""
        path = self.config.log_path
        if path is None and self.args is not None and self.args.output_dir:
            path = f"{self.args.output_dir}/rollouts.jsonl"
        if self.log is not None or path is None:
            return
        if rank() == 0 and self.state is not None and self.state.global_step == 0:
            keep_earlier_log(path)
        self.log = RolloutLog(path)

    def before_save(self, checkpoint: Path) -> None:
        """The trainer is about to write a checkpoint, maybe over an earlier run's."""
        if rank() == 0:
            reopen(checkpoint)

    def save(self, checkpoint: Path) -> None:
        """Write what drafters have learned into a checkpoint of the trainer."""
        if self.adaptation is None:  # no rollout was Atlas': nothing is there to be saved, and so nothing is missing
            if rank() == 0:
                (checkpoint / FOLDER).mkdir(parents=True, exist_ok=True)
            return
        if self.config.deterministic:  # what is not saved is dropped, here as in a run that resumes from this
            self.adaptation.forget_unsaved()
        if rank() == 0:
            save_state(checkpoint, self.adaptation, self.engine)

    def begin_step(self) -> None:
        self.checkpointing = CheckpointingFlags(self.model)
        self.step_start, self.in_step = time.perf_counter(), True

    def end_step(self) -> None:
        """Write the row of an optimizer step."""
        self.in_step = False
        row = {"kind": "step", "phase": "train", "step": self.state.global_step, "rank": rank()}
        row["step_seconds"] = round(time.perf_counter() - self.step_start, 6)
        # a step may train on an earlier step's rollouts, and have none of its own
        self._write(row | (self.step_stats.to_dict() if self.step_stats else {}))
        self.step_stats = None

    def pop_metrics(self, phase: str) -> dict[str, float]:
        """Figures since the last call, named as the trainer's metrics are."""
        stats = self.unlogged.pop(phase, None)
        if stats is None:
            return {}
        row = stats.to_dict()
        names = ("tokens_per_s", "tokens_per_decode_step", "speedup_estimate")
        metrics = {name: row[name] for name in names if name in row}
        metrics["seconds"] = row["seconds"]["total"]
        for name, counts in row.get("drafters", {}).items():
            if "acceptance" in counts:  # of an arm's drafters one may never have been the better one
                metrics[f"{name}_acceptance"] = counts["acceptance"]
        prefix = "rollout/" if phase == "train" else "eval_rollout/"
        return {prefix + name: value for name, value in metrics.items()}

    def _recorded(self, row: dict[str, Any], work: Callable[[], Any], stats_of: Callable[[], RolloutStats]) -> Any:
        """Do the work and count and log its figures, also those of work that raises."""
        try:
            return work()
        except BaseException as error:
            row["error"] = type(error).__name__
            raise
        finally:
            self.stats, phase = stats_of(), row["phase"]
            self.unlogged[phase] = RolloutStats.total(s for s in (self.unlogged.get(phase), self.stats) if s)
            if phase == "train":
                self.step_stats = RolloutStats.total(s for s in (self.step_stats, self.stats) if s)
            self._write({"kind": "rollout"} | row | self.stats.to_dict())

    def _write(self, row: dict[str, Any]) -> None:
        self.open_log()
        if self.log is not None:
            self.log.write(row)


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
