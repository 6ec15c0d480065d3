"""Parameters that are spread over ranks, by DeepSpeed's ZeRO-3 or torch's FSDP2, and how they are made whole for a moment.

ZeRO-3 leaves a module's parameters in place and empties them (`ds_status`, `ds_shape`); FSDP2 replaces them by DTensors and swaps
the module's class for a subclass. Both gather a module's parameters around its forward; here they are gathered to be read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from atlas_rl.engine.twin import UnsupportedModel


def is_sharded(parameter: torch.Tensor) -> bool:
    return _is_zero3(parameter) or isinstance(parameter, DTensor)


def full_shape(parameter: torch.Tensor) -> torch.Size:
    return torch.Size(parameter.ds_shape) if _is_zero3(parameter) else parameter.shape


def compute_device(parameter: torch.Tensor) -> torch.device:
    """Where a forward has the parameter: its parts may be kept in the host's memory."""
    if isinstance(parameter, DTensor):
        return torch.empty(0, device=parameter.device_mesh.device_type).device  # this rank's one of several
    if _is_zero3(parameter):
        from deepspeed.accelerator import get_accelerator

        return torch.device(get_accelerator().current_device_name())
    return parameter.device


def compute_dtypes(model: nn.Module) -> dict[int, torch.dtype]:
    """By id of the parameter, the dtype that FSDP2's forward casts it to; only parameters that it casts.

    A `MixedPrecisionPolicy` casts every floating-point parameter of its modules, norms and embeddings too, before the forward
    sees them. (ZeRO-3's parameters are in the compute dtype already, and autocast leaves parameters alone.)
    """
    dtypes: dict[int, torch.dtype] = {}

    def visit(module: nn.Module, cast: torch.dtype | None) -> None:
        if isinstance(module, FSDPModule):
            cast = module._get_fsdp_state()._mp_policy.param_dtype
        for parameter in module._parameters.values():
            if cast is not None and isinstance(parameter, DTensor) and parameter.is_floating_point():
                dtypes.setdefault(id(parameter), cast)
        for child in module.children():
            visit(child, cast)

    # parameters outside of all these modules are the root's, which may be a wrapper around the model
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    visit(model, states[0]._mp_policy.param_dtype if states else None)
    return dtypes


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that FSDP2 has swapped for one of its own."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def refuse_other_shards(model: nn.Module) -> None:
    """FSDP1 concatenates the parameters of a module, with nothing left to gather one by one. Ranks that are tensor-parallel work
    on the same prompts, where ours would each sample completions of their own.

    Raises:
        UnsupportedModel
    """
    is_managed = any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules())
    is_fsdp2 = any(isinstance(module, FSDPModule) for module in model.modules())
    if is_managed and not is_fsdp2 and not any(isinstance(p, DTensor) for p in model.parameters()):
        raise UnsupportedModel("FSDP1 has flattened its parameters: set fsdp_version: 2 in the accelerate config")
    meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
    if any("tp" in (mesh.mesh_dim_names or ()) for mesh in meshes):
        raise UnsupportedModel("it is tensor-parallel")


def show_shards(model: nn.Module) -> None:
    """Have FSDP2's modules hold their sharded parameters: a forward without backward leaves the last ones whole.

    The next forward gathers them, so that all ranks have to do this, or none.

    Raises:
        UnsupportedModel: within the forward of one of them.
    """
    root = next((module for module in model.modules() if isinstance(module, FSDPModule)), None)
    if root is None:
        return
    # none before the first forward; those of wrappers around `model` are among them
    states = root._get_fsdp_state()._state_ctx.all_states
    states = states or [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]
    for state in states:
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch 2.11 has one
        if any(group is not None and group._training_state.name == "FORWARD" for group in groups):
            raise UnsupportedModel("it is called within FSDP2's own forward, where parameters are whole for a moment")
        state._modules[0].reshard()


def needs_gathering(parameter: torch.Tensor) -> bool:
    """ZeRO-3 keeps small parameters whole, and a trainer may have gathered all of them around the call."""
    return isinstance(parameter, DTensor) or (_is_zero3(parameter) and parameter.ds_status.name != "AVAILABLE")


@contextlib.contextmanager
def gathered(parameters: Sequence[torch.Tensor]) -> Iterator[dict[int, torch.Tensor]]:
    """The full values of distinct parameters, by id, to be read within this context. Collective where any of them needs it.

    What is whole already is not gathered again: DeepSpeed refuses contexts that overlap.
    """
    emptied = [p for p in parameters if _is_zero3(p) and needs_gathering(p)]
    with _zero3_context(emptied):
        yield {id(p): _on_mesh(p).full_tensor() if isinstance(p, DTensor) else p.detach() for p in parameters}


def _zero3_context(parameters: list[torch.Tensor]) -> contextlib.AbstractContextManager:
    if not parameters:
        return contextlib.nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(parameters, modifier_rank=None)


def _is_zero3(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def _on_mesh(parameter: DTensor) -> DTensor:
    """On the device that the mesh communicates on: offloaded parts are not."""
    parameter = parameter.detach()
    device_type = parameter.device_mesh.device_type
    return parameter if parameter.device.type == device_type else parameter.to(device_type)
