"""A rank of examples/zero3_grpo.py, as torchrun starts it, in small and on a CPU."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import trl
from modes import enter
from snippets import SIZES

ROOT = Path(__file__).parents[1]

options = SIZES | enter("zero3")
del options["deepspeed"]  # the script's own
options |= {"max_steps": int(sys.argv[2]), "save_strategy": "steps", "save_steps": 1}
init = trl.GRPOConfig.__init__
trl.GRPOConfig.__init__ = lambda self, **given: init(
    self, **given | {name: value for name, value in options.items() if name in trl.GRPOConfig.__dataclass_fields__}
)
os.chdir(ROOT)
sys.argv = ["zero3_grpo.py", "--output_dir", sys.argv[1]]
runpy.run_path("examples/zero3_grpo.py", run_name="__main__")
sys.stdout.flush()
os._exit(0)  # DeepSpeed over gloo now and then aborts an interpreter that ends
