"""One process of a deterministic GRPO run that saves checkpoints; it may kill all of the run somewhere, or resume one that was
killed. Writes completions and the drafters' weights to `<output_dir>/rank<n>.json` (see distributed/test_killed_runs.py).

    torchrun … killed_run_worker.py POLICY OUTPUT_DIR MODE PLACE      PLACE: `nowhere`, one of PLACES, or `resume`
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modes
import torch
from ddp_worker import record
from grpo_ranks_worker import bytes_of
from launching import kill_tree
from recipes import make_trainer
from transformers import Trainer

from atlas_rl import AtlasConfig, AtlasRolloutGenerator, last_complete_checkpoint
from atlas_rl.adapt import adaptation, state
from atlas_rl.adapt.retrainer import Retrainer
from atlas_rl.config import AdaptConfig
from atlas_rl.engine.engine import RolloutEngine

OPTIONS = {
    "per_device_train_batch_size": 4,
    "num_generations": 8,
    "max_completion_length": 24,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 2,
    "learning_rate": 1e-2,
}
ADAPT = AdaptConfig(deterministic_steps=3, learning_rate=3e-3, tokens_per_update=400)
PLACES: dict[str, tuple[Any, str, int, int]] = {
    "rollout": (RolloutEngine, "_step", 5, 4),
    "retraining": (Retrainer, "_step", 5, 2),
    "trainer's files": (Trainer, "_save_optimizer_and_scheduler", 6, 1),
    "drafters' files": (state, "replace_folder", 6, 1),
}
"""Where rank 0 kills the run: before which function's call, by optimizer steps done and calls at that step. (Heads are saved by a
function that has `replace_folder` of its own: this is the whole folder's.)"""


def main(policy: Path, output_dir: Path, mode: str, place: str) -> None:
    torch.set_num_threads(1)
    adaptation.DISTILL_STEPS = 9  # a head is made within three updates
    atlas = AtlasRolloutGenerator(AtlasConfig(deterministic=True, lookahead=3, adapt=ADAPT))
    trainer = make_trainer("GRPOTrainer", policy, output_dir, [atlas], **OPTIONS | modes.enter(mode))
    rank = trainer.accelerator.process_index
    if place in PLACES and rank == 0:
        kill_before(*PLACES[place], lambda: trainer.state.global_step)
    checkpoint = last_complete_checkpoint(output_dir) if place == "resume" else None
    _, completions = record(trainer)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    heads = {d.name: d.head for d in atlas.attachment.adaptation.drafters.all if d.name != "suffix"}
    seen = {
        "from": checkpoint and checkpoint.name,
        "completions": completions,
        "heads": {name: checksum(head) for name, head in heads.items()},
    }
    (output_dir / f"rank{rank}.json").write_text(json.dumps(seen))
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # see grpo_ranks_worker.py


def kill_before(owner: Any, name: str, step: int, call: int, step_now: Callable[[], int]) -> None:
    original, calls = getattr(owner, name), 0

    def killing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += step_now() == step
        if calls == call:
            kill_tree(os.getppid())  # the launcher with all ranks
        return original(*args, **kwargs)

    setattr(owner, name, killing)


def checksum(head: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(map(bytes_of, head.state_dict().values()))).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
