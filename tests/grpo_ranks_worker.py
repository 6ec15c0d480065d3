"""One process of a run in some mode of distribution; writes what it saw to `<output_dir>/rank<n>.json`.

torchrun … grpo_ranks_worker.py POLICY OUTPUT_DIR MODE [JSON]      the JSON's fields: see `main`
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import modes
import numpy as np
import torch
from ddp_worker import record
from recipes import make_trainer, marks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from atlas_rl import AtlasConfig, AtlasRolloutGenerator
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.integrations.trl import GenerateHook, unwrap

LEARNING = {
    "num_generations": 4,
    "max_completion_length": 16,
    "max_steps": 12,
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "optim": "sgd",  # rounding stays rounding: Adam's first steps are the gradients' signs
}
"""A run whose rewards rise. On one process with twice the batch it has the same prompts."""

GATHERS = "ds3_gather_for_generation"


def share_of_low_ids(completions: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [sum(token < 384 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def trainer_parts(name: str, mode: str) -> dict[str, Any]:
    parts: dict[str, Any] = {"reward_funcs": share_of_low_ids} if name == "GRPOTrainer" else {}
    if mode.endswith("_lora"):
        from peft import LoraConfig

        parts["peft_config"] = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    return parts


def main(
    policy: Path,
    output_dir: Path,
    mode: str,
    trainer_name: str = "GRPOTrainer",
    atlas: dict[str, Any] | None = None,
    stock: bool = False,
    options: dict[str, Any] | None = None,
    fails_at: int | None = None,
) -> None:
    """
    Args:
        atlas: its config. stock: do without it. options: of the trainer's config. fails_at: the optimizer step whose rollout
            rank 1 fails in.
    """
    torch.set_num_threads(1)
    options = modes.enter(mode) | (options or {})
    generator = AtlasRolloutGenerator(AtlasConfig.from_dict(atlas))
    parts, callbacks = trainer_parts(trainer_name, mode), [] if stock else [generator]
    trainer = make_trainer(trainer_name, policy, output_dir, callbacks, parts, **options)
    watch = Watch(trainer)
    gathers = getattr(trainer.args, GATHERS, None)
    if fails_at is not None and watch.rank == 1:
        watch.fail_at(fails_at)
    trainer.train()
    if trainer_name == "GRPOTrainer":
        # as after a tool's turn that only some rows of some ranks have
        for _ in range(3 if watch.rank == 0 else 1):
            trainer.model.generate(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3), max_new_tokens=4)
    generator.detach()
    seen = watch.report() | {"gathers_for_generation": [gathers, getattr(trainer.args, GATHERS, None)]}
    (output_dir / f"rank{watch.rank}.json").write_text(json.dumps(seen))
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # now and then a process of ZeRO-3 over gloo aborts when its interpreter ends, with or without Atlas


class Watch:
    """What happens to a trainer's model, seen from outside."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.rank = trainer, trainer.accelerator.process_index
        self.in_rollout = False
        self.changes: list[str] = []
        """Of a rollout, to what it must leave alone."""
        self.gathered: dict[int, Counter[int]] = {}
        """By step, how often rollouts gathered each parameter, by where its shard lies."""
        self.collectives_in_decoding: Counter[str] = Counter()
        self.decode_steps = 0
        self.frozen = self.hash(p for p in trainer.model.parameters() if not p.requires_grad)
        self.prompts, self.completions = record(trainer) if hasattr(trainer, "_generate") else ([], [])
        self._watch_rollouts()
        self._watch_gathers()
        self._watch_decoding()

    def report(self) -> dict[str, Any]:
        model = self.trainer.model
        return {
            "prompts": self.prompts,
            "completions": self.completions,
            "rewards": [row["reward"] for row in self.trainer.state.log_history if "reward" in row],
            "changes": self.changes,
            "is_detached": not isinstance(vars(unwrap(model)).get("generate"), GenerateHook),
            "gathered": {step: list(counts.values()) for step, counts in self.gathered.items()},
            "num_parameters": len(list(model.parameters())),
            "collectives_in_decoding": dict(self.collectives_in_decoding),
            "decode_steps": self.decode_steps,
            "frozen": [self.frozen, self.hash(p for p in model.parameters() if not p.requires_grad)],
            "weights": self.hash(model.parameters()),
            "classes": [type(m).__name__ for m in (self.trainer.model_wrapped, model)],
            "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
        }

    def hash(self, parameters) -> str:
        """Of whole tensors: sharded ones are gathered."""
        found = hashlib.sha256()
        for parameter in parameters:
            with whole(parameter) as tensor:
                found.update(bytes_of(tensor))
        return found.hexdigest()

    def fail_at(self, step: int) -> None:
        """In the third decode step of that optimizer step's rollout."""
        original, count = RolloutEngine._step, 0

        def failing(engine: RolloutEngine) -> None:
            nonlocal count
            count += self.trainer.state.global_step == step
            if count == 3:
                raise MemoryError("the third decode step is too much for this rank")
            original(engine)

        RolloutEngine._step = failing

    def _watch_rollouts(self) -> None:
        serve = GenerateHook.__call__

        def watched(hook: GenerateHook, *args: Any, **kwargs: Any) -> Any:
            before = self._state()
            self.in_rollout = True
            outputs = serve(hook, *args, **kwargs)
            self.in_rollout = False
            after = self._state()
            self.changes += [name for name in before if before[name] != after[name]]
            return outputs

        GenerateHook.__call__ = watched

    def _state(self) -> dict[str, Any]:
        """What no rollout may change."""
        model = self.trainer.model
        shards = hashlib.sha256()
        for parameter in model.parameters():
            shards.update(bytes_of(shard(parameter)))
        random_states = [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]
        return marks(unwrap(model)) | {"weights": shards.hexdigest(), "random numbers": random_states}

    def _watch_gathers(self) -> None:
        def count(parameter: Any) -> None:
            if not self.in_rollout:
                return
            counts = self.gathered.setdefault(self.trainer.state.global_step, Counter())
            counts[shard(parameter).data_ptr()] += 1

        full_tensor = DTensor.full_tensor

        def counted(tensor, **kwargs):
            count(tensor)
            return full_tensor(tensor, **kwargs)

        DTensor.full_tensor = counted
        if self.trainer.is_deepspeed_enabled:
            from deepspeed.runtime.zero.partition_parameters import GatheredParameters

            enter = GatheredParameters.__enter__

            def counted_enter(context):
                for parameter in context.params if context.enabled else ():
                    count(parameter)
                return enter(context)

            GatheredParameters.__enter__ = counted_enter

    def _watch_decoding(self) -> None:
        step = RolloutEngine._step

        def watched(engine: RolloutEngine) -> None:
            self.decode_steps += 1
            with Collectives(self.collectives_in_decoding):
                step(engine)

        RolloutEngine._step = watched


class Collectives(TorchDispatchMode):
    """Counts torch.distributed's operations, however they are called."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def shard(parameter: nn.Parameter) -> torch.Tensor:
    """What of a parameter lies in this process."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().clone().numpy().tobytes()  # a storage that numpy has seen can no longer be freed by FSDP


@contextmanager
def whole(parameter: nn.Parameter):
    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], **json.loads(sys.argv[4] if len(sys.argv) > 4 else "{}"))
