"""Linears in forms that decode faster than `nn.Linear`: copies or views of the trainer's weights, refreshed at policy updates."""

from __future__ import annotations

import torch
from torch import nn

from atlas_kernels import cpu

SMALL_PRODUCT = 2**18
"""Multiply-adds up to which `F.linear` is faster: a call of the packed product costs about 13 µs whatever its size."""
FEW_ROWS = 4
SMALL_WEIGHT = 2**18
"""A weight of up to this many elements is read in place for up to FEW_ROWS rows, a larger one for one row only."""


def share(module: nn.Module, **tensors: torch.Tensor | None) -> None:
    """Set tensors that belong to another module. Past nn.Module's registry, they are also found five times faster."""
    vars(module).update(tensors)


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear  # a subclass may compute something else


class PackedLinear(nn.Module):
    """One or several float32 Linears over the same input as one product, on CPU: outputs side by side.

    For more than a few rows the weights are packed for oneDNN, which is 1.5–2.5 times faster than `F.linear` up to 16 rows; for
    fewer they are read where they are.
    """

    def __init__(self, *sources: nn.Linear) -> None:
        super().__init__()
        self.sources = sources  # a tuple: modules of the twin, not children of this one
        self.in_features = sources[0].in_features
        self.num_weights = sum(source.weight.numel() for source in sources)
        self.refresh()

    def refresh(self) -> None:
        weights = [source.weight.detach() for source in self.sources]
        biases = [None if source.bias is None else source.bias.detach() for source in self.sources]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = biases[0]
        if len(biases) > 1 and any(bias is not None for bias in biases):
            pairs = zip(biases, weights, strict=True)
            self.bias = torch.cat([w.new_zeros(len(w)) if b is None else b for b, w in pairs])
        self.small = None
        if cpu.unavailable_reason() is None and all(map(cpu.SmallLinear.fits, weights)):
            self.small = cpu.SmallLinear(weights, biases)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[…, in_features] -> […, sum of out_features], plus a residual of the result's shape."""
        num_rows = x.numel() // self.in_features
        if self.small is not None and x.dtype == torch.float32:
            if num_rows == 1 or (num_rows <= FEW_ROWS and self.num_weights <= SMALL_WEIGHT):
                out = self.small(x.reshape(num_rows, -1).contiguous(), residual)
                return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)
        elif num_rows * self.num_weights <= SMALL_PRODUCT and len(self.sources) == 1 and residual is None:
            return torch._C._nn.linear(x, self.sources[0].weight, self.bias)
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")

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
