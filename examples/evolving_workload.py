"""Traffic that moves from one family of tasks to another, the policy's weights fixed: does the drafter follow?

    python examples/evolving_workload.py --json evolving.json --plot evolving.png
    python examples/evolving_workload.py --first gcd,chain_sum --second letter_counting
    python examples/evolving_workload.py --quick                         # is everything in place? some seconds

A head is trained on the first family alone. It then drafts for a bare model, attached as in examples/generate.py: once retrained
from the traffic (every `adapt.tokens_per_update` tokens), once left alone. A head trained on the second family, with the same
budget, shows what there is to be had. Tokens per decode step are the engine's own, at lookahead 4.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from atlas_rl import AtlasConfig, AtlasRolloutGenerator, SamplingParams
from atlas_rl.adapt.distill import DistillConfig, distill, fresh_head
from atlas_rl.config import AdaptConfig
from atlas_rl.drafters.checkpoints import save_head
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.tasks import policy_path
from atlas_rl.tasks.mix import TASK_NAMES, draw_items

LOOKAHEAD = 4
RECOVERED = 0.95
FIGURES = ("tokens_per_decode_step", "tokens_per_s", "seconds", "retrain")
TRAIN_SEED, TRAFFIC_SEED = 11, 12
QUICK = {"steps": 4, "train_prompts": 8, "before": 1, "after": 2, "batch": 4, "tokens": 24, "tokens_per_update": 64}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", default="chain_sum", help=f"of {', '.join(TASK_NAMES)} (default: chain_sum)")
    parser.add_argument("--second", default="letter_counting", help="default: letter_counting")
    parser.add_argument("--before", type=int, default=8, help="batches of the first family (default: 8)")
    parser.add_argument("--after", type=int, default=40, help="batches of the second (default: 40)")
    parser.add_argument("--batch", type=int, default=64, help="completions in a batch, 4 per prompt (default: 64)")
    parser.add_argument("--tokens", type=int, default=288, help="of a completion at most (default: 288)")
    parser.add_argument(
        "--tokens-per-update", type=int, default=AdaptConfig().tokens_per_update, help="default: %(default)s"
    )
    parser.add_argument("--max-share", type=float, default=AdaptConfig().max_share, help="of time, for retraining")
    parser.add_argument("--minutes", type=float, default=1.5, help="for each of the two heads (default: 1.5)")
    parser.add_argument("--steps", type=int, help="or so many optimizer steps")
    parser.add_argument("--train-prompts", type=int, default=400, help="for each head (default: 400)")
    parser.add_argument("--threads", type=int, help="torch's; default: leave them alone")
    parser.add_argument("--json", metavar="OUT", help="write all figures here")
    parser.add_argument("--plot", metavar="PNG", help="draw them (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="tiny budgets: the figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    for name in ("first", "second"):
        unknown = set(getattr(args, name).split(",")) - set(TASK_NAMES)
        if unknown:
            parser.error(f"--{name}: unknown {', '.join(sorted(unknown))} (known: {', '.join(TASK_NAMES)})")
    return args


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        study = run_study(args, Path(scratch))
    if args.json:
        Path(args.json).write_text(json.dumps(study, indent=1) + "\n")
    if args.plot:
        from atlas_rl.telemetry.plots import plot_workload

        plot_workload(study, args.plot)
    for name, points in study["traffic"].items():
        print(f"{name:10s}", " ".join(f"{p['tokens_per_decode_step']:.2f}" for p in points), "tokens per step")
    print(json.dumps(study["summary"], indent=1))


def run_study(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    eos_id = load_policy().generation_config.eos_token_id
    sampling = SamplingParams(max_new_tokens=args.tokens, eos_token_ids=(eos_id,))
    traffic = [*batches(args, args.first, args.before), *batches(args, args.second, args.after)]
    first, second = (trained_head(args, getattr(args, name), sampling, scratch / name) for name in ("first", "second"))
    adapt = AdaptConfig(tokens_per_update=args.tokens_per_update, max_share=args.max_share)
    common = {"drafters": ("recurrent",), "lookahead": LOOKAHEAD, "adapt": adapt}
    arms = {
        "adaptive": AtlasConfig(static_drafter=first, **common),
        "frozen": AtlasConfig(static_drafter=first, retrain="never", **common),
        "reference": AtlasConfig(static_drafter=second, retrain="never", **common),
    }
    points = {name: serve(name, config, traffic, sampling) for name, config in arms.items()}
    switch = points["adaptive"][args.before]["tokens"]
    study = {
        "first": args.first,
        "second": args.second,
        "arguments": vars(args),
        "switch_at_tokens": switch,
        "traffic": points,
    }
    return study | {"summary": summarize(points, args.before, switch)}


def serve(
    name: str, config: AtlasConfig, traffic: list[list[list[int]]], sampling: SamplingParams
) -> list[dict[str, Any]]:
    """Figures of each batch, by how many tokens came before it."""
    points, tokens = [], 0
    with AtlasRolloutGenerator(config).attach(load_policy()) as generator:
        for index, prompts in enumerate(tqdm(traffic, desc=name, unit="batch")):
            rollouts = generator.generate(prompts, sampling, num_samples=4, seed=index)
            row = generator.stats.to_dict()
            points.append({"tokens": tokens} | {figure: row[figure] for figure in FIGURES if figure in row})
            tokens += sum(len(rollout.token_ids) for rollout in rollouts)
    return points


def summarize(points: dict[str, list[dict[str, Any]]], before: int, switch: int) -> dict[str, Any]:
    """Batches differ in how easy they are: what counts is the ratio to the reference on the same batch, over three of them."""
    values = {name: [p["tokens_per_decode_step"] for p in series[before:]] for name, series in points.items()}

    def ratio(name: str, start: int, count: int = 3) -> float:
        part = slice(start, start + count)
        return sum(values[name][part]) / sum(values["reference"][part])

    starts = range(max(1, len(values["adaptive"]) - 2))
    recovered = next((i for i in starts if ratio("adaptive", i) >= RECOVERED), None)
    third = len(starts) * 2 // 3
    return {
        "adaptive_over_reference_at_first": ratio("adaptive", 0, 1),
        "adaptive_over_reference_at_the_end": ratio("adaptive", third, len(starts)),
        "frozen_over_reference_at_the_end": ratio("frozen", third, len(starts)),
        "tokens_until_recovered": None
        if recovered is None
        else points["adaptive"][before + recovered]["tokens"] - switch,
        "retrain_seconds": sum(p.get("retrain", {}).get("seconds", 0.0) for p in points["adaptive"]),
        "total_seconds": sum(p["seconds"]["total"] for p in points["adaptive"]),
    }


def load_policy() -> Any:
    return AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32).eval()


def prompts_of(families: str, seed: int) -> Iterator[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    names = families.split(",")
    return (tokenizer(item.prompt)["input_ids"] for item in draw_items(seed) if item.task in names)


def batches(args: argparse.Namespace, families: str, count: int) -> Iterator[list[list[int]]]:
    prompts = prompts_of(families, TRAFFIC_SEED)
    for _ in range(count):
        yield list(islice(prompts, max(1, args.batch // 4)))


def trained_head(args: argparse.Namespace, families: str, sampling: SamplingParams, folder: Path) -> str:
    view = PolicyView(load_policy())
    head = fresh_head("recurrent", view, seed=0)
    budget = {"steps": args.steps} if args.steps else {"minutes": args.minutes}
    prompts = [tuple(prompt) for prompt in islice(prompts_of(families, TRAIN_SEED), args.train_prompts)]
    distill(view, prompts, head, DistillConfig(sampling=sampling, **budget))
    save_head(head, folder)
    return str(folder)


if __name__ == "__main__":
    main()
