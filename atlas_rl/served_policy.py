"""The policy of a trainer (or a bare model) as Atlas serves it: its plain local form, the engine over that, and its drafters."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from atlas_rl.adapt.adaptation import Adaptation
from atlas_rl.adapt.state import load_state, save_nothing, save_state
from atlas_rl.config import AtlasConfig
from atlas_rl.drafters import build_drafters
from atlas_rl.engine.calibrate import calibrate
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.twin import UnsupportedModel, kv_shape, unsupported_reason
from atlas_rl.integrations.hf_generate import Unsupported
from atlas_rl.integrations.local_policy import LocalPolicy
from atlas_rl.integrations.trl import autocast_dtype
from atlas_rl.lengths import LengthHistory
from atlas_rl.ranks import Ranks
from atlas_rl.together import agree


class ServedPolicy:
    """Keeps an engine that decodes with a model's current weights.

    Where the weights are sharded, having them is the work of all ranks: `needs_ranks` says when, and `ready_engine` is collective
    then.

    Args:
        model: the transformers model. wrapper: what the trainer holds, which may have adapters or a compiled module around it.
        args: the trainer's arguments; None for a bare model. seed: of new drafters.
    """

    def __init__(
        self, model: PreTrainedModel, wrapper: nn.Module, args: Any | None, config: AtlasConfig, seed: Callable[[], int]
    ) -> None:
        self.model, self.wrapper, self.args, self.config, self.seed = model, wrapper, args, config, seed
        self.local: LocalPolicy | None = None
        """A plain form of a policy that is sharded or adapted; None where the model's own tensors are usable as they are."""
        self.engine: RolloutEngine | None = None
        self.engine_key: Any = None
        self.adaptation: Adaptation | None = None
        """The model's drafters, made with the first engine; what they know outlives it."""
        self.remaining: Callable[[], float] | None = None
        """Policy updates to come, of a trainer."""
        self.ranks = Ranks.alone()
        """Of whom the drafters learn."""
        self.resume_from: Path | None = None
        """Checkpoint whose drafters the first engine takes over."""
        self.taken_step: int | None = None
        """Optimizer step whose weights the engine has; None: none yet."""
        self.lengths = LengthHistory()

    @property
    def gathered_bytes(self) -> int:
        """Of sharded weights, copied to this rank so far."""
        return 0 if self.local is None else self.local.gathered_bytes

    # ---- ready to decode -------------------------------------------------------------------------------------------------

    def needs_ranks(self, step: int) -> bool:
        """Whether the weights of this step are still to be gathered, by all ranks."""
        try:
            self._keep_local()
        except UnsupportedModel:
            return False
        return self.local is not None and self.local.needs_gathering() and step != self.taken_step

    def ready_engine(self, step: int, ranks: Ranks) -> RolloutEngine:
        """The engine, about to take over the policy's weights as they are at this step.

        Raises:
            UnsupportedModel: the engine cannot run this model.
            Unsupported: the weights of this step are still to be gathered, and not all ranks are here.
            ValueError: what has to be copied does not fit.
        """
        start = time.perf_counter()
        is_sharded = self.local is not None and self.local.is_collective
        if is_sharded:
            agree(ranks, "making room for the policy", lambda: self._make_room(step, ranks))
        engine = agree(ranks, "building the engine", lambda: self._built(step, ranks))
        if step != self.taken_step:  # an optimizer step may write where neither counters nor sums show it
            engine.weights_changed = True
            # what one rank has taken alone, from weights that were whole around its call, the others have not
            self.taken_step = None if is_sharded and ranks.size < Ranks.of_run().size else step
        engine.unbilled["refresh"] += time.perf_counter() - start
        if self.resume_from is not None and (ranks.size > 1 or self.ranks.size == 1):
            self._resume(engine)
        return engine

    def check_fits(self) -> None:
        """Before a run begins: whether copies of weights, where there have to be any, fit beside the KV cache of one sequence.

        Raises:
            ValueError: they do not; the message holds the figures, and a remedy.
        """
        with contextlib.suppress(UnsupportedModel):  # what falls back copies nothing
            self._keep_local()
        if self.local is not None:
            longest = getattr(self.args, "max_completion_length", None) or 1
            shape = kv_shape(self.model, self.model.dtype, self.config.engine.block_size)
            self.local.check_fits(-(-longest // shape.block_size) * shape.block_bytes)

    def begin_run(self, resume_from: Path | None) -> None:
        """Training begins, maybe again: whatever weights were taken before are not to be relied on."""
        self.taken_step, self.resume_from = None, resume_from
        if self.local is not None and self.local.is_collective:  # its parameters may have been replaced
            self.free()
            self.local = None

    def free(self) -> None:
        """Drop the twin and its weight copies; what the drafters know stays."""
        self.engine = self.engine_key = self.taken_step = None
        if self.local is not None:
            self.local.release()

    def _keep_local(self) -> None:
        """Make the plain form anew where the model's structure has changed."""
        if self.local is not None and self.local.is_current():
            return
        reason = unsupported_reason(self.model)
        if reason is not None:
            raise UnsupportedModel(reason)
        local = LocalPolicy.of(self.model)
        if local is not None and local.is_collective and self.args is None:
            raise UnsupportedModel("its weights are sharded, and without a trainer nobody says when they have changed")
        if local is not self.local:
            self.local, self.taken_step = local, None

    def _make_room(self, step: int, ranks: Ranks) -> None:
        """Whatever may fail before ranks gather weights."""
        self._keep_local()
        if not self._is_stale(step):
            return
        if self.local.needs_gathering() and ranks.size < Ranks.of_run().size:
            raise Unsupported("its weights are sharded, and were not gathered at the first call of this step")
        self.local.check_fits()
        self.local.allocate()

    def _built(self, step: int, ranks: Ranks) -> RolloutEngine:
        """The engine over current weights: collective, where they are sharded."""
        self._make_room(step, ranks)
        if self._is_stale(step):
            self.local.refresh()
            self.taken_step = None  # the engine has to hear of it
        return self._keep_engine()

    def _is_stale(self, step: int) -> bool:
        """Whether copies are to be made from the policy's weights again."""
        if self.local is None:
            return False
        return step != self.taken_step or (not self.local.is_collective and self.local.has_changed())

    def _resume(self, engine: RolloutEngine) -> None:
        with torch.inference_mode(False):
            load_state(self.resume_from, self.adaptation, engine, lengths := {})
        if lengths:
            self.lengths.load(lengths)
        self.resume_from = None

    def _keep_engine(self) -> RolloutEngine:
        """Make the engine anew where the model has another dtype or device, or other parameters."""
        model = self.model if self.local is None else self.local.model
        dtype = autocast_dtype(self.model, self.wrapper, self.args)
        key = (dtype, [(id(p), p.dtype, p.device) for p in model.parameters()])
        if self.engine is None or key != self.engine_key:
            view = PolicyView(model, autocast_dtype=dtype, pack_linears=self.config.engine.pack_linears)
            with torch.inference_mode(False):  # the caller may be under it, and heads are to be trained
                if self.adaptation is None:
                    self.adaptation = self._build_adaptation(view)
                self.engine, self.engine_key = RolloutEngine(view, self.config, self.adaptation.drafters.all), key
                self.adaptation.attach(self.engine)
            if self.remaining is not None and not self.config.deterministic:  # a run has many rollouts to gain it back
                calibrate(self.engine)
        return self.engine

    def _build_adaptation(self, view: PolicyView) -> Adaptation:
        seed = self.seed()
        with torch.random.fork_rng(devices=[]):  # a new head's weights are no business of the trainer's generator
            torch.default_generator.manual_seed(seed)
            drafters = build_drafters(self.config, view)
        return Adaptation(self.config, drafters, remaining=self.remaining, seed=seed, ranks=self.ranks)

    # ---- checkpoints -----------------------------------------------------------------------------------------------------

    def save(self, checkpoint: Path) -> None:
        """Write what drafters have learned into a checkpoint of the trainer; all ranks come here.

        The folder appears when they all have: it says that every rank has written its part of the checkpoint.
        """
        everyone = Ranks.of_run()
        everyone.meet("a checkpoint")
        if self.adaptation is None:
            if everyone.rank == 0:
                save_nothing(checkpoint)
            return
        if self.config.deterministic:  # what is not saved is dropped, here as in a run that resumes from this
            self.adaptation.forget_unsaved()
        if self.ranks.size > 1 or everyone.rank == 0:
            save_state(checkpoint, self.adaptation, self.engine, self.lengths.arrays())
