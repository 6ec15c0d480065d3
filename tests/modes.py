"""How a training process enters each way of distributing a model, on CPU over gloo, where the libraries would rather have a GPU.

Names are `ddp`, `zero1` to `zero3`, `fsdp2`; with `_lora`, adapters are trained in place of the model.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType


def enter(mode: str, timeout: float = 60) -> dict[str, Any]:
    """Join the other processes, within `timeout` seconds as for every collective; returns options of the trainer's config."""
    name = mode.removesuffix("_lora")
    configured = {"accelerator_config": {"use_configured_state": True}}
    if name == "ddp":
        return {"ddp_timeout": int(timeout)}
    if name == "fsdp2":
        PartialState(cpu=True, timeout=timedelta(seconds=timeout))
        # accelerate offers FSDP to accelerators only; nothing below that check asks for one
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return configured | {
            "fsdp": True,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
        }
    leave_out_shared_memory_ops()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(
        backend="gloo", timeout=timedelta(seconds=timeout)
    )  # without a backend's name it takes itself to be alone
    return configured | {"deepspeed": deepspeed_config(int(name.removeprefix("zero"))), "use_cpu": False}


def deepspeed_config(stage: int) -> dict[str, Any]:
    automatic = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    zero = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # all of a tiny policy would stay gathered
    return dict.fromkeys(automatic, "auto") | {"zero_optimization": zero, "zero_allow_untested_optimizer": True}


def leave_out_shared_memory_ops() -> None:
    """DeepSpeed would compile an op for ranks of one machine, for a minute, whose work gloo does as well."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
