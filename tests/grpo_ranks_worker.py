"""One process of a GRPO run in some mode; writes what it saw to `<output_dir>/rank<n>.json` (see distributed/test_grpo_modes.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
import torch
import modes
from ddp_worker import record
from recipes import make_trainer

def main(policy, output_dir, mode):
    torch.set_num_threads(1)
    options = modes.enter(mode)
    parts = {}
    if mode.endswith("_lora"):
        from peft import LoraConfig
        parts["peft_config"] = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj","v_proj","down_proj"], lora_dropout=0.0)
    trainer = make_trainer("GRPOTrainer", policy, output_dir, [], parts, num_generations=4, **options)
    p, c = record(trainer)
    trainer.train()
    print(trainer.accelerator.process_index, mode, trainer.accelerator.distributed_type, type(trainer.model_wrapped), type(trainer.model), c, flush=True)

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
