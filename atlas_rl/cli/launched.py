"""In a process that `accelerate launch`, torchrun or srun has started: what it needs where there is no accelerator.

On such a machine accelerate takes every process for the only one, unless it is told a backend; under DeepSpeed it must not be
told to use the CPU (that would switch DeepSpeed off); and FSDP it offers to accelerators alone. `join` sets all that.
"""

from __future__ import annotations

import atexit
import os
import sys
from datetime import timedelta
from typing import Any

from atlas_rl.cli import launching
from atlas_rl.cli.launching import check_batch, check_deepspeed_installed, is_true


def is_launched() -> bool:
    return "LOCAL_RANK" in os.environ


def check_not_launched(launch_flags: list[str]) -> None:
    if is_launched():
        raise ValueError(
            f"{launch_flags[0].lstrip('-')} is for `accelerate launch`, but this process was started by a launcher already "
            "(torchrun?): leave it out, or start with `atlas-rl train`"
        )


def check_process(fields: dict[str, Any]) -> None:
    """Before this process, launched or not, builds the trainer's config."""
    check_batch(fields, int(os.environ.get("WORLD_SIZE", "1")))
    if fields.get("deepspeed"):
        check_deepspeed_installed("deepspeed")
    for field in ("deepspeed", "fsdp"):
        if fields.get(field) and not is_launched():
            raise ValueError(
                f"{field}: it needs processes that a launcher starts: add --num_processes 2 (or more), or use torchrun"
            )


def join(fields: dict[str, Any]) -> list[str]:
    """Before a launched process builds the trainer's config: flags to set over `fields`, so that it runs without accelerators."""
    if not is_launched():
        return []
    uses_deepspeed = _uses_deepspeed(fields)
    uses_fsdp = not uses_deepspeed and (bool(fields.get("fsdp")) or is_true(os.environ.get("ACCELERATE_USE_FSDP")))
    if launching.num_accelerators():
        if uses_deepspeed and is_true(fields.get("use_cpu")):
            raise ValueError("use_cpu: true switches DeepSpeed off: leave it out, or run without DeepSpeed")
        return []
    if not (uses_deepspeed or uses_fsdp):
        _say("DDP over gloo (use_cpu: true, ddp_backend: gloo)")
        return ["--use_cpu", "true", "--ddp_backend", "gloo"]
    if fields.get("accelerator_config"):
        raise ValueError(
            "accelerator_config: leave it out on a machine without accelerators, where Atlas has to set it"
        )
    timeout = timedelta(seconds=int(fields.get("ddp_timeout") or 1800))
    configured = ["--accelerator_config", '{"use_configured_state": true}']
    if uses_fsdp:
        _join_fsdp(timeout)
        _say("FSDP over gloo (use_cpu: true)")
        return [*configured, "--use_cpu", "true"]
    if is_true(fields.get("bf16")):
        raise ValueError("bf16: the trainer refuses it under DeepSpeed without an accelerator: set bf16: false")
    _join_deepspeed(timeout)
    _say("DeepSpeed over gloo, in float32 (use_cpu: false, bf16: false)")
    return [*configured, "--use_cpu", "false", "--bf16", "false"]


def leave() -> None:
    """When a launched process has done everything: gloo (with DeepSpeed often, with DDP rarely) aborts an interpreter that ends,
    with or without Atlas, and a finished run would count as failed. Exit functions are not what aborts, and some finish a run
    (wandb's)."""
    if is_launched() and not launching.num_accelerators():
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(0)


def _uses_deepspeed(fields: dict[str, Any]) -> bool:
    return bool(fields.get("deepspeed")) or is_true(os.environ.get("ACCELERATE_USE_DEEPSPEED"))


def _join_deepspeed(timeout: timedelta) -> None:
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    PartialState(backend="gloo", timeout=timeout)


def _join_fsdp(timeout: timedelta) -> None:
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True, timeout=timeout)
    PartialState._shared_state["distributed_type"] = (
        DistributedType.MULTI_GPU
    )  # all that accelerate asks before it shards


def _say(what: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        num = os.environ.get("WORLD_SIZE", "1")
        print(f"No accelerator here: {num} process{'es' * (num != '1')} on the CPU, {what}", file=sys.stderr)
