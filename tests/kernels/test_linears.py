"""Fused Linears against their twin: every kind of call, every kind of tiling; the measured choice between routes."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest
import torch
from compiling import Case, check_compiles

import atlas_kernels
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
    x[1] *= 3e3
    options["norm_D"] *= 10
    got = linears.fused_linear(x, weights, **options)
    assert got.isfinite().all()
    torch.testing.assert_close(got, reference.fused_linear(x, weights, **options), atol=0.05, rtol=0.01)


def test_takes_a_view_and_weights_that_learn(monkeypatch):
    monkeypatch.setattr(atlas_kernels, "triton_everywhere", True)
    (x, weights, _), options = arguments(KINDS[3], 6, torch.float32)
    weights = [torch.nn.Parameter(w) for w in weights]
    options["residual_NO"] = options["residual_NO"][::2]
    got = atlas_kernels.fused_linear(x[::2], weights, **options)
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


def test_routes_are_compared_on_noise_of_their_own():
    from atlas_kernels import linears

    (x, weights, _), options = arguments(KINDS[3], 6, torch.float32)
    call = linears.Call(x * torch.nan, weights, [None], None, 0.0, options["residual_NO"], False)
    state = torch.get_rng_state()
    noise = call.on_noise()
    assert torch.equal(torch.get_rng_state(), state)
    assert noise.x_ND.std() > 0.5 and noise.key() == call.key()
    assert noise.x_ND.shape == x.shape and linears.run(noise, "torch").isfinite().all()


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
        return self.routes.fastest(key, list(self.seconds), lambda: self.call, torch.float32)


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
    fake.routes.measures = False
    assert fake.fastest() == "torch", "also where a clock has chosen before"


TRITON_TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", None: None}
LAYER = {  # Qwen3-1.7B: widths, size, norm, residual, gated
    "qkv": Kind((2048, 1024, 1024), 2048, norm=True),
    "out": Kind((2048,), 2048, residual=True),
    "gate_up": Kind((6144, 6144), 2048, norm=True, gated=True),
    "head": Kind((151936,), 2048),
}


def compile_cases(kind: Kind, num_rows: int, stream: torch.dtype, dtype: torch.dtype) -> list[Case]:
    """All kernels that may serve a call."""
    from atlas_kernels import linears

    norm = kind.norm and linears.fuses_norm(num_rows, dtype)
    x_dtype = stream if norm else dtype
    layout = linears.Layout(num_rows, kind.widths, kind.size, kind.gated, norm, x_dtype.itemsize, dtype.itemsize)
    has_bias = kind.widths == LAYER["qkv"].widths
    integers = {"size": "i32"} | {f"width_{i}": "i32" for i in range(3)}
    cases = []
    for tiling in linears.tilings(layout, 132):
        is_split = tiling.split_d > 1
        residual = f"*{TRITON_TYPES[stream]}" if kind.residual else None
        pointers = {"x_ptr": f"*{TRITON_TYPES[x_dtype]}", "norm_ptr": f"*{TRITON_TYPES[stream]}" if norm else None}
        pointers |= {f"w{i}_ptr": f"*{TRITON_TYPES[dtype]}" for i in range(3)}
        biases = {f"b{i}_ptr": f"*{TRITON_TYPES[dtype]}" if has_bias else None for i in range(3)}
        ends = {"residual_ptr": residual, "out_ptr": residual or f"*{TRITON_TYPES[dtype]}"}
        pointers |= biases | ({"residual_ptr": None, "out_ptr": "*fp32"} if is_split else ends)
        arguments = pointers | integers | {"eps": "fp32"} | ({} if tiling.block_n == 1 else {"num_rows": "i32"})
        constants = linears.constants_of(layout, tiling, dtype, has_bias)
        # the tests' own process interprets, where bf16 dots are taken in float32
        constants |= {"IN_FLOAT32": dtype == torch.float32} if "IN_FLOAT32" in constants else {}
        kernel = "vector_kernel" if tiling.block_n == 1 else "linear_kernel"
        launch = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
        cases.append(case(arguments, constants, kernel, **launch))
        if is_split:
            names = ("NUM_WEIGHTS", "BIAS", "SPLIT_D", "BLOCK_N")
            constants = {name: constants[name] for name in names} | {"BLOCK_O": linears.COMBINE_BLOCK_O}
            arguments = {"shares_ptr": "*fp32", "num_rows": "i32"} | biases | ends | integers
            arguments.pop("size")
            cases.append(case(arguments, constants, "combine_kernel"))
    return cases


def case(arguments: dict[str, str | None], constants: dict, kernel: str, **launch: int) -> Case:
    """Missing pointers are constants."""
    constants = constants | {name: None for name, kind in arguments.items() if kind is None}
    return Case(
        module="atlas_kernels.linear_kernels",
        kernel=kernel,
        arguments={name: kind for name, kind in arguments.items() if kind is not None},
        constants=constants,
        divisible=tuple(name for name in ("size", "width_0", "width_1", "width_2") if name in arguments),
        **launch,
    )


def test_compiles_for_ampere_and_hopper():
    from atlas_kernels import linears

    bf16, fp32 = torch.bfloat16, torch.float32
    served = [  # kind, rows, residual stream, weights
        *[(kind, 1, bf16, bf16) for kind in ("qkv", "gate_up")],
        *[(kind, 16, bf16, bf16) for kind in LAYER],
        ("out", 64, bf16, bf16),
        *[("qkv", 16, fp32, bf16), ("gate_up", 16, fp32, bf16), ("qkv", 32, fp32, bf16)],
        ("qkv", 16, fp32, fp32),
    ]
    cases = []
    for kind, *rest in served:
        cases += compile_cases(LAYER[kind], *rest)
    for dtype, weight in (("bf16", "bf16"), ("fp32", "fp32"), ("bf16", "fp32")):
        block_d, num_warps = linears.row_block(16384)
        row = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{weight}", "out_ptr": "*bf16", "size": "i32", "eps": "fp32"}
        cases.append(case(row, {"BLOCK_D": block_d}, "rms_norm_kernel", num_warps=num_warps))
    halves = {"gate_ptr": "*bf16", "up_ptr": "*bf16", "stride": "i32", "out_ptr": "*bf16", "size": "i32"}
    cases.append(case(halves, {"BLOCK": linears.GATE_BLOCK}, "silu_mul_kernel"))
    unique = {repr(case): case for case in cases}
    check_compiles(list(unique.values()))
