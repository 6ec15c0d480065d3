"""Linears in forms that decode faster than `nn.Linear`: copies or views of the trainer's weights, refreshed at policy updates."""

from __future__ import annotations

import torch
from torch import nn

from atlas_kernels import cpu, fused_linear


def share(module: nn.Module, **tensors: torch.Tensor | None) -> None:
    """Set tensors that belong to another module. Past nn.Module's registry, they are also found five times faster."""
    vars(module).update(tensors)


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear  # a subclass may compute something else


class PackedLinear(nn.Module):
    """One or several float32 Linears over the same input as one product, on CPU: outputs side by side.

    Against oneDNN's packed product, weights of 0.06 to 2 million elements, 2 threads: 1.3 to 3 times as fast at 5 to 16 rows, as
    fast from about a hundred on.
    """

    def __init__(self, *sources: nn.Linear) -> None:
        super().__init__()
        self.sources = sources  # a tuple: modules of the twin, not children of this one
        self.in_features = sources[0].in_features
        self.num_weights = sum(source.weight.numel() for source in sources)
        self.packed = cpu.PackedWeight(*self._of_sources())

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module can be packed on this machine."""
        return is_linear(module) and module.weight.dtype == torch.float32 and cpu.unavailable_reason() is None

    def refresh(self) -> None:
        self.packed.pack(*self._of_sources())

    def _of_sources(self) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        biases = [None if source.bias is None else source.bias.detach() for source in self.sources]
        return [source.weight.detach() for source in self.sources], biases

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[…, in_features] -> […, sum of out_features], plus a residual of the result's shape."""
        if x.dim() == 2:
            return self.packed(x, residual)
        return self.packed(x.reshape(-1, self.in_features), residual).view(*x.shape[:-1], -1)

    __call__ = forward  # a twin has no hooks, and nn.Module's own __call__ takes as long as a small product


class CastLinear(nn.Module):
    """A Linear whose weight is kept in the autocast dtype: what autocast computes, without casting the weight at every step."""

    def __init__(self, source: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.source = (source,)
        self.weight = source.weight.detach().to(dtype)
        self.bias = None if source.bias is None else source.bias.detach().to(dtype)

    def refresh(self) -> None:
        (source,) = self.source
        self.weight.copy_(source.weight)
        if self.bias is not None:
            self.bias.copy_(source.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class DeviceLinear(nn.Module):
    """A Linear on an accelerator by whichever kernel reads its weight fastest: the weight is its source's own."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        return fused_linear(x_ND, [self.source.weight], [self.source.bias])
