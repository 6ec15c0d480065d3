"""A folder with a tiny policy, data, a reward that prints, and a config: `atlas-rl train` in a process of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import yaml
from recipes import TEXTS

ROOT = Path(__file__).parent.parent
REWARD = """
import logging, sys, time
from rich.console import Console
from tqdm import tqdm

log, calls = logging.getLogger("talkative"), 0
log.addHandler(logging.StreamHandler(sys.stderr))
log.propagate = False

def talkative(completions, **_):
    global calls
    calls += 1
    print(f"printed in call {calls}.")
    log.warning("logged in call %d.", calls)
    Console().print(f"[red]shown in call {calls}.[/red]")
    for _ in tqdm(range(3), desc=f"counted in call {calls}.", mininterval=0):
        time.sleep(0.01)
    return [float(len(text) % 3) for text in completions]

def slow(completions, **_):
    talkative(completions)
    time.sleep(1)  # the panel is drawn twice a second
    return [0.0] * len(completions)

def failing(completions, **_):
    rewards = slow(completions)
    if calls == 2:
        raise RuntimeError("this reward is broken")
    return rewards
"""


def prepare(folder: Path, policy: Path, **fields: object) -> None:
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    (folder / "talking.py").write_text(REWARD)
    config = {
        "output_dir": "out",
        "model_name_or_path": str(policy),
        "dataset_name": "data.jsonl",
        "dataset_test_split": "train",
        "reward_funcs": ["talking.talkative"],
        "use_cpu": True,
        "bf16": False,
        "max_steps": 3,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_completion_length": 16,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config | fields))


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "atlas_rl", "train", "--config", "run.yaml", *flags]


def environment(**variables: str) -> dict[str, str]:
    """Of the process; the tests' own settings for rich, tqdm and terminals do not count there."""
    settings = ("NO_COLOR", "FORCE_COLOR", "TQDM_DISABLE", "COLUMNS", "LINES")
    ours = {name: value for name, value in os.environ.items() if name not in settings}
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
    return ours | paths | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | variables
