"""TRL's own parser, with errors that name the field and the remedy."""

from __future__ import annotations

import warnings
from argparse import ArgumentParser
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from atlas_rl.cli import did_you_mean
from atlas_rl.cli.launching import raise_value_error

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A YAML and a command line, sorted into TRL's fields and the launcher's flags; nothing is built yet.

    TRL's configs cannot be built in the process that only launches: they check what they are given for one process.
    """

    trainer: str
    parser: ArgumentParser
    argv: list[str]
    fields: dict[str, Any]
    """Every field of TRL by its value, or its default."""
    script_flags: list[str]
    """The command line without the launcher's flags."""
    launch_flags: list[str]
    """What belongs to `accelerate launch`, from the command line and the YAML."""

    @classmethod
    def of(cls, trainer: str, config: dict[str, Any], argv: list[str]) -> Given:
        """Fields of a YAML (without `atlas` and `env`), overridden by the command line."""
        parser = import_module(f"trl.scripts.{trainer}").make_parser(prog=f"atlas-rl train {trainer}")
        parser.allow_abbrev = False
        parser.error = raise_value_error
        names = {action.dest for action in parser._actions}
        launcher = _launcher_parser()

        foreign = {name: value for name, value in config.items() if name not in names}
        own = {name: value for name, value in config.items() if name in names}
        _check_types(parser, own)
        parser.set_defaults_with_config(**own)
        # TRL calls transformers by names that are being renamed; the user can do nothing about these warnings
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        namespace, remaining = parser.parse_known_args(argv)
        launch_flags = [*_flags_from_config(foreign, launcher), *remaining]
        _refuse_unknown(launch_flags, launcher, names)
        return cls(
            trainer=trainer,
            parser=parser,
            argv=argv,
            fields=vars(namespace),
            script_flags=_without(argv, remaining),
            launch_flags=launch_flags,
        )

    def build(self, flags: list[str]) -> TrlArguments:
        """TRL's configs, with `flags` over what was given. Those of several processes meet here for the first time."""
        try:
            script, training, model, mixture, _ = self.parser.parse_args_into_dataclasses(
                args=[*self.argv, *flags], return_remaining_strings=True, look_for_args_file=False
            )
        except TypeError as error:  # a YAML value of a type that the field's dataclass cannot compare or convert
            raise ValueError(
                f"a field has a value of the wrong type ({error}): compare with `trl {self.trainer} --help`"
            ) from None
        return TrlArguments(script=script, training=training, model=model, mixture=mixture)


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
