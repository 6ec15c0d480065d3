"""One of two processes that train together by GRPO; writes what it saw to `<output_dir>/rank<n>.json` (see test_ddp.py)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from recipes import make_trainer
from transformers import TrainerCallback

from atlas_rl import AtlasRolloutGenerator


class SlowStart(TrainerCallback):
    """Rank 0 has more to do before its first step than the others: it opens trackers, for one."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        time.sleep(1.5 * (args.process_index == 0))


def main(policy: Path, output_dir: Path, **options: object) -> None:
    torch.set_num_threads(1)
    atlas = AtlasRolloutGenerator()
    options = {"num_generations": 4, "ddp_timeout": 60} | options
    trainer = make_trainer("GRPOTrainer", policy, output_dir, [SlowStart(), atlas], **options)
    rank = trainer.accelerator.process_index
    prompts, completions = record(trainer)
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    # as after a tool's turn that only some rows of some ranks have
    for _ in range(3 if rank == 0 else 1):
        trainer.model.generate(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3), max_new_tokens=4)
    trainer.accelerator.wait_for_everyone()
    weights = [p.detach().double().sum().item() for p in trainer.model.parameters()]
    adaptation = atlas.attachment.adaptation
    heads = [p.double().sum().item() for drafter in adaptation.trained.values() for p in drafter.head.parameters()]
    seen = {"prompts": prompts, "completions": completions, "weights": weights}
    seen |= {"heads": heads, "updates": adaptation.num_updates}
    (output_dir / f"rank{rank}.json").write_text(json.dumps(seen))


def record(trainer) -> tuple[list[list[str]], list[list[list[int]]]]:
    """Prompts and completions of each batch of rollouts, once the trainer has trained."""
    prompts, completions = [], []
    generate = trainer._generate

    def recording(batch):
        outputs = generate(batch)
        prompts.append(list(batch))
        completions.append([list(ids) for ids in outputs[1]])
        return outputs

    trainer._generate = recording
    return prompts, completions


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3]))
