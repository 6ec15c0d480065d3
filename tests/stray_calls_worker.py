"""One of two processes of a run in which something besides the trainer generates (see distributed/test_stray_calls.py).

torchrun … stray_calls_worker.py POLICY OUTPUT_DIR MODE CASE
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import modes
import torch
from ddp_worker import record
from grpo_ranks_worker import LEARNING, share_of_low_ids
from recipes import make_trainer
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from atlas_rl import AtlasRolloutGenerator


class SampleOnRank0(TrainerCallback):
    """After each step, as those that log a completion do; a sharded policy is gathered by all ranks for it."""

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        whole = contextlib.nullcontext()
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            import deepspeed

            whole = deepspeed.zero.GatheredParameters(list(model.parameters()))
        with whole:
            if args.process_index == 0:
                model.generate(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3), max_new_tokens=4)


def sample(policy: Path, output_dir: Path, mode: str, case: str) -> dict:
    """Callbacks before or after ours; not every step has a rollout."""
    atlas = AtlasRolloutGenerator()
    callbacks = [SampleOnRank0(), atlas] if case == "before" else [atlas, SampleOnRank0()]
    options = LEARNING | {"max_steps": 4, "learning_rate": 0.1, "steps_per_generation": 2, "num_iterations": 2}
    trainer = make_trainer(
        "GRPOTrainer", policy, output_dir, callbacks, {"reward_funcs": share_of_low_ids}, **options | modes.enter(mode)
    )
    _, completions = record(trainer)
    trainer.train()
    return {"completions": completions, "rank": trainer.args.process_index}


def train_twice(policy: Path, output_dir: Path, mode: str) -> dict:
    """The first run fails in its first step; then weights change; then it is started again."""
    calls = []

    def reward(completions, completion_ids, **kwargs) -> list[float]:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError
        return share_of_low_ids(completions, completion_ids)

    atlas = AtlasRolloutGenerator()
    options = LEARNING | {"max_steps": 1} | modes.enter(mode)
    trainer = make_trainer("GRPOTrainer", policy, output_dir, [atlas], {"reward_funcs": reward}, **options)
    with contextlib.suppress(ZeroDivisionError):
        trainer.train()
    with torch.no_grad():
        for p in trainer.model.parameters():
            shard = p.to_local() if isinstance(p, DTensor) else getattr(p, "ds_tensor", p).data
            shard.mul_(0.5)
    _, completions = record(trainer)
    trainer.train()
    return {"completions": completions, "rank": trainer.args.process_index}


def main(policy: Path, output_dir: Path, mode: str, case: str) -> None:
    torch.set_num_threads(1)
    seen = train_twice(policy, output_dir, mode) if case == "twice" else sample(policy, output_dir, mode, case)
    (output_dir / f"rank{seen['rank']}.json").write_text(json.dumps(seen))
    sys.stdout.flush()
    os._exit(0)  # see grpo_ranks_worker.py


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
