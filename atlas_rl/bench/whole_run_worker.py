"""One arm of `whole_run`: a whole training run behind a pipe, which takes a step whenever it is told to.

JSON lines: `{"arm": name, "config": file, "flags": [...]}` -> `{"max_steps": n}`, then any line for each step -> its figures.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import sys
import time
from collections import defaultdict
from typing import Any, TextIO

from transformers import TrainerCallback

PR_SET_PDEATHSIG = 1


def main() -> None:
    if sys.platform == "linux":  # end with the bench, however it ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # what trainers print belongs to the log, not into the answers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    task = json.loads(sys.stdin.readline())
    trainer = build(task["arm"], task["config"], task["flags"])
    clock = time.perf_counter = Clock()
    trainer.add_callback(Turns(trainer, clock, sys.stdin, answers))
    trainer.train()


def build(arm: str, config_path: str, flags: list[str]) -> Any:
    """The trainer that `atlas-rl train` would build of this config; for `trl_generate` it is left as TRL made it."""
    from dataclasses import replace

    from atlas_rl.cli.train import atlas_config
    from atlas_rl.cli.trl_arguments import Given
    from atlas_rl.cli.trl_run import build_trainer
    from atlas_rl.config import read_yaml
    from atlas_rl.generator import AtlasRolloutGenerator

    config = read_yaml(config_path)
    atlas = atlas_config(config.pop("atlas", None), [])
    config.pop("env", None)  # the bench has exported it
    given = Given.of("grpo", config, flags)
    if given.launch_flags:
        raise ValueError(f"this bench runs one process per arm: leave {' '.join(given.launch_flags)} out")
    trainer, _ = build_trainer(given.build([]), replace(atlas, speculate=False) if arm == "atlas_plain" else atlas)
    if arm == "trl_generate":
        trainer.pop_callback(AtlasRolloutGenerator).detach()
    return trainer


class Clock:
    """In place of `time.perf_counter`: the same, but for what `wait` takes: it stands still while another arm has the machine.

    Atlas measures how far apart policy updates are, and would spend more on retraining if it saw the other arm's steps as well.
    """

    def __init__(self) -> None:
        self.real, self.away = time.perf_counter, 0.0

    def __call__(self) -> float:
        return self.real() - self.away

    def wait(self, turns: TextIO) -> None:
        start = self.real()
        if not turns.readline():
            raise SystemExit("the bench has ended")
        self.away += self.real() - start


class Turns(TrainerCallback):
    """Times each step and its parts, and waits before the next. A step goes from its beginning to the next one's."""

    def __init__(self, trainer: Any, clock: Clock, turns: TextIO, answers: TextIO) -> None:
        from atlas_rl.generator import AtlasRolloutGenerator

        self.clock, self.turns, self.answers = clock, turns, answers
        self.step: dict[str, Any] | None = None
        self.start = self.cpu_start = self.optimizer_start = 0.0
        callbacks = trainer.callback_handler.callbacks
        self.atlas = next((one for one in callbacks if isinstance(one, AtlasRolloutGenerator)), None)
        timed = {
            "_generate_single_turn": "rollout",
            "_calculate_rewards": "reward",
            "compute_loss": "forward",
            "get_batch_samples": "data",
            "log": "log",
        }
        for name, part in timed.items():
            self._time(trainer, name, part)
        self._time(trainer.accelerator, "backward", "backward")

    def _time(self, owner: Any, name: str, part: str) -> None:
        work = getattr(owner, name)

        @functools.wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.clock()
            result = work(*args, **kwargs)
            if self.step is not None:  # the first batch is fetched before the first step
                self.step["parts"][part] += self.clock() - start
                if part == "rollout":
                    self._count(result[0])
            return result

        setattr(owner, name, timed)

    def _count(self, completions: list[list[int]]) -> None:
        lens = [len(ids) for ids in completions]
        self.step["tokens"] += sum(lens)
        self.step["longest"] = max(self.step["longest"], *lens)
        if self.atlas is not None:
            for name, seconds in self.atlas.stats.seconds.items():
                self.step["atlas"][name] += seconds

    def _answer(self, values: dict[str, Any]) -> None:
        self.answers.write(json.dumps(values) + "\n")

    def _end_step(self) -> None:
        spent = {"seconds": self.clock() - self.start, "cpu_seconds": time.process_time() - self.cpu_start}
        self._answer(self.step | spent)

    # ---- trainer events --------------------------------------------------------------------------------------------------

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.step is None:
            self._answer({"max_steps": state.max_steps})
        else:
            self._end_step()
        self.clock.wait(self.turns)
        self.step = {"tokens": 0, "longest": 0, "parts": defaultdict(float), "atlas": defaultdict(float)}
        self.start, self.cpu_start = self.clock(), time.process_time()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.optimizer_start = self.clock()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.step["parts"]["optimizer"] += self.clock() - self.optimizer_start

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "reward" in logs:
            self.step["reward"] = logs["reward"]

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._end_step()


if __name__ == "__main__":
    main()
