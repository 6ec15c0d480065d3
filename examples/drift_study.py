"""How drafters follow a policy that reinforcement learning moves: acceptance and speed against KL(policy || start).

    python examples/drift_study.py --json drift.json --plot drift.png                # the quickstart's run, a few minutes
    python examples/drift_study.py --reward forced --shares 0.01,0.03,0.1,0.3        # a reward that moves the policy far
    python examples/drift_study.py --heads --minutes 3 --skip-run                    # recurrent or EAGLE-style, which layers
    ATLAS_TEST_DATA=data python examples/drift_study.py --policy stories260K         # another policy, of plain text
    python examples/drift_study.py --quick                                           # is everything in place? half a minute

A GRPO run is recorded: the weights and rollouts of every step. Then every mode of drafting makes these rollouts again, one mode
after the other at each step, its adaptive drafter retrained in between as in training. Tokens are the same in all of them (that
is checked), so the modes differ in time alone. At some steps ("probes") every drafter is measured at lookahead 4 on prompts that
stay the same, and the policy's KL to the start exactly.

Modes: plain (no drafts), suffix and static (that drafter alone), never, on_drift, every_update (all drafters, by when the
adaptive one is retrained). All begin with the same head: the policy's own (its folder `drafter`), or one made here first.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
ALL_MODES = "plain,suffix,static,never,on_drift,every_update"
QUICK = {
    "steps": 4,
    "probes": 2,
    "batch": 8,
    "tokens": 24,
    "head_steps": 4,
    "converge_steps": 4,
    "steps_per_head": 4,
    "probe_prompts": 2,
    "repeats": 1,
}
"""In place of these arguments; a budget in steps goes before one in minutes."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="shipped", help="shipped, stories260K, or a folder (default: shipped)")
    parser.add_argument(
        "--reward", choices=["task", "forced"], help="default: task; stories260K has only the forced one"
    )
    parser.add_argument("--steps", type=int, help="policy updates (default: the quickstart's 40)")
    parser.add_argument("--probes", type=int, default=8, help="measurements along the run (default: 8)")
    parser.add_argument("--probe-prompts", type=int, default=16, help="answered 4 times each (default: 16)")
    parser.add_argument("--batch", type=int, help="completions per update (default: the quickstart's 64)")
    parser.add_argument("--tokens", type=int, help="of a completion at most (default: the quickstart's)")
    parser.add_argument("--learning-rate", type=float, help="default: the quickstart's, or 5e-4 with the forced reward")
    parser.add_argument("--modes", default=ALL_MODES, help="default: all")
    parser.add_argument("--shares", default="", metavar="S,…", help="also sweep these shares of time for retraining")
    parser.add_argument(
        "--converge-minutes", type=float, default=2.0, help="for the head that shares are compared with"
    )
    parser.add_argument(
        "--head-minutes", type=float, default=2.0, help="for the head to begin with, if it has to be made"
    )
    parser.add_argument("--heads", action="store_true", help="also compare heads, on the policy as it starts")
    parser.add_argument("--minutes", type=float, default=1.0, help="for each of those heads (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, help="of their speed measurements (default: 5)")
    parser.add_argument("--skip-run", action="store_true", help="heads only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch's; default: leave them alone")
    parser.add_argument("--json", metavar="OUT", help="write all figures here")
    parser.add_argument("--plot", metavar="PNG", help="draw them (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="tiny budgets: the figures mean nothing")
    parser.set_defaults(head_steps=None, converge_steps=None, steps_per_head=None)
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    args.reward = args.reward or ("forced" if args.policy == "stories260K" else "task")
    if args.policy == "stories260K" and args.reward == "task":
        parser.error("stories260K answers no tasks: --reward forced")
    return args


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as scratch:
        study = run_study(args, Path(scratch))
    if args.json:
        Path(args.json).write_text(json.dumps(study, indent=1) + "\n")
    if args.plot and "drift" in study:
        from atlas_rl.telemetry.plots import plot_drift

        plot_drift(study, args.plot)
    print(json.dumps({name: study[name] for name in ("summary", "heads") if name in study}, indent=1))
    for row in study.get("sweep", {}).get("shares", ()):
        spent, steps = row["share_spent"], row["probe"]["tokens_per_decode_step"]
        print(f"share {spent:7.2%} spent: {steps:.2f} tokens per step, {row['of_converged']:.3f} of a converged head's")


def run_study(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    import torch

    from atlas_rl.bench.drift import replay_run, summarize, sweep_shares
    from atlas_rl.bench.head_study import compare_heads
    from atlas_rl.bench.probe import Probe
    from atlas_rl.bench.recorded_run import record_run
    from atlas_rl.bench.workload import load_policy
    from atlas_rl.types import SamplingParams

    if args.threads:
        torch.set_num_threads(args.threads)
    folder, dataset, fresh_texts = material(args, scratch)
    policy = load_policy(str(folder))
    options = trainer_options(args)
    sampling = SamplingParams(
        temperature=options["temperature"],
        max_new_tokens=options["max_completion_length"],
        eos_token_ids=(policy.generation_config.eos_token_id,),
    )
    prompts = tokenized(folder, fresh_texts)
    probe = Probe(policy, prompts[: args.probe_prompts], 4, sampling)
    study: dict[str, Any] = {"arguments": vars(args), "threads": torch.get_num_threads(), "training": options}
    if args.heads:
        budget = {"steps": args.steps_per_head} if args.steps_per_head else {"minutes": args.minutes}
        learned_from = prompts[args.probe_prompts :]
        study["heads"] = compare_heads(policy, learned_from, probe, sampling, budget, repeats=args.repeats)
    if args.skip_run:
        return study
    head = starting_head(args, policy, folder, prompts[args.probe_prompts :], sampling, scratch)
    from atlas_rl import AtlasConfig

    run = record_run(str(folder), dataset, reward(args), AtlasConfig(static_drafter=head), **options)
    study["rewards"] = run.rewards
    study["drift"] = replay_run(policy, run, probe, head, args.modes.split(","), args.probes)
    study["summary"] = summarize(study["drift"])
    if args.shares:
        shares = [float(share) for share in args.shares.split(",")]
        converge = {"steps": args.converge_steps} if args.converge_steps else {"minutes": args.converge_minutes}
        study["sweep"] = sweep_shares(policy, run, probe, head, shares, converge)
    return study


def material(args: argparse.Namespace, scratch: Path) -> tuple[Path, Any, list[str]]:
    """The policy's folder, what it is trained on, and other prompts to measure with."""
    if args.policy == "stories260K":
        from datasets import Dataset

        from atlas_rl.bench.stories import OPENINGS, save_stories260k

        data = Path(os.environ.get("ATLAS_TEST_DATA", "")) / "stories260K"
        if not data.is_dir():
            raise SystemExit(
                "stories260K is not part of Atlas-RL: set ATLAS_TEST_DATA to a folder that holds stories260K/"
            )
        rows = Dataset.from_list([{"prompt": text} for text in OPENINGS[::2]])
        return save_stories260k(data, scratch / "policy"), rows, OPENINGS[1::2]
    from atlas_rl.tasks import build_dataset, policy_path

    folder = Path(policy_path() if args.policy == "shipped" else args.policy)
    return folder, build_dataset(seed=args.seed), list(build_dataset(40 if args.quick else 1000, seed=7)["prompt"])


def trainer_options(args: argparse.Namespace) -> dict[str, Any]:
    """The quickstart's, but for what is asked for."""
    from atlas_rl.config import read_yaml

    options = read_yaml(QUICKSTART)
    for name in ("atlas", "output_dir", "report_to", "save_strategy"):
        options.pop(name)
    asked = {
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "max_completion_length": args.tokens,
        "learning_rate": args.learning_rate or (5e-4 if args.reward == "forced" else None),
    }
    return options | {name: value for name, value in asked.items() if value} | {"seed": args.seed}


def reward(args: argparse.Namespace) -> Any:
    from atlas_rl.bench.recorded_run import forced_reward
    from atlas_rl.tasks import reasoning_gym_reward

    return forced_reward if args.reward == "forced" else reasoning_gym_reward


def tokenized(folder: Path, texts: list[str]) -> list[tuple[int, ...]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return list(dict.fromkeys(tuple(tokenizer(text)["input_ids"]) for text in texts))


def starting_head(
    args: argparse.Namespace, policy: Any, folder: Path, prompts: list[tuple[int, ...]], sampling: Any, scratch: Path
) -> str:
    """Folder of the head that all modes begin with."""
    if (folder / "drafter" / "config.json").exists():
        return str(folder / "drafter")
    from atlas_rl.adapt.distill import DistillConfig, distill, fresh_head
    from atlas_rl.drafters.checkpoints import save_head
    from atlas_rl.engine.policy_view import PolicyView

    view = PolicyView(copy.deepcopy(policy))
    head = fresh_head("recurrent", view, args.seed)
    budget = {"steps": args.head_steps} if args.head_steps else {"minutes": args.head_minutes}
    distill(view, prompts, head, DistillConfig(sampling=sampling, seed=args.seed, **budget))
    save_head(head, scratch / "head")
    return str(scratch / "head")


if __name__ == "__main__":
    main()
