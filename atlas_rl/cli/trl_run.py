"""Build a TRL trainer with Atlas as its generator, train, and print what the rollouts cost and bought.

TRL's scripts build their trainer inside a `main` that takes no callbacks; this is that `main`, with the embedded tasks and
policy as defaults. Rewards and data are loaded before the model, so that what is wrong with them is known early.
"""

from __future__ import annotations

import os
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from atlas_rl.checkpoints import check_saving, last_complete_checkpoint
from atlas_rl.cli.checks import DATASET_BUILDERS, resume_choice
from atlas_rl.cli.progress import Display, show_progress
from atlas_rl.cli.trl_arguments import TrlArguments
from atlas_rl.config import AtlasConfig
from atlas_rl.ranks import Ranks
from atlas_rl.telemetry.summary import summarize_run
from atlas_rl.together import agree


def train(arguments: TrlArguments, atlas: AtlasConfig) -> None:
    training = arguments.training
    check_saving(training, atlas.deterministic)
    training.resume_from_checkpoint = checkpoint_to_resume(training)
    trainer, display = build_trainer(arguments, atlas)
    log_path = Path(atlas.log_path or Path(training.output_dir) / "rollouts.jsonl")
    try:
        with display:
            trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    except KeyboardInterrupt:
        report(trainer, log_path)
        raise
    trainer.save_model(training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.script.dataset_name)
    report(trainer, log_path)
    if hasattr(trainer, "end"):  # transformers >= 5.18: finishes trackers, destroys the process group
        trainer.end()


def checkpoint_to_resume(training: Any) -> str | None:
    """The one that was named, or the newest complete one, as rank 0 sees it."""
    choice = resume_choice(training.resume_from_checkpoint)
    if not isinstance(choice, bool):
        return choice
    if not choice:
        return None
    ranks = Ranks.of_run()
    newest = agree(
        ranks,
        "looking for a checkpoint",
        lambda: last_complete_checkpoint(training.output_dir) if ranks.rank == 0 else None,
    )
    found = ranks.from_first(None if newest is None else str(newest))
    if ranks.rank == 0:
        print(f"Resuming from {found}" if found else f"No complete checkpoint in {training.output_dir}: starting anew")
    return found


def report(trainer: Any, log_path: Path) -> None:
    if not trainer.accelerator.is_main_process:
        return
    from rich.console import Console

    Console().print(summarize_run(log_path, trainer.state.log_history).to_table())
    print(f"Every rollout in figures: {log_path}")
    if log_path.exists():
        run = log_path.parent if log_path.name == "rollouts.jsonl" else log_path
        print(f"Report of this run: atlas-rl report {shlex.quote(str(run))}")


def build_trainer(arguments: TrlArguments, atlas: AtlasConfig) -> tuple[Any, Display]:
    rewards = load_rewards(arguments)
    train_dataset, eval_dataset = load_datasets(arguments)

    from trl import GRPOTrainer, get_peft_config, get_quantization_config

    from atlas_rl.generator import AtlasRolloutGenerator

    generator = AtlasRolloutGenerator(atlas)
    options: dict[str, Any] = {}
    quantization = get_quantization_config(arguments.model)
    if quantization is not None:
        options["quantization_config"] = quantization
    arguments.training.model_init_kwargs = model_init_kwargs(arguments)
    try:
        trainer = GRPOTrainer(
            model=arguments.model.model_name_or_path or shipped_policy(),
            reward_funcs=rewards,
            args=arguments.training,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[generator],
            peft_config=get_peft_config(arguments.model),
            **options,
        )
    except OSError as error:  # transformers' answer to weights or tokenizer files that are missing
        raise ValueError(f"model_name_or_path: {error}") from error
    return trainer, show_progress(trainer, generator)


def model_init_kwargs(arguments: TrlArguments) -> dict[str, Any]:
    model, training = arguments.model, arguments.training
    has_trust = training if hasattr(training, "trust_remote_code") else model  # moved between TRL 1.0 and 1.16
    return {
        "revision": model.model_revision,
        "trust_remote_code": has_trust.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }


def shipped_policy() -> str:
    from atlas_rl.tasks import policy_path

    return policy_path()


def load_rewards(arguments: TrlArguments) -> list[Any]:
    """Reward model and functions, resolved as TRL's script does; the embedded tasks bring their own."""
    script = arguments.script
    rewards: list[Any] = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    names = [script.reward_funcs] if isinstance(script.reward_funcs, str) else script.reward_funcs or []
    rewards += [_reward(name) for name in names]
    return rewards or [_tasks().reasoning_gym_reward]


def _reward(name: str) -> Any:
    import trl.rewards

    if name == "get_soft_overlong_punishment":
        return trl.rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    if "." not in name:
        return getattr(trl.rewards, name)
    module_name, _, function_name = name.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reward_funcs: {name}: there is no module {error.name}: run from the folder that holds it, or put that on PYTHONPATH"
        ) from None
    except AttributeError:
        raise ValueError(f"reward_funcs: {name}: module {module_name} has no {function_name!r}") from None


def load_datasets(arguments: TrlArguments) -> tuple[Any, Any]:
    """Training and evaluation data (None without evaluation)."""
    script, training, mixture = arguments.script, arguments.training, arguments.mixture
    wants_eval = training.eval_strategy != "no"
    if not mixture.datasets and not script.dataset_name:
        build_dataset = _tasks().build_dataset
        return build_dataset(seed=training.seed), build_dataset(seed=training.seed + 1) if wants_eval else None
    if mixture.datasets:
        from trl import get_dataset

        splits = get_dataset(mixture)
    else:
        splits = _load_named(script)
    train_dataset = _split(splits, "dataset_train_split", script.dataset_train_split)
    return train_dataset, _split(splits, "dataset_test_split", script.dataset_test_split) if wants_eval else None


def _load_named(script: Any) -> Any:
    """`dataset_name`: one data file, a folder (of data files, or written by save_to_disk), or a hub id."""
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    name, streaming = script.dataset_name, script.dataset_streaming
    builder = DATASET_BUILDERS.get(Path(name).suffix)
    try:
        if builder and Path(name).is_file():
            return load_dataset(builder, data_files={script.dataset_train_split: name}, streaming=streaming)
        if (Path(name) / "dataset_dict.json").is_file():
            return load_from_disk(name)
        if (Path(name) / "dataset_info.json").is_file() and (Path(name) / "state.json").is_file():
            return {script.dataset_train_split: load_from_disk(name)}
        return load_dataset(name, name=script.dataset_config, streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:  # a ValueError: data that its reader cannot read
        cause = error.__cause__ or error
        raise ValueError(f"dataset_name: {name} cannot be loaded: {cause}") from error


def _split(splits: Any, field: str, split: str) -> Any:
    if split not in splits:
        raise ValueError(f"{field}: the data set has no split {split!r}: choose one of {', '.join(splits)}")
    dataset = splits[split]
    columns = dataset.column_names
    if columns is not None and "prompt" not in columns:
        raise ValueError(
            f"dataset_name: rows need a column `prompt` (text or messages), the columns are {', '.join(columns)}"
        )
    return dataset


def _tasks() -> Any:
    """The embedded tasks. They need reasoning-gym, which a user with data of their own does not."""
    import atlas_rl.tasks

    try:
        import_module("reasoning_gym")
    except ModuleNotFoundError:
        raise ValueError(
            "dataset_name is not given, and the embedded tasks need reasoning-gym: pip install 'atlas-rl[tasks]', "
            "or give dataset_name and reward_funcs"
        ) from None
    return atlas_rl.tasks
