"""Several processes: `accelerate launch` as TRL's command line uses it, checked before it starts."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from atlas_rl.cli import did_you_mean
from atlas_rl.config import read_yaml, shipped_configs

INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What `accelerate launch` is asked for, by flags and by its config file."""

    flags: list[str]
    options: Any
    """`flags`, parsed by accelerate."""
    file: dict[str, Any]
    """The config file's fields; empty where there is none."""
    file_name: str
    is_preset: bool
    """The file is one of TRL's, whose number of processes is an example."""

    @classmethod
    def of(cls, flags: list[str]) -> Launch:
        flags = _one_word_each(flags)
        path, is_preset = None, False
        if "--accelerate_config" in flags:
            index = flags.index("--accelerate_config")
            if index + 1 == len(flags):
                raise ValueError("accelerate_config: give a name or a file, as in --accelerate_config zero2")
            path, is_preset = find_accelerate_config(flags[index + 1])
            flags = ["--config_file", path, *flags[:index], *flags[index + 2 :]]
        options = _parse(flags, [])
        return cls(flags=flags, options=options, file=read_config(options), file_name=path or "", is_preset=is_preset)

    def __getitem__(self, name: str) -> Any:
        """A flag's value, or else the file's; None where neither has it."""
        given = getattr(self.options, name)
        return self.file.get(name) if given is None else given

    @property
    def kind(self) -> str:
        """deepspeed, fsdp, or plain (DDP, one process)."""
        named = str(self.file.get("distributed_type", "")).lower()
        for kind in ("deepspeed", "fsdp"):
            if getattr(self.options, f"use_{kind}") or (named == kind and not self.options.multi_gpu):
                return kind
        return "plain"

    @property
    def asks_for_cpu(self) -> bool:
        """In accelerate's words, which its DeepSpeed and FSDP do not heed."""
        return self.kind == "plain" and (self.options.cpu or is_true(self.file.get("use_cpu")))

    def uses_cpu(self, fields: dict[str, Any]) -> bool:
        return self.asks_for_cpu or is_true(fields.get("use_cpu")) or not num_accelerators()

    @property
    def starts_other_machines(self) -> bool:
        """DeepSpeed does, by pdsh, MPI or Slurm; otherwise each machine is started with its rank."""
        launcher = self.options.deepspeed_multinode_launcher
        launcher = launcher or self.file.get("deepspeed_config", {}).get("deepspeed_multinode_launcher")
        return self.kind == "deepspeed" and launcher not in (None, "standard", "nossh")

    @property
    def lacks_rank(self) -> bool:
        """No flag says which machine this is, nor the file; in one of TRL's it is 0 on every machine."""
        return self.options.machine_rank is None and (self.is_preset or self.file.get("machine_rank") is None)

    @property
    def num_machines(self) -> int:
        return int(self["num_machines"] or 1)

    @property
    def num_processes(self) -> int:
        """On all machines. Where nothing says how many: one per accelerator, as accelerate does."""
        given = self.options.num_processes if self.is_preset else self["num_processes"]
        if given is None and self.is_preset and not num_accelerators():
            raise ValueError(
                f"num_processes is missing: {Path(self.file_name).stem} would start {self.file.get('num_processes')}, and this "
                "machine has no accelerators to count. Give --num_processes, for instance 2"
            )
        return int(given) if given is not None else max(1, num_accelerators()) * self.num_machines


def launch(flags: list[str], fields: dict[str, Any], script: list[str]) -> int:
    """Run `atlas-rl <script>` under `accelerate launch`. The exit code is that of its processes: 2 if one says bad input."""
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    plan = Launch.of(flags)
    check(plan, fields)
    if plan.asks_for_cpu:
        script = [*script, "--use_cpu", "true"]
    try:
        launch_command(_parse(accelerate_flags(plan, fields), script))
    except subprocess.CalledProcessError as error:  # one process
        return error.returncode
    except ChildFailedError as error:  # several; those that are ended because one failed have negative codes
        codes = [failure.exitcode for failure in error.failures.values()]
        rank, failure = error.get_first_failure()
        if max(codes) not in (2, INTERRUPTED):
            print(f"atlas-rl: rank {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
        return max(1, *codes)
    except SignalException:
        return INTERRUPTED
    return 0


def check(plan: Launch, fields: dict[str, Any]) -> None:
    """What would otherwise fail in every process, after its libraries are loaded, or hang."""
    here, machines, processes = num_accelerators(), plan.num_machines, plan.num_processes
    if processes % machines:
        raise ValueError(
            f"num_processes: {processes} cannot be shared evenly by num_machines {machines}: count all of them"
        )
    if not plan.uses_cpu(fields) and processes // machines > here:
        raise ValueError(
            f"num_processes: {processes // machines} on this machine, which has {here} accelerators: "
            f"give --num_processes {here * machines}"
        )
    if machines > 1 and not plan.starts_other_machines and (plan["main_process_ip"] is None or plan.lacks_rank):
        raise ValueError(
            f"num_machines is {machines}: every machine needs --main_process_ip (the address of the first one) and its own "
            "--machine_rank, 0 on the first one, 1 on the second …"
        )
    if plan.kind == "deepspeed" or fields.get("deepspeed"):
        check_deepspeed_installed("accelerate_config" if plan.file_name else "deepspeed")
    version = plan.options.fsdp_version
    version = plan.file.get("fsdp_config", {}).get("fsdp_version", 1) if version in (None, "1", 1) else version
    if plan.kind == "fsdp" and str(version) != "2":
        raise ValueError(
            "fsdp_version is 1: Atlas serves FSDP2. Set fsdp_version: 2 in fsdp_config, or choose fsdp2 or zero3"
        )
    check_batch(fields, processes)


def check_batch(fields: dict[str, Any], num_processes: int) -> None:
    """TRL's own rule; TRL says it with names that nobody has set, once per process."""
    names = ("per_device_train_batch_size", "num_generations")
    if fields.get("generation_batch_size") is not None or not all(isinstance(fields.get(name), int) for name in names):
        return
    rows, samples = (fields[name] for name in names)
    if samples < 1:
        return
    steps = fields.get("steps_per_generation") or fields.get("gradient_accumulation_steps") or 1
    if (rows * num_processes * int(steps)) % samples:
        raise ValueError(
            f"per_device_train_batch_size {rows} x {num_processes} process{'es' * (num_processes > 1)} x {steps} "
            f"step{'s' * (steps > 1)} per generation must be divisible by num_generations ({samples}), so that every prompt gets "
            "all of its completions: change one of them, or set steps_per_generation"
        )


def check_deepspeed_installed(field: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"{field}: DeepSpeed is not installed: pip install 'atlas-rl[deepspeed]'")


def accelerate_flags(plan: Launch, fields: dict[str, Any]) -> list[str]:
    """Of the plan, with what accelerate would get wrong or ask for."""
    flags, num_processes = list(plan.flags), plan.num_processes
    if plan.options.num_processes is None:
        flags += ["--num_processes", str(num_processes)]
    if plan.kind == "plain" and plan.uses_cpu(fields) and num_processes > 1:
        # by itself accelerate would start one process, or look for MPI
        flags = [flag for flag in flags if flag not in ("--cpu", "--multi_gpu")] + ["--multi_gpu"]
    if plan.num_machines > 1:
        is_named = plan.options.deepspeed_multinode_launcher is not None
        if plan.kind == "deepspeed" and not (is_named or plan.starts_other_machines):  # by default it is pdsh
            flags += ["--deepspeed_multinode_launcher", "standard"]
    elif plan["main_process_port"] is None:  # other runs of this machine have theirs
        flags += ["--main_process_port", str(_free_port())]
    return flags


def find_accelerate_config(name: str) -> tuple[str, bool]:
    """The path of a file, or of one of TRL's presets or of ours; and whether it is a preset of TRL's."""
    presets = {path.stem: path for path in sorted((Path(_trl_folder()) / "accelerate_configs").glob("*.yaml"))}
    if Path(name).is_file():
        return name, False
    if name in presets:
        return str(presets[name]), True
    ours = shipped_configs("accelerate")
    if name in ours:
        return str(ours[name]), False
    names = [*presets, *ours]
    if Path(name).suffix or os.sep in name:
        raise ValueError(
            f"accelerate_config: the file {name} does not exist: check the path, or give one of {', '.join(names)}"
        )
    raise ValueError(
        f"accelerate_config: {name!r} is no file and no known name{did_you_mean(name, names)} "
        f"(names: {', '.join(names)})"
    )


def read_config(options: Any) -> dict[str, Any]:
    """The accelerate config that these options lead to, if any, as accelerate itself reads it."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    path = options.config_file or (default_config_file if os.path.isfile(default_config_file) else None)
    if path is None:
        return {}
    try:
        values = read_yaml(path)
        load_config_from_file(path)
    except (ValueError, TypeError) as error:  # TypeError: a field that its dataclass lacks
        raise ValueError(f"accelerate_config: {error} (in {path})") from None
    return {name: {} if value is None and name.endswith("_config") else value for name, value in values.items()}


def num_accelerators() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def _trl_folder() -> str:
    return importlib.util.find_spec("trl").submodule_search_locations[0]


def _parse(flags: list[str], script: list[str]) -> Any:
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.error = raise_value_error
    return parser.parse_args([*flags, "--module", "atlas_rl", *script])


def _one_word_each(flags: list[str]) -> list[str]:
    """`--name=value` as two words."""
    return [word for flag in flags for word in (flag.split("=", 1) if flag.startswith("--") else [flag])]


def raise_value_error(message: str) -> NoReturn:
    raise ValueError(message)
