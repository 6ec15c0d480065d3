"""TRL's own parser and TRL's own way to `accelerate launch`, with errors that name the field and the remedy."""

from __future__ import annotations

import subprocess
import warnings
from argparse import ArgumentParser
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from atlas_rl.cli import did_you_mean

OUR_FIELDS = ("config", "atlas")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlArguments:
    script: Any
    """TRL's ScriptArguments of the trainer: data set and rewards."""
    training: Any
    """GRPOConfig, or that of another trainer."""
    model: Any
    """ModelConfig."""
    mixture: Any
    """DatasetMixtureConfig."""
    script_flags: list[str]
    """The command line without the launcher's flags."""
    launch_flags: list[str]
    """What belongs to `accelerate launch`, from the command line and the YAML."""


def parse(trainer: str, config: dict[str, Any], argv: list[str]) -> TrlArguments:
    """Fields of a YAML (without `atlas` and `env`), overridden by the command line."""
    parser = import_module(f"trl.scripts.{trainer}").make_parser(prog=f"atlas-rl train {trainer}")
    parser.allow_abbrev = False
    parser.error = _raise_value_error
    fields = {action.dest for action in parser._actions}
    launcher = _launcher_parser()

    foreign = {name: value for name, value in config.items() if name not in fields}
    own = {name: value for name, value in config.items() if name in fields}
    _check_types(parser, own)
    parser.set_defaults_with_config(**own)
    # TRL calls transformers by names that are being renamed; the user can do nothing about these warnings
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        *groups, remaining = parser.parse_args_into_dataclasses(
            args=list(argv), return_remaining_strings=True, look_for_args_file=False
        )
    except TypeError as error:  # a YAML value of a type that the field's dataclass cannot compare or convert
        raise ValueError(
            f"a field has a value of the wrong type ({error}): compare with `trl {trainer} --help`"
        ) from None

    launch_flags = [*_flags_from_config(foreign, launcher), *remaining]
    _refuse_unknown(launch_flags, launcher, fields)
    script, training, model, mixture = groups
    return TrlArguments(
        script=script,
        training=training,
        model=model,
        mixture=mixture,
        script_flags=_without(list(argv), remaining),
        launch_flags=launch_flags,
    )


def launch(launch_flags: list[str], script: list[str]) -> int:
    """Run `atlas-rl <script>` under `accelerate launch`; the exit code is the script's own."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    flags = resolve_accelerate_config_argument(launch_flags)
    parser = launch_command_parser()
    parser.error = _raise_value_error
    try:
        launch_command(parser.parse_args([*flags, "--module", "atlas_rl", *script]))
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def _check_types(parser: ArgumentParser, values: dict[str, Any]) -> None:
    """Numbers and switches of a YAML. argparse converts strings only, so a list would get as far as the trainer."""
    wanted = {"int": (int, str), "float": (int, float, str), "string_to_bool": (bool, str)}
    for action in parser._actions:
        types = wanted.get(getattr(action.type, "__name__", ""))
        value = values.get(action.dest)
        if types is None or value is None or action.nargs == "+":
            continue
        whole = isinstance(value, float) and value.is_integer()
        if not isinstance(value, types) and not (whole and int in types):
            raise ValueError(f"{action.dest} has the wrong type in the config file: {value!r}")


def _refuse_unknown(flags: list[str], launcher: dict[str, Any], fields: set[str]) -> None:
    """What TRL's parser left over must be options of the launcher, each with its value."""
    words_due = 0
    for token in flags:
        if token.startswith("--"):
            flag, has_value, _ = token.partition("=")
            if flag not in launcher:
                name = flag.removeprefix("--").replace("-", "_")
                known = {*fields, *OUR_FIELDS, *(option.lstrip("-") for option in launcher)}
                raise ValueError(
                    f"unknown field {name!r}{did_you_mean(name, known)} (`trl grpo --help` lists the fields)"
                )
            words_due = 0 if has_value or launcher[flag].nargs == 0 else 1
        elif words_due:
            words_due -= 1
        else:
            raise ValueError(f"argument {token!r} belongs to no field: write --FIELD {token}")


def _launcher_parser() -> dict[str, Any]:
    """`accelerate launch`'s options by flag, and the one that `trl` adds to them."""
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser()._option_string_actions
    return {**options, "--accelerate_config": ArgumentParser().add_argument("--accelerate_config")}


def _flags_from_config(foreign: dict[str, Any], launcher: dict[str, Any]) -> list[str]:
    """YAML keys that are no field of TRL, as flags: a switch is on (`multi_gpu: true`), or left out."""
    flags: list[str] = []
    for name, value in foreign.items():
        option = launcher.get(f"--{name}")
        if option is not None and option.nargs == 0:
            flags += [f"--{name}"] if value else []
        else:
            flags += [f"--{name}", str(value)]
    return flags


def _without(argv: list[str], removed: list[str]) -> list[str]:
    """`argv` without `removed`, which stands in it in the same order."""
    rest, pending = [], list(removed)
    for token in argv:
        if pending and token == pending[0]:
            pending.pop(0)
        else:
            rest.append(token)
    return rest


def _raise_value_error(message: str) -> NoReturn:
    raise ValueError(message)
