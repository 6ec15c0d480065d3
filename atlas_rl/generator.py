"""AtlasRolloutGenerator: the drop-in."""

from __future__ import annotations

import hashlib
import logging
import struct
import time
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback

from atlas_rl.config import AtlasConfig
from atlas_rl.drafters.base import Drafter
from atlas_rl.drafters.suffix import SuffixDrafter
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.integrations.hf_generate import Unsupported, plan_generation
from atlas_rl.integrations.trl import GenerateHook, LogHook, autocast_dtype, unwrap
from atlas_rl.telemetry.log import RolloutLog, keep_earlier_log
from atlas_rl.telemetry.stats import RolloutStats
from atlas_rl.types import Rollout, RolloutRequest, SamplingParams

logger = logging.getLogger(__name__)

PHASES = ("train", "eval")


class AtlasRolloutGenerator(TrainerCallback):
    """Makes `model.generate` fast, and exact for the policy's current weights.

    As a trainer's callback it is the whole integration:

        trainer = GRPOTrainer(..., callbacks=[AtlasRolloutGenerator()])

    On a bare model:

        with AtlasRolloutGenerator().attach(model) as atlas:
            model.generate(input_ids, max_new_tokens=256, do_sample=True)
            atlas.generate([[1, 2, 3]], SamplingParams(temperature=0.8), num_samples=8)

    Completions are reproducible: each has a seed made of the base seed (the trainer's, or torch's for a bare model), the phase,
    the step, the number of the call within the step, and the row. The tokens do not depend on the drafter, or on whether there is
    one. Whatever Atlas cannot do exactly (beams, custom processors, …) goes to the original `generate`; the log says why, once.
    """

    def __init__(self, config: AtlasConfig | None = None) -> None:
        self.config = config or AtlasConfig()
        self.model: PreTrainedModel | None = None
        self.args: Any | None = None
        self.state: Any | None = None
        """The trainer's live state; the one seen in `on_init_end` is not the one that trains."""
        self.hook: GenerateHook | None = None
        self.engine: RolloutEngine | None = None
        self.engine_key: Any = None
        self.drafter: Drafter | None = None
        self.log: RolloutLog | None = None
        self.stats = RolloutStats()
        """Figures of the last rollout."""
        self.call_place: tuple[str, int] = ("", -1)
        self.num_calls = 0
        self.unlogged: dict[str, RolloutStats] = {}
        """By phase, the sums since `Trainer.log` last took them."""
        self.step_stats: RolloutStats | None = None
        self.step_start = 0.0
        self.had_gradient_checkpointing = False
        self.told_reasons: set[str] = set()

    # ---- attaching -------------------------------------------------------------------------------------------------------

    def attach(self, target: Trainer | PreTrainedModel | torch.nn.Module) -> AtlasRolloutGenerator:
        """Serve `generate` of a model, or of a trainer's model; returns self. `detach` undoes it exactly."""
        if isinstance(target, Trainer):
            if not any(callback is self for callback in target.callback_handler.callbacks):
                target.add_callback(self)
            self.state = target.state
            self._attach_model(target.model, target.args)
        else:
            self._attach_model(target, None)
        return self

    def detach(self) -> None:
        """Give the model its own `generate` back, and `Trainer.log` its own body."""
        if self.hook is None:
            return
        self.hook.restore()
        LogHook.release()
        self.model = self.hook = self.engine = self.engine_key = None

    def __enter__(self) -> AtlasRolloutGenerator:
        if self.hook is None:
            raise ValueError("attach the generator first: `with AtlasRolloutGenerator().attach(model): ...`")
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.detach()

    def _attach_model(self, model: torch.nn.Module, args: Any | None) -> None:
        base = unwrap(model)
        if self.hook is not None and self.hook.is_installed and self.model is base:
            self.args = args or self.args
            return
        self.detach()
        self.model, self.args = base, args
        self.hook = GenerateHook(base, self._serve)
        LogHook.acquire(AtlasRolloutGenerator)

    # ---- generating ------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams | None = None,
        num_samples: int = 1,
        seed: int | None = None,
    ) -> list[Rollout]:
        """`num_samples` completions of each prompt (lists of token ids), prompt-major.

        Raises:
            ValueError: no model is attached; a prompt is empty, too long, or holds a token unknown to the model; KV memory cannot
                hold one sequence.
            FloatingPointError: the policy's logits are not finite.
        """
        if self.model is None:
            raise ValueError("no model is attached: call attach(model) first")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        rows = [tuple(prompt) for prompt in prompts for _ in range(num_samples)]
        return self._generate(rows, sampling or SamplingParams(), seed)

    def _serve(self, inputs=None, generation_config=None, *args: Any, **kwargs: Any) -> Any:
        """What `model.generate` does while attached."""
        try:
            if args:
                raise Unsupported("arguments after generation_config are given by position")
            plan = plan_generation(self.model, inputs, generation_config, kwargs)
        except Unsupported as reason:
            return self._fall_back(str(reason), inputs, generation_config, *args, **kwargs)
        try:
            return plan.to_output(self._generate(plan.prompts, plan.sampling, None))
        except BaseException:
            self._restore_gradient_checkpointing()
            raise

    def _generate(self, rows: list[tuple[int, ...]], sampling: SamplingParams, seed: int | None) -> list[Rollout]:
        """One completion per row, logged whether it succeeds or not."""
        row_fields = self._next_call()
        max_lens = sampling.max_lens(len(rows))
        base = (row_fields["rank"] * len(rows), self._seed_words(row_fields, seed))
        requests = [
            RolloutRequest(prompt_ids=prompt, seed=_mix(*base[1], base[0] + i), max_new_tokens=max_len)
            for i, (prompt, max_len) in enumerate(zip(rows, max_lens, strict=True))
        ]
        engine = self._ready_engine()
        try:
            return engine.generate(requests, sampling)
        except BaseException as error:
            row_fields["error"] = type(error).__name__
            raise
        finally:
            self._record(row_fields, engine.stats)

    def _fall_back(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        """The original `generate`, with one line per reason."""
        if reason not in self.told_reasons:
            self.told_reasons.add(reason)
            logger.warning("generate() goes to transformers, not through Atlas: %s", reason)
        row_fields = self._next_call() | {"fallback": reason}
        start = time.perf_counter()
        output = self.hook.original(*args, **kwargs)
        stats = RolloutStats()
        stats.seconds["total"] = time.perf_counter() - start
        self._record(row_fields, stats)
        return output

    def _ready_engine(self) -> RolloutEngine:
        """The engine for the model as it is now: a changed dtype, device or set of parameters needs a new twin."""
        dtype = autocast_dtype(self.model, self.args)
        key = (dtype, [(id(p), p.dtype, p.device) for p in self.model.parameters()])
        if self.engine is None or key != self.engine_key:
            start = time.perf_counter()
            view = PolicyView(self.model, autocast_dtype=dtype, pack_linears=self.config.engine.pack_linears)
            if self.drafter is None and self.config.drafter_names:
                self.drafter = SuffixDrafter()
            self.engine, self.engine_key = RolloutEngine(view, self.config, self.drafter), key
            self.engine.unbilled_seconds = time.perf_counter() - start
        return self.engine

    # ---- seeds -----------------------------------------------------------------------------------------------------------

    def _next_call(self) -> dict[str, Any]:
        """Phase, step, call within the step, and rank of a generate call: the row's place in the log, and its seed's words."""
        phase = "train" if self.model.training else "eval"
        step = 0 if self.state is None else self.state.global_step
        if self.call_place != (phase, step) and self.state is not None:
            self.call_place, self.num_calls = (phase, step), 0
        call, self.num_calls = self.num_calls, self.num_calls + 1
        return {"phase": phase, "call": call, "step": step, "rank": self._rank()}

    @staticmethod
    def _rank() -> int:
        return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0

    def _seed_words(self, row_fields: dict[str, Any], seed: int | None) -> tuple[int, ...]:
        if seed is not None:
            return (seed,)
        base = torch.initial_seed() if self.args is None else self.args.seed
        return base, PHASES.index(row_fields["phase"]), row_fields["step"], row_fields["call"]

    # ---- figures ---------------------------------------------------------------------------------------------------------

    def _record(self, row_fields: dict[str, Any], stats: RolloutStats) -> None:
        self.stats = stats
        phase = row_fields["phase"]
        self.unlogged[phase] = RolloutStats.total(part for part in (self.unlogged.get(phase), stats) if part)
        if phase == "train":
            self.step_stats = RolloutStats.total(part for part in (self.step_stats, stats) if part)
        self._write({"kind": "rollout"} | row_fields | stats.to_dict())

    def _write(self, row: dict[str, Any]) -> None:
        if self.log is None and self.log_path is not None:
            self.log = RolloutLog(self.log_path)
        if self.log is not None:
            self.log.write(row)

    @property
    def log_path(self) -> str | None:
        if self.config.log_path is not None or self.args is None or not self.args.output_dir:
            return self.config.log_path
        return f"{self.args.output_dir}/rollouts.jsonl"

    def pop_metrics(self, phase: str) -> dict[str, float]:
        """Figures since the last call, named as the trainer's metrics are; `Trainer.log` merges them."""
        stats = self.unlogged.pop(phase, None)
        if stats is None:
            return {}
        row = stats.to_dict()
        metrics = {
            name: row[name] for name in ("tokens_per_s", "tokens_per_decode_step", "speedup_estimate") if name in row
        }
        metrics["seconds"] = row["seconds"]["total"]
        for name, counts in row.get("drafters", {}).items():
            if "acceptance" in counts:
                metrics[f"{name}_acceptance"] = counts["acceptance"]
        prefix = "rollout/" if phase == "train" else "eval_rollout/"
        return {prefix + name: value for name, value in metrics.items()}

    # ---- trainer events --------------------------------------------------------------------------------------------------

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        self.state = state
        self._attach_model(model, args)

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.state = state
        self._attach_model(model, args)
        if self.log is None and state.global_step == 0 and self._rank() == 0:
            keep_earlier_log(self.log_path)  # a resumed run goes on with its own

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.state = state
        self.step_start = time.perf_counter()
        self.step_stats = None
        self.had_gradient_checkpointing = _is_checkpointing(self.model)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        seconds = time.perf_counter() - self.step_start
        row = {"kind": "step", "phase": "train", "step": state.global_step, "rank": self._rank()}
        figures = self.step_stats.to_dict() if self.step_stats else {}  # a step may train on an earlier step's rollouts
        self._write(row | {"step_seconds": round(seconds, 6)} | figures)

    def _restore_gradient_checkpointing(self) -> None:
        """TRL switches it off around `generate`, and does not switch it on again after an exception."""
        if self.had_gradient_checkpointing and not _is_checkpointing(self.model):
            self.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)


def _is_checkpointing(model: PreTrainedModel) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _mix(*words: int) -> int:
    """A signed 64-bit seed of some integers."""
    packed = b"".join(struct.pack("<Q", word & (2**64 - 1)) for word in words)
    return struct.unpack("<q", hashlib.blake2b(packed, digest_size=8).digest())[0]
