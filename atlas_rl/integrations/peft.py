"""Models with PEFT's adapters: what stands for which plain module, and what a layer's weights are with its adapters merged.

PEFT puts a tuner layer in the place of a module and the module inside of it. Its `merge` writes into the base weights, which are
the trainer's; here it runs on a detached clone of the layer instead, and so whatever PEFT can merge, we can.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from atlas_rl.engine.twin import UnsupportedModel
from atlas_rl.integrations.distributed import full_shape, plain_class


@dataclass(frozen=True)
class Place:
    """What a model has where its config describes a plain module."""

    module: nn.Module
    """The plain module, which may lie within wrappers."""
    tuner: nn.Module | None = None
    """The tuner layer around it, if there is one."""


def plain_modules(model: nn.Module) -> dict[str, Place]:
    """By the names that modules have without adapters."""
    places: dict[str, Place] = {}
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in seen:  # as nn.Module.named_modules has it
            return
        seen.add(id(module))
        place = places[name] = _place_of(module)
        for child_name, child in place.module.named_children():
            visit(f"{name}.{child_name}".lstrip("."), child)

    visit("", model)
    return places


def _place_of(module: nn.Module) -> Place:
    if "peft" not in sys.modules:  # an optional dependency, and slow to import
        return Place(module)
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, TrainableTokensWrapper):
        module = module.token_adapter
    while isinstance(module, ModulesToSaveWrapper):
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        in_use = bool(active) and not module.disable_adapters
        module = module.modules_to_save[active[0]] if in_use else module.original_module
    if isinstance(module, BaseTunerLayer):
        return Place(module.get_base_layer(), module)
    return Place(module)


def check_mergeable(name: str, tuner: nn.Module) -> None:
    """Try it without values; a method that cannot do without them is tried on zeros.

    Raises:
        UnsupportedModel
    """
    if any("forward" in vars(module) for module in tuner_chain(tuner)):
        raise UnsupportedModel(f"something has replaced the forward of its adapter on {name}")
    for device in ("meta", "cpu"):
        values = {id(p): torch.zeros(full_shape(p), dtype=p.dtype, device=device) for p in tuner.parameters()}
        try:
            _merge(tuner, values, tried=True)
            return
        except Exception as error:  # every method has its own
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    raise UnsupportedModel(f"its adapter on {name} cannot be merged ({reason})")


@torch.no_grad()
def merged_parameters(tuner: nn.Module, values: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The plain module's parameters, by name, as the layer's forward uses them: with its active adapters, if they are enabled.

    Args:
        values: of all parameters of the layer, by id; they are only read.
    """
    return _merge(tuner, values)


def adapter_state(tuner: nn.Module) -> tuple[Any, ...]:
    """What says, next to its parameters, what the layer computes."""
    return tuple(
        (
            tuple(layer.active_adapters),
            tuple(layer.merged_adapters),
            layer.disable_adapters,
            str(vars(layer).get("scaling")),
        )
        for layer in tuner_chain(tuner)
    )


def tuner_chain(tuner: nn.Module) -> list[nn.Module]:
    """A tuner layer and those within it, from the outermost on."""
    chain = [tuner]
    while hasattr(chain[-1].base_layer, "base_layer"):
        chain.append(chain[-1].base_layer)
    return chain


def _merge(tuner: nn.Module, values: Mapping[int, torch.Tensor], tried: bool = False) -> dict[str, torch.Tensor]:
    written = {id(p) for p in tuner.get_base_layer().parameters()}
    layer = _detached(tuner, {key: value.clone() if key in written else value for key, value in values.items()})
    for step in reversed(tuner_chain(layer)):
        if tried:
            step._disable_adapters, step.merged_adapters = False, []
        if step.disable_adapters:
            if step.merged:
                step.unmerge()
        elif not step.merged:
            step.merge()
    return {name: p for name, p in layer.get_base_layer()._parameters.items() if p is not None}


def _detached(module: nn.Module, values: Mapping[int, torch.Tensor]) -> nn.Module:
    """A clone in eval mode, without hooks, whose parameters are these values, and which can be changed without the original
    noticing."""
    clone = object.__new__(plain_class(module))
    for key, value in vars(module).items():
        if "_hooks" in key:
            value = type(value)()
        elif type(value) in (dict, list):
            value = value.copy()
        vars(clone)[key] = value
    clone.training = False
    clone._parameters = {
        name: None if p is None else nn.Parameter(values[id(p)], requires_grad=False)
        for name, p in module._parameters.items()
    }
    device = next(iter(values.values())).device  # not the buffers' own where a merge is only tried
    clone._buffers = {name: None if b is None else b.to(device) for name, b in module._buffers.items()}
    clone._modules = {
        name: None if child is None else _detached(child, values) for name, child in module._modules.items()
    }
    return clone
