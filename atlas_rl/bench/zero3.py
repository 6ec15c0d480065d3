"""Rollouts of one GRPO run under DeepSpeed ZeRO-3, made in four ways by turns: what sharded weights cost a rollout, and save.

  python -m atlas_rl.bench.zero3 --json zero3.json
  python -m atlas_rl.bench.zero3 --ranks 2 --new_tokens 64 --rounds 3

Arms: trl_gathered (TRL's default: weights are gathered around `generate`), trl_sharded (ds3_gather_for_generation: false, weights
are gathered layer by layer at every token), atlas_plain (one gather per policy update, no speculation), atlas (all automatic).

One trainer takes one optimizer step after another, each on rollouts of the next arm, on the shipped policy; lengths are forced
to be equal. A rollout's time is that of TRL's whole generation step, from all ranks' being ready to all ranks' being done: it
holds gathering, refresh, exchange and retraining. First rounds warm up: engines are built, step times measured, drafters made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ARMS = ("trl_gathered", "trl_sharded", "atlas_plain", "atlas")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m atlas_rl.bench.zero3", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine (default: 2)")
    parser.add_argument("--rows", type=int, default=16, help="completions per rank and step (default: 16)")
    parser.add_argument("--new_tokens", type=int, default=128, help="of each completion (default: 128)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rollouts per arm (default: 5)")
    parser.add_argument("--warm_up", type=int, default=2, help="rollouts per arm before that (default: 2)")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated (default: all)")
    parser.add_argument("--policy", metavar="PATH", help="folder or hub id (default: the shipped policy)")
    parser.add_argument("--json", metavar="OUT", help="write all figures here")
    args = parser.parse_args(words)
    unknown = [name for name in args.arms.split(",") if name not in ARMS]
    if unknown:
        parser.error(f"--arms names {', '.join(unknown)}: known are {', '.join(ARMS)}")
    return args


def main() -> int:
    args = parse()
    if "LOCAL_RANK" in os.environ:
        work(args)
        return 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.ranks)]
    # DeepSpeed builds an op at its start, by a ninja that lies beside this interpreter
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": path}
    return subprocess.run([*launch, "-m", "atlas_rl.bench.zero3", *sys.argv[1:]], env=environment).returncode


def work(args: argparse.Namespace) -> None:
    """One rank of the run."""
    import torch.distributed as dist

    arms = args.arms.split(",")
    with tempfile.TemporaryDirectory() as folder:
        trainer, turns = make_run(args, arms, folder)
        trainer.train()
    if dist.get_rank() == 0:
        measured = {arm: turns.seconds[arm][args.warm_up :] for arm in arms}
        report(args, measured)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads may abort an interpreter that ends over gloo


def make_run(args: argparse.Namespace, arms: list[str], folder: str) -> tuple[Any, Turns]:
    from trl import GRPOConfig, GRPOTrainer

    from atlas_rl.cli.launched import join
    from atlas_rl.tasks import build_dataset, policy_path, reasoning_gym_reward

    stage = {"stage": 3}
    config = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"
    )
    fields: dict[str, Any] = {
        "output_dir": folder,
        "deepspeed": config | {"zero_optimization": stage, "zero_allow_untested_optimizer": True},
        "per_device_train_batch_size": args.rows,
        "num_generations": 8,
        "max_completion_length": args.new_tokens,
        "generation_kwargs": {"min_new_tokens": args.new_tokens},
        "max_steps": len(arms) * (args.warm_up + args.rounds),
        "learning_rate": 1e-5,
        "gradient_checkpointing": False,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    flags = join(fields)
    values = {"true": True, "false": False}
    for name, value in zip(flags[::2], flags[1::2]):
        fields[name.removeprefix("--")] = values.get(value) if value in values else json.loads(value)
    trainer = GRPOTrainer(
        model=args.policy or policy_path(),
        reward_funcs=reasoning_gym_reward,
        train_dataset=build_dataset(seed=0),
        args=GRPOConfig(**fields),
    )
    return trainer, Turns(trainer, arms)


class Turns:
    """Gives each optimizer step's rollout to the next arm, and times it."""

    def __init__(self, trainer: Any, arms: list[str]) -> None:
        from atlas_rl import AtlasConfig, AtlasRolloutGenerator

        self.trainer, self.arms = trainer, arms
        self.seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        self.generators = {}
        for arm, speculate in (("atlas_plain", False), ("atlas", True)):
            if arm in arms:
                self.generators[arm] = AtlasRolloutGenerator(AtlasConfig(speculate=speculate)).attach(trainer)
        generate = trainer._generate_single_turn

        def timed(*args: Any, **kwargs: Any) -> Any:
            arm = self.arms[trainer.state.global_step % len(self.arms)]
            self.hand_over(arm)
            trainer.accelerator.wait_for_everyone()
            start = time.perf_counter()
            outputs = generate(*args, **kwargs)
            trainer.accelerator.wait_for_everyone()
            self.seconds[arm].append(time.perf_counter() - start)
            return outputs

        trainer._generate_single_turn = timed

    def hand_over(self, arm: str) -> None:
        """Hooks lie on top of each other: those that are not the arm's pass through, to TRL's own way in the end."""
        self.trainer.args.ds3_gather_for_generation = arm == "trl_gathered"
        for name, generator in self.generators.items():
            generator.attachment.hook.serve = generator.attachment.serve if name == arm else None


def report(args: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    tokens = args.ranks * args.rows * args.new_tokens
    found = {
        "ranks": args.ranks,
        "tokens_per_rollout": tokens,
        "arms": {
            arm: {"tokens_per_s": round(tokens / median(times), 1), "seconds": [round(s, 4) for s in times]}
            for arm, times in seconds.items()
        },
    }
    speeds = {arm: row["tokens_per_s"] for arm, row in found["arms"].items()}
    reference = speeds.get("trl_gathered", next(iter(speeds.values())))
    for arm, speed in speeds.items():
        print(f"{arm:14} {speed:10.1f} tokens/s   {speed / reference:6.2f} x")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
