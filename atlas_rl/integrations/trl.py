"""The seams of TRL's (and any transformers) trainer: the instance attribute `generate`, and `Trainer.log`.

Every in-process online trainer of TRL ends in one call, `model.generate(input_ids=…, attention_mask=…, generation_config=…)`, on
the unwrapped model. An instance attribute of that name is what it finds (transformers itself installs custom generation so).
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

GenerateFn = Callable[..., Any]


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers of DDP, torch.compile or PEFT."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            model = inner
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            break
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"attach() takes a trainer or a transformers model, got {type(model).__name__}")
    return model


class GenerateHook:
    """Stands in for `model.generate` of one model. A deep copy of the model gets its class' own `generate` back."""

    def __init__(self, model: PreTrainedModel, serve: Callable[..., Any]) -> None:
        self.model = weakref.ref(model)
        self.own_attribute = vars(model).get("generate")
        """What the instance carried before, if anything."""
        self.original: GenerateFn = model.generate
        self.serve: Callable[..., Any] | None = serve
        model.generate = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A hook that was restored, and is still called because a later one lies on top of it, passes through."""
        return (self.serve or self.original)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> GenerateFn:
        return _class_generate(memo[id(self.model())])

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled model finds its class' own `generate` as well."""
        return _class_generate, (self.model(),)

    @property
    def is_installed(self) -> bool:
        model = self.model()
        return model is not None and vars(model).get("generate") is self

    def restore(self) -> None:
        model, self.serve = self.model(), None
        if not self.is_installed:
            return
        if self.own_attribute is None:
            del model.generate
        else:
            model.generate = self.own_attribute


def _class_generate(model: PreTrainedModel) -> GenerateFn:
    return types.MethodType(type(model).generate, model)


def bypass(args: Any | None) -> str | None:
    """The option by which a trainer's rollouts go past `model.generate`, if it is on."""
    names = ("use_vllm", "use_transformers_continuous_batching")
    return next((name for name in names if getattr(args, name, False)), None)


def calls_are_equal(args: Any | None) -> bool:
    """Whether a trainer's ranks all generate at the same steps: where `lmbda` is a chance, each may draw for itself."""
    return not 0 < getattr(args, "lmbda", 1.0) < 1


class GatheringOption:
    """`ds3_gather_for_generation` of a trainer's arguments: off until `restore`, as Atlas gathers what it needs itself.

    TRL would hold all of a ZeRO-3 policy in memory around each call, and gathering again within that is an error.
    """

    def __init__(self, args: Any | None) -> None:
        self.args = args if getattr(args, "ds3_gather_for_generation", False) else None
        if self.args is not None:
            self.args.ds3_gather_for_generation = False

    def restore(self) -> None:
        if self.args is not None:
            self.args.ds3_gather_for_generation = True
            self.args = None


class CheckpointingFlags:
    """Which modules recompute their activations, and how.

    TRL switches this off around `generate`, and does not switch it on again after an exception; transformers' own switch would
    add another hook to the embeddings each time.
    """

    NAMES = ("gradient_checkpointing", "_gradient_checkpointing_func")

    def __init__(self, model: nn.Module) -> None:
        self.saved = [
            (module, {name: getattr(module, name) for name in self.NAMES if hasattr(module, name)})
            for module in model.modules()
            if getattr(module, "gradient_checkpointing", False)
        ]

    def restore(self) -> None:
        for module, values in self.saved:
            vars(module).update(values)


def autocast_dtype(model: PreTrainedModel, wrapper: nn.Module, args: Any | None) -> torch.dtype | None:
    """The dtype that the trainer's forward autocasts to: accelerate wraps `forward` under mixed precision, or a context is on.

    Args:
        wrapper: what the trainer holds: the model, or what has it inside. Accelerate may have wrapped either.
    """
    if args is not None and any("_original_forward" in vars(module) for module in (model, wrapper)):
        # the launcher's config may ask for it where the trainer's flags do not; older transformers have the flags alone
        precision = getattr(args, "mixed_precision", "bf16" if args.bf16 else "fp16" if args.fp16 else "no")
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    device_type = model.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


class LogHook:
    """Wraps `Trainer.log` at class level, once for all, so that our metrics are in `logs` before history and reporters see them.

    (Changing `logs` in a callback's `on_log` reaches neither.) Sources are callbacks of the trainer with a method `pop_metrics`,
    and one `record_metrics`, that is told what the trainer itself logs.
    """

    original: Callable[..., None] | None = None
    installed: Callable[..., None] | None = None
    num_users = 0

    @classmethod
    def acquire(cls) -> None:
        cls.num_users += 1
        if cls.original is not None:
            return
        cls.original = original = Trainer.log

        def log(self: Trainer, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            phase = "train" if self.model.training else "eval"
            merged = logs
            for callback in self.callback_handler.callbacks:
                if hasattr(callback, "record_metrics"):
                    merged = merged | callback.pop_metrics(phase)
                    callback.record_metrics(phase, logs)
            original(self, merged, *args, **kwargs)

        log.__doc__ = original.__doc__
        cls.installed = Trainer.log = log

    @classmethod
    def release(cls) -> None:
        cls.num_users -= 1
        if cls.num_users == 0 and Trainer.log is cls.installed:  # another library's wrapper on top of ours stays
            Trainer.log = cls.original
            cls.original = cls.installed = None
