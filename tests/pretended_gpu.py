"""A GPU that is only pretended: tensors that say they lie on one, and hold CPU memory.

What mixes devices fails as it would on a GPU, also where an index or a mask is on another device, and so does `.numpy()` without
`.cpu()`; code for GPUs runs. Kernels are not pretended: ops run on their torch twins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import atlas_kernels

GPU = torch.device("cuda", 0)
MOVES = ("to", "copy_", "cpu", "cuda", "pin_memory", "__getitem__", "__setitem__")
"""What takes tensors of both devices; an index on the CPU is copied."""
APPLY = torch.autograd.Function.apply.__func__


class GPUTensor(torch.Tensor):
    """Says that it lies on the GPU; `held` has its values."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> GPUTensor:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=GPU)

    def __init__(self, inner: torch.Tensor) -> None:
        self.held = inner

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} past torch's functions: nothing here knows its values")


def run(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A function of torch, on the device that its arguments say; they have to agree."""
    name = _name(func)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [isinstance(tensor, GPUTensor) for tensor in tensors]
    if name == "device" and any(on_gpu):
        return GPU
    if name in ("is_cuda", "is_cpu") and any(on_gpu):
        return name == "is_cuda"
    if name in ("numpy", "__array__") and any(on_gpu):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
    if any(on_gpu) and name not in MOVES:
        lost = [t for t, is_there in zip(tensors, on_gpu, strict=True) if not is_there and t.dim() > 0]
        assert not lost, f"{name}: tensors of shapes {[tuple(t.shape) for t in lost]} are on the CPU, others on the GPU"
    target = any(on_gpu) and name != "cpu"
    if name == "copy_":
        target = on_gpu[0]
    args, kwargs, device = _without_device(args, kwargs)
    if device is not None:
        target = device.type == "cuda"
    inner_args, inner_kwargs = pytree.tree_map_only(GPUTensor, lambda tensor: tensor.held, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if target != any(on_gpu) and name == "to":  # another device has memory of its own
        out = out.clone()
    known = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, GPUTensor)}

    def wrapped(tensor: torch.Tensor) -> torch.Tensor:
        return known.get(id(tensor)) if id(tensor) in known else GPUTensor(tensor)

    return pytree.tree_map_only(torch.Tensor, wrapped, out) if target else out


def _name(func: Callable) -> str:
    name = getattr(func, "__name__", str(func))
    return func.__self__.__name__ if name in ("__get__", "__set__") else name


def _without_device(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any], torch.device | None]:
    """The arguments as if all were on the CPU, and the device that they ask for."""

    def as_device(value: Any, is_named: bool) -> torch.device | None:
        if isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda") or is_named and value is not None:
            value = torch.device(value)
        return value if isinstance(value, torch.device) else None

    places = {i: as_device(a, False) for i, a in enumerate(args)} | {
        k: as_device(v, k == "device") for k, v in kwargs.items()
    }
    asked = {place: device for place, device in places.items() if device is not None}
    if not asked or "meta" in {device.type for device in asked.values()}:
        return args, kwargs, None
    cpu = torch.device("cpu")
    args = tuple(cpu if i in asked else a for i, a in enumerate(args))
    return args, {k: cpu if k in asked else v for k, v in kwargs.items()}, next(iter(asked.values()))


class PretendedGPU(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


@contextlib.contextmanager
def pretended_gpu(monkeypatch):
    """Within it there is a GPU of 80 GiB. Yields it."""
    properties = MagicMock(total_memory=80 * 2**30, multi_processor_count=132, L2_cache_size=2**25)
    for name, value in {
        "mem_get_info": lambda device=None: (60 * 2**30, 80 * 2**30),
        "memory_reserved": lambda device=None: 2**30,
        "memory_allocated": lambda device=None: 2**30,
        "get_device_properties": lambda device=None: properties,
        "current_stream": lambda device=None: MagicMock(),
        "empty_cache": lambda: None,
        "device": lambda device: contextlib.nullcontext(),
        "is_bf16_supported": lambda: False,
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *args: self)
    monkeypatch.setattr(nn.Module, "to", _module_to)
    monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(_apply))
    monkeypatch.setattr(atlas_kernels, "unavailable_reason", lambda device: "there is no GPU")
    with PretendedGPU():
        yield GPU


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """A function with a gradient of its own, which torch's other functions are not asked for."""
    held = [arg.held if isinstance(arg, GPUTensor) else arg for arg in args]
    is_there = any(isinstance(arg, GPUTensor) for arg in args)
    out = APPLY(function, *held)
    return pytree.tree_map_only(torch.Tensor, GPUTensor, out) if is_there else out


def _module_to(module: nn.Module, *args: Any) -> nn.Module:
    for dtype in [a for a in args if isinstance(a, torch.dtype)]:
        module = module._apply(lambda tensor, dtype=dtype: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return to_gpu(module) if any(isinstance(a, torch.device) and a.type == "cuda" for a in args) else module


def to_gpu(model: nn.Module) -> nn.Module:
    """The same module, its parameters and buffers on the pretended GPU."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and not isinstance(tensor, GPUTensor):
                wrapped = nn.Parameter(GPUTensor(tensor.detach()), requires_grad=False)
                module._parameters[name] = moved.setdefault(id(tensor), wrapped)
        for tensors in (module._buffers, vars(module)):
            on_cpu = {n: t for n, t in tensors.items() if isinstance(t, torch.Tensor) and not isinstance(t, GPUTensor)}
            tensors.update({name: GPUTensor(tensor) for name, tensor in on_cpu.items()})
    return model
