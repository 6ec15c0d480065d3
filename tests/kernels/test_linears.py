"""Fused Linears against their twin: every kind of call, every kind of tiling; the measured choice between routes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import pytest
import torch
from compiling import Case, check_compiles

from atlas_kernels import reference
from atlas_kernels.routes import Routes

triton = pytest.importorskip("triton")

TOLERANCES = [(torch.float32, 1e-5, 1e-4), (torch.float16, 4e-3, 4e-3)]
"""Dtype, atol, rtol."""


@dataclass(frozen=True)
class Kind:
    """Arguments of a call to `fused_linear`."""

    widths: tuple[int, ...]
    size: int
    norm: bool = False
    bias: tuple[bool, ...] = ()
    residual: bool = False
    gated: bool = False


KINDS = [
    Kind((96, 40, 24), 136, norm=True, bias=(True, False, True)),
    Kind((56, 56), 200, norm=True, gated=True),
    Kind((40, 40), 72, gated=True, bias=(True, True), residual=True),
    Kind((72,), 264, residual=True),
    Kind((8,), 8, norm=True, bias=(True,)),
    Kind((33, 17), 24),
]


def arguments(
    kind: Kind, num_rows: int, dtype: torch.dtype, stream_dtype: torch.dtype | None = None
) -> tuple[tuple, dict]:
    """Of a call; the residual stream and the norm may be of another dtype than the weights."""
    generator = torch.Generator().manual_seed(num_rows)
    stream_dtype = stream_dtype or dtype

    def randn(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    weights = [randn(width, kind.size) / kind.size**0.5 for width in kind.widths]
    biases = (
        [randn(width) if has else None for width, has in zip(kind.widths, kind.bias, strict=True)]
        if kind.bias
        else None
    )
    width = kind.widths[0] if kind.gated else sum(kind.widths)
    options = {"gated": kind.gated}
    if kind.norm:
        options |= {"norm_D": 1 + 0.1 * randn(kind.size, dtype=stream_dtype), "eps": 1e-5}
    if kind.residual:
        options["residual_NO"] = randn(num_rows, width, dtype=stream_dtype)
    return (3 * randn(num_rows, kind.size, dtype=stream_dtype), weights, biases), options


@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize("num_rows", [0, 1, 5, 64, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_twin(kind: Kind, num_rows: int, dtype: torch.dtype, atol: float, rtol: float):
    from atlas_kernels import linears

    args, options = arguments(kind, num_rows, dtype)
    got, expected = linears.fused_linear(*args, **options), reference.fused_linear(*args, **options)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("stream_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS[:4])
def test_bf16_weights_under_either_residual_stream(kind: Kind, stream_dtype: torch.dtype, num_rows: int):
    from atlas_kernels import linears

    args, options = arguments(kind, num_rows, torch.bfloat16, stream_dtype)
    got, expected = linears.fused_linear(*args, **options), reference.fused_linear(*args, **options)
    assert got.dtype == expected.dtype == (stream_dtype if kind.residual else torch.bfloat16)
    torch.testing.assert_close(got.float(), expected.float(), atol=0.06, rtol=0.02)


@pytest.mark.parametrize("kind", [KINDS[3], Kind((40, 24), 300, bias=(True, True), residual=True)])
def test_shares_of_d_sum_up_to_the_whole(kind: Kind):
    """Also where the last share is empty, and for the kernel's other sizes."""
    from atlas_kernels import linears

    args, options = arguments(kind, 20, torch.float32)
    expected = reference.fused_linear(*args, **options)
    call = linears.Call(args[0], args[1], args[2] or [None] * len(args[1]), None, 0.0, options["residual_NO"], False)
    for split_d in (1, 2, 4):
        for block_o, block_d, num_warps in ((16, 64, 4), (64, 128, 2)):
            tiling = linears.Tiling(32, block_o, block_d, num_warps, 3, split_d)
            torch.testing.assert_close(linears.by_triton(call, tiling), expected, atol=1e-5, rtol=1e-4)


def test_the_composed_route_equals_the_twin_too():
    from atlas_kernels import linears

    for kind in KINDS:
        args, options = arguments(kind, 6, torch.float32)
        biases = args[2] or [None] * len(args[1])
        norm, eps, residual = options.get("norm_D"), options.get("eps", 0.0), options.get("residual_NO")
        got = linears.by_torch(linears.Call(args[0], args[1], biases, norm, eps, residual, kind.gated))
        torch.testing.assert_close(got, reference.fused_linear(*args, **options), atol=1e-5, rtol=1e-4)


def test_a_row_that_is_normed_may_be_large_in_float16():
    from atlas_kernels import linears

    (x, weights, _), options = arguments(KINDS[0], 4, torch.float16)
    x[1] *= 1e4
    options["norm_D"] *= 10
    got = linears.fused_linear(x, weights, **options)
    assert got.isfinite().all()
    torch.testing.assert_close(got, reference.fused_linear(x, weights, **options), atol=0.05, rtol=0.01)


def test_takes_a_view_and_weights_that_learn():
    from atlas_kernels import linears

    (x, weights, _), options = arguments(KINDS[3], 6, torch.float32)
    weights = [torch.nn.Parameter(w) for w in weights]
    options["residual_NO"] = options["residual_NO"][::2]
    got = linears.fused_linear(x[::2], weights, **options)
    assert not got.requires_grad
    torch.testing.assert_close(got, reference.fused_linear(x[::2], weights, **options).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize(("num_rows", "size"), [(0, 64), (1, 5000), (7, 72), (3, 1)])
def test_rms_norm_and_silu_mul(num_rows: int, size: int, dtype: torch.dtype, atol: float, rtol: float):
    from atlas_kernels import linears

    generator = torch.Generator().manual_seed(size)
    x = (5 * torch.randn(num_rows, size, generator=generator)).to(dtype)
    for weight_dtype in (dtype, torch.float32):
        weight = torch.randn(size, generator=generator).to(weight_dtype)
        got = linears.rms_norm(x, weight, 1e-6)
        torch.testing.assert_close(got, reference.rms_norm(x, weight, 1e-6), atol=atol, rtol=rtol)
    gate_up = torch.randn(num_rows, 2 * size, generator=generator).to(dtype)
    torch.testing.assert_close(linears.silu_mul(gate_up), reference.silu_mul(gate_up), atol=atol, rtol=rtol)


class FakeRoutes:
    """Routes that cost what their table says; "wrong" is wrong and "raises" raises."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.calls, self.capturing = seconds, [], False
        self.routes = Routes(self.time, lambda: self.capturing)

    def call(self, route: str) -> torch.Tensor:
        self.calls.append(route)
        if route == "raises":
            raise RuntimeError("out of shared memory")
        return torch.ones(3) * {"wrong": 1.1, "nan": torch.nan}.get(route, 1 + 1e-6)

    def time(self, call) -> float:
        call()
        return self.seconds[self.calls[-1]]

    def fastest(self, key: str = "key") -> str:
        return self.routes.fastest(key, list(self.seconds), self.call, torch.float32)


def test_the_fastest_route_is_taken_and_measured_once():
    fake = FakeRoutes({"torch": 3.0, "slow": 4.0, "fast": 1.0, "middle": 2.0})
    assert fake.fastest() == "fast"
    num_calls = len(fake.calls)
    assert fake.fastest() == "fast" and len(fake.calls) == num_calls
    assert fake.routes.seconds == {"key": fake.seconds}
    fake.seconds["middle"] = 0.5
    assert fake.fastest("another") == "middle" and fake.fastest() == "fast"


def test_routes_that_fail_or_differ_are_left_out_with_a_warning_each(caplog):
    fake = FakeRoutes({"torch": 3.0, "raises": 1.0, "wrong": 1.0, "nan": 1.0, "right": 2.0})
    with caplog.at_level(logging.WARNING):
        assert fake.fastest() == fake.fastest() == "right"
    assert [record.args[0] for record in caplog.records] == ["raises", "wrong", "nan"]


def test_nothing_is_measured_while_a_graph_is_captured_or_where_clocks_have_no_say():
    fake = FakeRoutes({"torch": 3.0, "fast": 1.0})
    fake.capturing = True
    assert fake.fastest() == "torch" and fake.calls == []
    fake.capturing, fake.routes.measures = False, False
    assert fake.fastest() == "torch" and fake.calls == []
    fake.routes.measures = True
    assert fake.fastest() == "fast"
    fake.capturing = True
    assert fake.fastest() == "fast"
