"""Train a draft head for a policy on the policy's own rollouts, or measure how often one guesses right.

  atlas-rl drafter train --out drafter --minutes 10
      the recurrent head of the shipped policy, on prompts of the shipped tasks
  atlas-rl drafter train --policy ./my-model --prompts prompts.jsonl --kind eagle --out drafter --minutes 60
      an EAGLE-3 head for your own model; each line of the file is an object with `prompt`: text, or a list of messages
  atlas-rl drafter eval drafter --policy ./my-model --prompts other_prompts.jsonl --json figures.json

example:
  atlas-rl drafter train --out drafter --minutes 5 && atlas-rl drafter eval drafter
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas_rl.cli import did_you_mean

if TYPE_CHECKING:
    from atlas_rl.drafters.heads import DraftHead
    from atlas_rl.engine.policy_view import PolicyView
    from atlas_rl.types import SamplingParams

KINDS = ("recurrent", "eagle")
SHIPPED = "shipped"
TRAIN_PROMPTS_SEED, EVAL_PROMPTS_SEED = 2, 3
"""Of the shipped tasks' prompts, apart from each other and from those of the embedded run and of the benchmark."""
EVAL_SEEDS = 1 << 20
"""Above what anyone gives as --seed for training: a head is not measured on the completions that it was trained on."""

TRAIN = """Train a draft head on the policy's own rollouts. A tenth of the prompts (64 at most) is held out; the head that emits
the most tokens per step on these is written. Ctrl-C ends the training early and writes the best head so far.

The folder gets the head (config.json, model.safetensors), report.json and README.md.

examples:
  atlas-rl drafter train --out drafter --minutes 10
  atlas-rl drafter train --policy ./my-model --prompts prompts.jsonl --kind eagle --out drafter --minutes 60
"""
EVAL = """Measure a draft head on fresh rollouts of a policy, by depth of the guess: the share of guesses that could be right at
best (1 - TV), that are right when drawn with the policy's noise (coupled, as the engine draws them), and that the most
probable token would get right; and the tokens per decode step that follow.

example:
  atlas-rl drafter eval drafter --policy ./my-model --prompts prompts.jsonl --json figures.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="train|eval", required=True)
    train = actions.add_parser("train", description=TRAIN, help="train a head and write it")
    train.add_argument("--out", required=True, metavar="FOLDER", help="where the head goes")
    train.add_argument("--kind", default="recurrent", help=f"{' or '.join(KINDS)} (default: recurrent)")
    budget = train.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="budget in time, rollouts included (default: 10)")
    budget.add_argument("--steps", type=int, help="budget in optimizer steps")
    train.add_argument("--lr", type=float, help="peak learning rate (default: the kind's own)")
    evaluate = actions.add_parser("eval", description=EVAL, help="measure a head")
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the head")
    evaluate.add_argument("--json", metavar="OUT", help="write the figures here")
    for action, num_prompts in ((train, 2000), (evaluate, 64)):
        action.add_argument("--policy", default=SHIPPED, help="folder or hub id of the policy (default: shipped)")
        action.add_argument(
            "--prompts", default=SHIPPED, metavar="FILE", help="JSON lines with `prompt` (default: shipped)"
        )
        action.add_argument(
            "--num-prompts", type=int, default=num_prompts, help="use so many at most (default: %(default)s)"
        )
        action.add_argument("--completions-per-prompt", type=int, default=2, help="default: %(default)s")
        action.add_argument("--max-new-tokens", type=int, default=512, help="of a completion (default: %(default)s)")
        action.add_argument("--temperature", type=float, default=1.0, help="of the rollouts; 0 is greedy (default: 1)")
        action.add_argument("--seed", type=int, default=0, help="of weights, order and rollouts (default: 0)")


def run(args: argparse.Namespace) -> int:
    for name in ("num_prompts", "completions_per_prompt", "minutes", "steps", "lr"):
        value = getattr(args, name, None)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if not 0 <= args.seed < EVAL_SEEDS:
        raise ValueError(f"--seed must be between 0 and {EVAL_SEEDS - 1}, got {args.seed}")
    texts = None if args.prompts == SHIPPED else read_prompts(Path(args.prompts))
    return (_train if args.action == "train" else _evaluate)(args, texts)


def read_prompts(path: Path) -> list[Any]:
    """The `prompt` of each line: text, or a conversation."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts: {path} cannot be read ({error}): give a file of JSON lines") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"--prompts: line {number} of {path} is not JSON: {error}") from None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not (prompt and isinstance(prompt, (str, list))):
            raise ValueError(
                f"--prompts: line {number} of {path} has no `prompt`: each line has to be an object with `prompt`, a text "
                "or a list of messages"
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"--prompts: {path} is empty: give at least two prompts")
    return prompts


def _train(args: argparse.Namespace, texts: list[Any] | None) -> int:
    if args.kind not in KINDS:
        raise ValueError(
            f"--kind: unknown kind {args.kind!r}{did_you_mean(args.kind, KINDS)} (known: {', '.join(KINDS)})"
        )
    check_out(Path(args.out))
    sampling, policy = _sampling(args), _checked_policy(args.policy)

    from atlas_rl.adapt.distill import DistillConfig, distill, fresh_head
    from atlas_rl.drafters.checkpoints import save_head

    budget = {"steps": args.steps} if args.steps else {"minutes": args.minutes or 10.0}
    options = budget | ({"learning_rate": args.lr} if args.lr else {})
    view, prompts = _load(policy, texts, args.num_prompts, TRAIN_PROMPTS_SEED)
    config = DistillConfig.for_kind(
        args.kind,
        sampling=_with_eos(sampling, view),
        completions_per_prompt=args.completions_per_prompt,
        seed=args.seed,
        **options,
    )
    head = fresh_head(args.kind, view, args.seed)
    result = distill(view, prompts, head, config)
    save_head(head, args.out, output_head=view.model.get_output_embeddings().weight, policy_path=policy)
    _write_report(Path(args.out), args, head, result.to_dict())
    _print(result.acceptance, f"held-out prompts, after {result.steps} steps in {result.seconds:.0f} s")
    print(f"{'interrupted; the best head so far' if result.interrupted else 'the head'} is in {args.out}")
    return 130 if result.interrupted else 0


def _evaluate(args: argparse.Namespace, texts: list[Any] | None) -> int:
    folder = Path(args.checkpoint)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no draft head (no config.json): give a folder that `drafter train` wrote")
    if args.json is not None:
        from atlas_rl.bench.cli import check_writable

        check_writable(Path(args.json))
    sampling, policy = _sampling(args), _checked_policy(args.policy)

    from atlas_rl.adapt.acceptance import MAX_DEPTH, measure
    from atlas_rl.adapt.distill import EVALUATION_STARTS, RolloutSource
    from atlas_rl.adapt.losses import PolicyEnds
    from atlas_rl.drafters.checkpoints import load_head

    head = load_head(folder)
    check_fits(head, folder, policy)
    view, prompts = _load(policy, texts, args.num_prompts, EVAL_PROMPTS_SEED)
    sampling = _with_eos(sampling, view)
    source = RolloutSource(view, head.layers, sampling, EVAL_SEEDS + args.seed)
    windows = source.answer(prompts, args.completions_per_prompt).tiles(EVALUATION_STARTS + MAX_DEPTH, MAX_DEPTH)
    acceptance = measure(head.to(view.device), windows, PolicyEnds.of(view.model), sampling)
    _print(acceptance, f"{folder}: {acceptance.num_starts} places of {len(prompts)} prompts' completions")
    if args.json is not None:
        Path(args.json).write_text(json.dumps(acceptance.to_dict(), indent=1) + "\n")
    return 0


# ---- checks ------------------------------------------------------------------------------------------------------------------


def check_out(folder: Path) -> None:
    """A head replaces its folder as a whole: only an earlier head may be in the way."""
    from atlas_rl.cli.checks import check_output_dir

    check_output_dir(str(folder), field="--out")
    if folder.exists() and any(folder.iterdir()) and not (folder / "report.json").is_file():
        raise ValueError(f"--out: {folder} holds something else than a head of `drafter train`: give another folder")


def check_fits(head: DraftHead, folder: Path, policy: str) -> None:
    """Before the policy is loaded."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(policy).get_text_config(decoder=True)
    num_layers = 1 + max(head.layers or (), default=0)
    if head.hidden_size != config.hidden_size or num_layers > config.num_hidden_layers:
        raise ValueError(
            f"{folder} was made for another policy (hidden size {head.hidden_size}, {num_layers} layers or more) than {policy} "
            f"(hidden size {config.hidden_size}, {config.num_hidden_layers} layers): give its own with --policy"
        )


def _checked_policy(name: str) -> str:
    """A path or hub id that can be loaded."""
    if name == SHIPPED:
        from atlas_rl.tasks import policy_path

        return policy_path()
    from atlas_rl.cli.checks import check_model

    check_model(name, field="--policy")
    return name


def _sampling(args: argparse.Namespace) -> SamplingParams:
    from atlas_rl.types import SamplingParams

    return SamplingParams(temperature=args.temperature, max_new_tokens=args.max_new_tokens)


# ---- what a head learns from -------------------------------------------------------------------------------------------------


def _load(
    policy: str, texts: list[Any] | None, num_prompts: int, shipped_seed: int
) -> tuple[PolicyView, list[tuple[int, ...]]]:
    """The policy, and different prompts as token ids."""
    import torch
    from transformers import AutoTokenizer

    from atlas_rl.bench.workload import load_policy
    from atlas_rl.engine.policy_view import PolicyView

    if texts is None:
        try:
            from atlas_rl.tasks import build_dataset
        except ModuleNotFoundError as error:
            raise ValueError(f"--prompts is not given, and {error}, or give --prompts FILE") from None

        texts = build_dataset(num_prompts, seed=shipped_seed)["prompt"]
    tokenizer = AutoTokenizer.from_pretrained(policy)
    prompts = dict.fromkeys(tuple(_token_ids(tokenizer, text)) for text in texts)
    view = PolicyView(load_policy(policy).to("cuda" if torch.cuda.is_available() else "cpu"))
    return view, list(prompts)[:num_prompts]


def _token_ids(tokenizer: Any, prompt: str | list[Any]) -> list[int]:
    """As a TRL trainer would make them."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def _with_eos(sampling: SamplingParams, view: PolicyView) -> SamplingParams:
    from dataclasses import replace

    from atlas_rl.integrations.hf_generate import token_ids

    return replace(sampling, eos_token_ids=token_ids(view.model.generation_config.eos_token_id))


# ---- what is left behind -----------------------------------------------------------------------------------------------------


def _print(acceptance: Any, title: str) -> None:
    from rich.console import Console

    Console().print(acceptance.table(title))


def _write_report(folder: Path, args: argparse.Namespace, head: DraftHead, result: dict[str, Any]) -> None:
    import platform
    from importlib.metadata import version

    from atlas_rl import __version__

    command = shlex.join(["atlas-rl", *sys.argv[1:]])
    report = {
        "command": command,
        "kind": args.kind,
        "policy": args.policy,
        "prompts": args.prompts,
        "parameters": sum(p.numel() for p in head.parameters()),
        "versions": {"atlas_rl": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers")},
        **result,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "README.md").write_text(model_card(report))


def model_card(report: dict[str, Any]) -> str:
    held_out = report["held_out"]
    columns = ("overlap", "coupled", "argmax", "tokens_per_step")
    rows = [
        f"| {depth} | {' | '.join(f'{held_out[name][depth - 1]:.3f}' for name in columns)} |"
        for depth in range(1, len(held_out["coupled"]) + 1)
    ]
    return f"""# A draft head ({report["kind"]}) for the policy `{report["policy"]}`

{report["parameters"]:,} parameters beside the policy's own embeddings and output head, trained by

    {report["command"]}

in {report["seconds"]:.0f} s ({report["steps"]} steps on {report["rollout_tokens"]:,} tokens of the policy's own rollouts). On
held-out prompts ({held_out["num_starts"]} places where a draft can start), by depth of the guess:

| depth | 1 - TV | coupled | arg-max | tokens per step |
|---|---|---|---|---|
{chr(10).join(rows)}

`report.json` holds all figures and the versions; `atlas-rl drafter eval` measures again.
"""
