"""Linears over few rows: bound by reading the weights once, with what stands before and after them in the same kernel.

Shapes: N rows, D features, O outputs, I intermediate size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton

from atlas_kernels import reference
from atlas_kernels.launching import INTERPRETED, num_multiprocessors
from atlas_kernels.linear_kernels import combine_kernel, linear_kernel, rms_norm_kernel, silu_mul_kernel, vector_kernel
from atlas_kernels.routes import TOLERANCE, Routes

MAX_ROWS = 64
"""More are cuBLAS' business."""
GATE_BLOCK, COMBINE_BLOCK_O = 1024, 64
SHARED_BYTES = 144 * 1024
"""Of a multiprocessor, for the buffers of all the programs that it runs at a time."""


@dataclass(frozen=True)
class Layout:
    """What a tiling depends on. Sizes, and bytes of an element."""

    num_rows: int
    widths: tuple[int, ...]
    size: int
    gated: bool
    norm: bool
    x_bytes: int
    weight_bytes: int

    def num_tiles(self, block_o: int) -> int:
        return sum(triton.cdiv(width, block_o) for width in self.widths[: 1 if self.gated else None])


@dataclass(frozen=True)
class Tiling:
    """Constants of `linear_kernel`, or of `vector_kernel` (block_n = 1)."""

    block_n: int
    block_o: int
    block_d: int
    num_warps: int
    num_stages: int = 1
    split_d: int = 1

    def __str__(self) -> str:
        shape = f"{self.block_n}x{self.block_o}x{self.block_d}, {self.num_warps} warps, {self.num_stages} stages"
        return shape + (f", D in {self.split_d}" if self.split_d > 1 else "")


def fuses_norm(num_rows: int, weight_dtype: torch.dtype) -> bool:
    """Whether the kernel norms: not where x · norm, as yet unscaled, may overflow, nor where the rows take all registers."""
    return num_rows <= 32 and weight_dtype != torch.float16


@functools.lru_cache(1024)
def tilings(layout: Layout, num_multiprocessors: int) -> tuple[Tiling, ...]:
    """Those worth measuring: a program for every multiprocessor, bytes enough in flight on each, no register spilled."""
    if layout.num_rows == 1:
        columns, block_d = 2 if layout.gated else 4, min(2048, max(256, triton.next_power_of_2(layout.size)))
        shapes = [(columns, block_d), (columns, max(256, block_d // 2)), (columns // 2, block_d)]
        return tuple(Tiling(1, *shape, num_warps=4) for shape in dict.fromkeys(shapes))
    block_n = max(16, triton.next_power_of_2(layout.num_rows))
    if layout.weight_bytes == 4:
        return (Tiling(16, 16, 64, 4, 3),) if block_n == 16 else ()
    found, products = [], 2 if layout.gated else 1
    for block_o in (16, 32, 64):
        num_tiles, split_d = layout.num_tiles(block_o), 1
        if block_o > (32 if layout.norm else 64) or block_n * block_o * products > (1024 if layout.norm else 2048):
            continue  # more sums than registers
        narrow = block_o * products == 16 and not (layout.norm and layout.x_bytes == 4)
        num_warps, part = (4, 128 if block_n == 16 else 64) if narrow or block_n > 16 else (2, 64)
        part = min(part, max(16, triton.next_power_of_2(triton.cdiv(layout.size, num_warps))))
        block_d = part * num_warps
        if not (layout.norm or layout.gated):  # a program's share of D is two blocks at least
            most = min(8, layout.size // (2 * block_d), 2 * num_multiprocessors // num_tiles)
            split_d = 1 << max(0, most.bit_length() - 1)
        splits = [1] if not found or num_tiles >= 0.9 * num_multiprocessors else []
        for split in splits + ([split_d] if split_d > 1 else []):
            resident = min(3, triton.cdiv(num_tiles * split, num_multiprocessors))
            stage_bytes = (block_n * layout.x_bytes + products * block_o * layout.weight_bytes) * block_d
            num_stages = min(6, max(3, 1 + SHARED_BYTES // resident // stage_bytes))
            found.append(Tiling(block_n, block_o, block_d, num_warps, num_stages, split))
    return tuple(found)


@dataclass(frozen=True)
class Call:
    """Arguments of `fused_linear`."""

    x_ND: torch.Tensor
    weights: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    norm_D: torch.Tensor | None
    eps: float
    residual_NO: torch.Tensor | None
    gated: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].dtype

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(map(len, self.weights))

    @property
    def num_columns(self) -> int:
        """Of the output."""
        return self.widths[0] if self.gated else sum(self.widths)

    def layout(self) -> Layout:
        num_rows, size = self.x_ND.shape
        norm = self.norm_D is not None and fuses_norm(num_rows, self.dtype)
        x_dtype = self.x_ND.dtype if norm or self.norm_D is None else self.dtype
        return Layout(num_rows, self.widths, size, self.gated, norm, x_dtype.itemsize, self.dtype.itemsize)

    def key(self) -> tuple:
        """All that the speed of a route depends on; rows by the next power of two."""
        rows, residual = triton.next_power_of_2(len(self.x_ND)), self.residual_NO
        has_bias = any(b is not None for b in self.biases)
        dtypes = self.x_ND.dtype, self.dtype, None if residual is None else residual.dtype
        sizes = rows, self.widths, self.x_ND.shape[1]
        return str(self.x_ND.device), *sizes, *dtypes, self.norm_D is not None, has_bias, self.gated

    def on_noise(self) -> Call:
        """The same call on inputs that are fit to be compared; leaves the global generator alone."""
        generator = torch.Generator(self.x_ND.device).manual_seed(0)

        def noise(like: torch.Tensor) -> torch.Tensor:
            return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

        return replace(
            self,
            x_ND=noise(self.x_ND),
            residual_NO=None if self.residual_NO is None else noise(self.residual_NO),
        )


ROUTES: Routes[str | Tiling] = Routes()
"""Of `fused_linear`: "torch" or a tiling, per `Call.key`."""


@torch.no_grad()
def fused_linear(
    x_ND: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None] | None = None,
    *,
    norm_D: torch.Tensor | None = None,
    eps: float = 0.0,
    residual_NO: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """Same as `reference.fused_linear`; without gradients.

    Up to MAX_ROWS rows bound by the bytes of the weights. By Triton or by cuBLAS, whichever proved faster at the first such call
    outside of a captured graph.
    """
    if weights[0].dtype not in TOLERANCE:  # float64
        return reference.fused_linear(
            x_ND, weights, biases, norm_D=norm_D, eps=eps, residual_NO=residual_NO, gated=gated
        )
    residual_NO = None if residual_NO is None else residual_NO.contiguous()
    call = Call(x_ND.contiguous(), weights, biases or [None] * len(weights), norm_D, eps, residual_NO, gated)
    if not 0 < len(x_ND) <= MAX_ROWS:
        return by_torch(call)
    found = tilings(call.layout(), num_multiprocessors(x_ND.device))
    if INTERPRETED:
        return by_triton(call, found[0]) if found else by_torch(call)
    route = ROUTES.fastest(call.key(), ["torch", *found], lambda: functools.partial(run, call.on_noise()), call.dtype)
    return run(call, route)


def run(call: Call, route: str | Tiling) -> torch.Tensor:
    return by_torch(call) if route == "torch" else by_triton(call, route)


def by_torch(call: Call) -> torch.Tensor:
    """The trainer's own products, whatever the number of rows, and kernels between them."""
    x_ND = call.x_ND if call.norm_D is None else _normed(call.x_ND, call.norm_D, call.eps, call.dtype)
    x_ND = x_ND.to(call.dtype)
    products = [torch.nn.functional.linear(x_ND, w, b) for w, b in zip(call.weights, call.biases, strict=True)]
    if call.gated:
        out_NO = _gated(*products)
    else:
        out_NO = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    residual_NO = call.residual_NO
    return out_NO if residual_NO is None else (out_NO + residual_NO).to(residual_NO.dtype)


def by_triton(call: Call, tiling: Tiling) -> torch.Tensor:
    """In one kernel, or two: see `tilings` and `fuses_norm`."""
    x_ND, norm_D, layout = call.x_ND, call.norm_D, call.layout()
    assert all(w.is_contiguous() for w in call.weights)
    if norm_D is not None and not layout.norm:
        x_ND, norm_D = _normed(x_ND, norm_D, call.eps, call.dtype), None
    num_rows, size = x_ND.shape
    weights, widths = list(call.weights), list(layout.widths)
    biases = [None] * 3
    has_bias = any(b is not None for b in call.biases)
    if has_bias:
        biases = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, call.biases, strict=True)]
        biases += biases[:1] * (3 - len(biases))
    num_weights = len(weights)
    weights += weights[:1] * (3 - num_weights)
    widths += [0] * (3 - num_weights)
    dtype = call.dtype if call.residual_NO is None else call.residual_NO.dtype
    out = torch.empty(num_rows, call.num_columns, dtype=dtype, device=x_ND.device)
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    constants = constants_of(layout, tiling, call.dtype, has_bias)
    grid = (layout.num_tiles(tiling.block_o), tiling.split_d)
    ends, sizes = (*biases, call.residual_NO, out), (size, *widths)
    if tiling.block_n == 1:
        vector_kernel[grid](x_ND, norm_D, *weights, *ends, *sizes, call.eps, **constants, **options)
        return out
    if tiling.split_d == 1:
        linear_kernel[grid](x_ND, norm_D, *weights, *ends, num_rows, *sizes, call.eps, **constants, **options)
        return out
    shares = torch.empty(tiling.split_d, *out.shape, dtype=torch.float32, device=out.device)
    ends = (None, None, None, None, shares)
    linear_kernel[grid](x_ND, None, *weights, *ends, num_rows, *sizes, 0.0, **constants | {"BIAS": False}, **options)
    shared = {name: constants[name] for name in ("NUM_WEIGHTS", "BIAS", "SPLIT_D", "BLOCK_N")}
    combine_kernel[(layout.num_tiles(COMBINE_BLOCK_O),)](
        shares, *biases, call.residual_NO, out, num_rows, *widths, BLOCK_O=COMBINE_BLOCK_O, **shared
    )
    return out


def constants_of(layout: Layout, tiling: Tiling, dtype: torch.dtype, has_bias: bool) -> dict[str, int | bool]:
    """Of `linear_kernel` or `vector_kernel`."""
    constants = {
        "NUM_WEIGHTS": len(layout.widths),
        "NORM": layout.norm,
        "BIAS": has_bias,
        "GATED": layout.gated,
        "BLOCK_O": tiling.block_o,
        "BLOCK_D": tiling.block_d,
    }
    if tiling.block_n == 1:
        return constants
    return constants | {
        "SPLIT_D": tiling.split_d,
        "BLOCK_N": tiling.block_n,
        "CHAINS": tiling.num_warps,
        "IN_FLOAT32": dtype == torch.float32 or (INTERPRETED and dtype == torch.bfloat16),
    }


def rms_norm(x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Same as `reference.rms_norm`, computed in float32. Bound by reading x and writing as much."""
    return _normed(x_ND.contiguous(), weight_D, eps, x_ND.dtype)


def silu_mul(gate_up_NI: torch.Tensor) -> torch.Tensor:
    """Same as `reference.silu_mul`, computed in float32. Bound by reading both halves and writing one."""
    return _gated(*gate_up_NI.chunk(2, dim=-1))


def _normed(x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    num_rows, size = x_ND.shape
    out = torch.empty(num_rows, size, dtype=dtype, device=x_ND.device)
    if num_rows:
        block_d, num_warps = row_block(size)
        rms_norm_kernel[(num_rows,)](x_ND, weight_D, out, size, eps, BLOCK_D=block_d, num_warps=num_warps)
    return out


def row_block(size: int) -> tuple[int, int]:
    """BLOCK_D of `rms_norm_kernel`, and its warps: at most 32 elements a thread."""
    block_d = triton.next_power_of_2(size)
    return block_d, min(16, max(1, block_d // 512))


def _gated(gate_NI: torch.Tensor, up_NI: torch.Tensor) -> torch.Tensor:
    num_rows, size = gate_NI.shape
    out = torch.empty(num_rows, size, dtype=gate_NI.dtype, device=gate_NI.device)
    if out.numel():
        assert gate_NI.stride() == up_NI.stride() and gate_NI.stride(1) == 1
        grid = (num_rows, triton.cdiv(size, GATE_BLOCK))
        silu_mul_kernel[grid](gate_NI, up_NI, gate_NI.stride(0), out, size, BLOCK=GATE_BLOCK)
    return out
