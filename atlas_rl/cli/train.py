"""Train a policy with a TRL trainer whose rollouts are made by Atlas.

Fields are TRL's own, in a YAML file or on the command line (`trl grpo --help` lists them), plus a section `atlas:`
in the YAML (on the command line: --atlas.FIELD VALUE). A TRL config file runs unchanged. Without model_name_or_path
the policy that ships with Atlas-RL is trained; without dataset_name it trains on generated reasoning tasks.

examples:
  the embedded run, a few minutes on a laptop CPU
    atlas-rl train --config quickstart
  the same, shorter, and with plain decoding for comparison
    atlas-rl train --config quickstart --max_steps 10 --atlas.speculate false
  your own model, data and reward (a function in my_rewards.py of this folder)
    atlas-rl train --config my.yaml --model_name_or_path ./my-model --dataset_name data.jsonl \\
        --reward_funcs my_rewards.exact_match
  on two GPUs: launcher flags go to `accelerate launch`, as they do in `trl`
    atlas-rl train --config my.yaml --accelerate_config multi_gpu --num_processes 2
  a policy that needs sharding, by DeepSpeed ZeRO-3 (also: zero1, zero2, fsdp2, zero3_offload, or a file)
    atlas-rl train --config my.yaml --accelerate_config zero3 --num_processes 8
  on two machines of 8 GPUs: the same on both, with --machine_rank 1 on the second
    atlas-rl train --config my.yaml --accelerate_config zero3 --num_processes 16 --num_machines 2 \\
        --main_process_ip 10.0.0.1 --machine_rank 0
  go on after a crash, from the newest complete checkpoint of output_dir
    atlas-rl train --config my.yaml --resume_from_checkpoint latest
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from atlas_rl.cli import did_you_mean
from atlas_rl.config import AtlasConfig, find_config, read_yaml

TRAINERS = ("grpo",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "atlas-rl train [grpo] [--config FILE] [--field value …] [--atlas.field value …]"
    parser.add_argument("trainer", help="the TRL trainer: grpo (the default)")
    about = "YAML with TRL's fields and a section `atlas:`; or `quickstart`, which comes with Atlas-RL"
    parser.add_argument("--config", metavar="FILE", help=about)
    parser.add_argument("--launched", action="store_true", help=argparse.SUPPRESS)  # set for processes of a launcher


def with_trainer_name(argv: list[str]) -> list[str]:
    """The trainer's name stands first, or is left out: then it is grpo."""
    return argv if argv and not argv[0].startswith("-") else ["grpo", *argv]


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    if args.trainer not in TRAINERS:
        raise ValueError(
            f"unknown trainer {args.trainer!r}{did_you_mean(args.trainer, TRAINERS)} (known: {TRAINERS[0]})"
        )
    if args.config is None and not overrides:
        raise ValueError("nothing says what to train: give --config FILE, for a start --config quickstart")
    config = read_yaml(find_config(args.config)) if args.config else {}
    atlas_overrides, overrides = split_atlas(overrides)
    atlas = atlas_config(config.pop("atlas", None), atlas_overrides)
    _export(config.pop("env", None))
    if not sys.stderr.isatty():  # progress bars are thousands of lines in a log file; tqdm reads this when imported
        os.environ.setdefault("TQDM_DISABLE", "1")

    if not args.launched:  # the process that launched this one has looked at all that already
        from atlas_rl.cli.checks import check_drafter, check_inputs

        check_inputs({**config, **given_values(overrides)}, atlas.deterministic)
        if atlas.static_drafter is not None:
            check_drafter(atlas.static_drafter)

    from atlas_rl.cli import launched, launching
    from atlas_rl.cli.trl_arguments import Given

    given = Given.of(args.trainer, config, overrides)
    if given.launch_flags and not args.launched:
        launched.check_not_launched(given.launch_flags)
        config_flag = ["--config", args.config] if args.config else []
        atlas_flags = [f"--atlas.{name}={value}" for name, value in atlas_overrides]
        script = [args.trainer, "--launched", *config_flag, *given.script_flags, *atlas_flags]
        return launching.launch(given.launch_flags, given.fields, ["train", *script])

    launched.check_process(given.fields)
    arguments = given.build(launched.join(given.fields))

    from atlas_rl.cli.trl_run import train

    train(arguments, atlas)
    return 0


def split_atlas(argv: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Take `--atlas.field value` and `--atlas.field=value` out of a command line: (field, value) pairs, the rest."""
    pairs, rest, tokens = [], [], iter(argv)
    for token in tokens:
        if not token.startswith("--atlas."):
            rest.append(token)
            continue
        name, has_value, value = token.removeprefix("--atlas.").partition("=")
        if not has_value:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise ValueError(f"{token} needs a value, as in `{token} VALUE`")
        pairs.append((name, value))
    return pairs, rest


def atlas_config(section: Any, overrides: list[tuple[str, str]]) -> AtlasConfig:
    """The YAML's `atlas:` section with the command line's values over it. Values are read as YAML would read them."""
    import yaml

    values: dict[str, Any] = section if section is not None else {}
    try:
        for name, text in overrides:
            *parents, leaf = name.split(".")
            target = values
            for parent in parents:
                target = target.setdefault(parent, {})
            target[leaf] = yaml.safe_load(text)
        return AtlasConfig.from_dict(values)
    except (TypeError, AttributeError):
        raise ValueError(f"atlas: {name} is no field inside a section: {values!r} is not a mapping") from None
    except yaml.YAMLError:
        raise ValueError(f"atlas: --atlas.{name} {text} is not a YAML value: quote it") from None
    except ValueError as error:
        raise ValueError(f"atlas: {error}") from None


def given_values(argv: list[str]) -> dict[str, Any]:
    """`--name value …` pairs of a command line by field name, unparsed: one string, or a list where several follow."""
    values: dict[str, list[str]] = {}
    name = None
    for token in argv:
        if token.startswith("--"):
            flag, has_value, value = token.removeprefix("--").partition("=")
            name = flag.replace("-", "_")
            values[name] = [value] if has_value else []
        elif name is not None:
            values[name].append(token)
    return {name: given[0] if len(given) == 1 else given for name, given in values.items()}


def _export(env: Any) -> None:
    """TRL's `env:` mapping. Exported before torch is imported, so that variables such as OMP_NUM_THREADS count."""
    if env is None:
        return
    if not isinstance(env, dict):
        raise ValueError(f"env must map names of environment variables to values, got {env!r}")
    os.environ.update({str(name): str(value) for name, value in env.items()})
