"""Ways of making the same rollouts. An arm takes a policy once and then runs workloads; it returns completion lengths.

What is the same for all: the policy's weights in float32, prompts, lengths, sampling from the full distribution at temperature 1,
threads. Lengths are forced. Where they are the policy's own, the engine's arms end where its recorded completions did, by their
seeds; a peer that speculates would draw others and have to guess what a policy writes after its EOS: it samples to its own ends.
No arm finds a cache of keys and values that an earlier repeat left. The engine's arms take the weights over anew at every repeat,
as after a policy update, and pay for drafting, retraining and calibration.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from atlas_rl.adapt.adaptation import Adaptation
from atlas_rl.bench.workload import SAMPLING, Batch, Workload
from atlas_rl.config import AtlasConfig
from atlas_rl.drafters import build_drafters, static_path
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.graphs import GraphBackend
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.twin import kv_shape


class Arm:
    """One way of making them."""

    skipped: str | None = None
    """Why it cannot run here."""
    versions: Mapping[str, str] = MappingProxyType({})
    """Of packages that are not ours."""

    def __init__(self, policy: PreTrainedModel) -> None:
        self.policy = policy

    def cannot(self, workload: Workload) -> str | None:
        """Why it cannot make this workload, though it makes others."""

    def ends_by_itself(self, batch: Batch) -> bool:
        """Whether its completions end where its own samples of the policy do, and not at the batch's lengths."""
        return False

    def start(self, workload: Workload, repeat: int) -> None:
        """Untimed: be ready for a repeat, knowing no more of its completions than a trainer's generator would. The policy has the
        weights that the repeat's completions are made with."""

    def timed(self, batch: Batch) -> tuple[float, list[int]]:
        """Make the batch's completions; returns the seconds it took and their lengths."""
        gc.collect()  # what others have left is not this one's to tidy
        start = time.perf_counter()
        lens = self.run(batch)
        return time.perf_counter() - start, lens

    def run(self, batch: Batch) -> list[int]:
        raise AssertionError("subclasses run")

    def figures(self) -> dict[str, Any]:
        """Of the last run, beyond its time, as far as they are known: `tokens_per_decode_step` (per sequence), `peak_bytes` (of
        keys and values), `parts` (of its seconds)."""
        return {}

    def bytes_per_token(self) -> int:
        """Of keys and values."""
        return kv_shape(self.policy, self.policy.dtype, block_size=1).block_bytes

    def close(self) -> None:
        """The bench is over."""


class Forward(NamedTuple):
    """What a forward of the policy has to multiply and to read."""

    num_tokens: int
    num_logits: int
    """Of its tokens, those that the head has been asked about."""
    block_tables_RM: torch.Tensor
    ends_R: torch.Tensor
    """Where each row's keys and values are, and how many tokens' they are."""

    def num_read(self, block_size: int) -> int:
        """Tokens whose keys and values it reads, blocks that rows share once."""
        starts_M = torch.arange(self.block_tables_RM.shape[1]) * block_size
        filled_RM = (self.ends_R[:, None] - starts_M).clamp(0, block_size).numpy()
        blocks, places = np.unique(self.block_tables_RM.numpy(), return_inverse=True)
        filled = np.zeros(len(blocks), np.int64)
        np.maximum.at(filled, places.reshape(-1), filled_RM.reshape(-1))
        return int(filled.sum())


class AtlasArm(Arm):
    """The engine, its drafters and lookahead automatic. Packing the linears is part of every run, as of every policy update."""

    config = AtlasConfig()
    graphs: GraphBackend | None = None
    """How steps are captured; None: as the device has it."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__(policy)
        self.view = PolicyView(policy)
        self.engine: RolloutEngine | None = None
        if (
            "static" in self.config.drafter_names
            and self.config.drafters != "auto"
            and not static_path(self.config, self.view)
        ):
            self.skipped = "the policy has no static drafter"
        self.forwards: list[Forward] = []
        """Of the last run, where the products are packed."""
        if self.view.packed_linears():
            self._count_forwards()

    def start(self, workload: Workload, repeat: int) -> None:
        if workload.starts_over(repeat):
            self._forget()
            for batch in workload.warm_batches if self.config.drafter_names else ():
                self.run(batch)
        if workload.moves:  # a trainer knows how many updates are to come
            self.adaptation.remaining = lambda: float(len(workload.batches) - max(1, repeat) + 1)

    def run(self, batch: Batch) -> list[int]:
        self.forwards.clear()
        self.engine.weights_changed = True  # a rollout follows a policy update
        # the other arms' time is none of this one's: retraining may take a share of its own, and of the trainer's
        own_seconds = self.engine.stats.seconds["total"] + batch.training_seconds
        self.adaptation.last_update = time.perf_counter() - own_seconds
        rollouts = self.engine.generate(batch.requests(), SAMPLING)
        return [len(rollout.token_ids) for rollout in rollouts]

    def figures(self) -> dict[str, Any]:
        stats = self.engine.stats
        row = stats.to_dict()
        parts = {name: seconds for name, seconds in stats.seconds.items() if name != "total"}
        parts["other"] = stats.seconds["total"] - sum(parts.values())
        figures = {"tokens_per_decode_step": row["tokens_per_decode_step"], "peak_bytes": row["kv_peak_bytes"]}
        return figures | {"parts": parts}

    def _count_forwards(self) -> None:
        forward, logits = self.view.hidden_states, self.view.logits

        def counted(batch: ForwardBatch) -> torch.Tensor:
            # copied: the engine goes on with its tables
            tables, ends = batch.block_tables_RM.clone(), batch.starts_R + batch.query_lens_R
            self.forwards.append(Forward(batch.num_tokens, 0, tables, ends))
            self.hidden_ND = forward(batch)
            return self.hidden_ND

        def counted_logits(hidden_ND: torch.Tensor) -> torch.Tensor:
            if self.forwards and _is_part(hidden_ND, self.hidden_ND):  # drafters ask about states of their own
                last = self.forwards[-1]
                self.forwards[-1] = last._replace(num_logits=last.num_logits + len(hidden_ND))
            return logits(hidden_ND)

        self.view.hidden_states, self.view.logits = counted, counted_logits

    def _forget(self) -> None:
        drafters = build_drafters(self.config, self.view)
        before = self.engine
        self.engine = RolloutEngine(self.view, self.config, drafters.all, graphs=self.graphs)
        self.adaptation = Adaptation(self.config, drafters)
        self.adaptation.attach(self.engine)
        if before is not None:  # step times are the machine's, not the completions': a trainer keeps them too
            self.engine.step_cost.__dict__.update(before.step_cost.__dict__)
            benched = self.engine.controller.benched
            self.engine.controller.__dict__.update(before.controller.__dict__)
            self.engine.controller.step_cost, self.engine.controller.benched = self.engine.step_cost, benched


def _is_part(part: torch.Tensor, whole: torch.Tensor) -> bool:
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


class AtlasPlain(AtlasArm):
    config = replace(AtlasArm.config, speculate=False)

    @property
    def decode_step_seconds(self) -> float:
        """Of the last run, on average."""
        stats = self.engine.stats
        seconds = stats.seconds["total"] - stats.seconds["prefill"] - stats.seconds["refresh"]
        return seconds / stats.decode_steps


class AtlasSuffix(AtlasArm):
    config = replace(AtlasArm.config, drafters=("suffix",))


class AtlasStatic(AtlasArm):
    config = replace(AtlasArm.config, drafters=("static",), retrain="never")


class AtlasAdaptive(AtlasArm):
    config = replace(AtlasArm.config, drafters=("recurrent",))


def fixed_arm(drafter: str, lookahead: int) -> type[AtlasArm]:
    """One drafter, one lookahead, at every step."""
    config = replace(AtlasArm.config, drafters=(drafter,), lookahead=lookahead, retrain="never")
    return type(f"Atlas_{drafter}_{lookahead}", (AtlasArm,), {"config": config})
