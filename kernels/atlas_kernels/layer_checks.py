"""The checks of kernels within a forward: cache, attention, Linears. See `checks`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from atlas_kernels import reference
from atlas_kernels.checks import Inputs, relative_error, require_equal


def _places(inputs: Inputs) -> torch.Tensor:
    """Slots of one token per row, of which one is nowhere."""
    sizes = inputs.sizes
    slots = inputs.tables()[:, 0] * sizes.block_size + inputs.integers(0, sizes.block_size, sizes.num_rows)
    slots[-1] = -1
    return slots


def check_store_kv(launcher: Callable, inputs: Inputs) -> float:
    sizes, slots = inputs.sizes, _places(inputs)
    key, value = (inputs.randn(sizes.num_rows, sizes.num_kv_heads, sizes.head_dim) for _ in range(2))
    caches = [torch.full_like(inputs.cache(), torch.nan) for _ in range(2)]
    launcher(key, value, slots, caches[0])
    reference.store_kv(key, value, slots, caches[1])
    require_equal(*caches, "caches")
    return 0.0


def check_rope_and_store(launcher: Callable, inputs: Inputs) -> float:
    sizes, slots = inputs.sizes, _places(inputs)
    width = (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim
    qkv, norms = inputs.randn(sizes.num_rows, width), [1 + 0.1 * inputs.randn(sizes.head_dim) for _ in range(2)]
    angles = inputs.randn(sizes.context, sizes.head_dim // 2, dtype=torch.float32)
    rotations = [angles.cos(), angles.sin()]
    positions = inputs.integers(0, sizes.context, sizes.num_rows)
    got_cache = torch.full_like(inputs.cache(), torch.nan)
    cache = torch.full_like(got_cache, torch.nan, dtype=torch.float64)
    # the twin's own arithmetic in float64: norm and rotation are no more than that
    args = [qkv.double(), *(w.double() for w in norms), 1e-6, *(x.double() for x in rotations), positions, slots, cache]
    got = launcher(qkv.clone(), *norms, 1e-6, *rotations, positions, slots, got_cache)
    expected = reference.rope_and_store(*args)
    require_equal(got_cache.isnan(), cache.isnan(), "places in the cache")
    stored = ~cache.isnan()
    return max(relative_error(got, expected), relative_error(got_cache[stored], cache[stored]))


def check_paged_attention(launcher: Callable, inputs: Inputs) -> float:
    """Ragged rows with places of padding: as they are, with a common prefix, in a window with soft-capped scores."""
    sizes, device = inputs.sizes, inputs.device
    num_rows, num_queries, block_size = sizes.num_rows, sizes.num_queries, sizes.block_size
    lens = torch.arange(num_rows, device=device) % (num_queries + 1)  # the first row is padding
    shortest = sizes.context - num_queries - sizes.context // 2
    starts = shortest + inputs.integers(1, sizes.context // 2, num_rows)
    kv, tables = inputs.cache(), inputs.tables()
    num_shared = shortest // block_size * block_size
    tables[1:, : num_shared // block_size] = tables[1, : num_shared // block_size].clone()
    slots = torch.arange(tables.shape[1] * block_size, device=device)
    blocks, offsets = tables[:, slots // block_size], (slots % block_size).expand(num_rows, -1)
    behind = slots >= (starts + lens)[:, None]
    kv[:, blocks[behind], :, offsets[behind]] = torch.nan  # no token is there: nothing may read it
    query = inputs.randn(num_rows * num_queries, sizes.num_heads, sizes.head_dim)
    rows = (tables, starts, lens, sizes.head_dim**-0.5)
    first_R = torch.arange(num_rows, device=device) * num_queries
    padded = {"query_starts_R": first_R, "max_query_len": num_queries}
    is_one = torch.arange(num_rows, device=device) == 0
    shared = reference.SharedPrefixes(  # the first span is all rows but the first, the others are unused
        torch.full_like(starts, num_queries),
        torch.where(is_one, (num_rows - 1) * num_queries, 0),
        torch.ones_like(starts),
        torch.where(is_one, 0, num_shared),
        num_rows * num_queries,
    )
    is_token = (torch.arange(num_queries, device=device) < lens[:, None]).flatten()
    exact_kv, errors = kv.nan_to_num().double(), []
    for options, spans in (((), None), ((), shared), ((sizes.context // 4, 5.0), None)):
        expected = reference.paged_attention(query.double(), exact_kv, *rows, *options, **padded)
        got = launcher(query, kv, *rows, *options, **padded, shared=spans)
        errors.append(relative_error(got[is_token], expected[is_token]))
    return max(errors)


def check_rms_norm(launcher: Callable, inputs: Inputs) -> float:
    x, weight = inputs.randn(inputs.sizes.num_rows, inputs.sizes.hidden), inputs.randn(inputs.sizes.hidden)
    return relative_error(launcher(x, weight, 1e-6), reference.rms_norm(x.double(), weight.double(), 1e-6))


def check_silu_mul(launcher: Callable, inputs: Inputs) -> float:
    x = inputs.randn(inputs.sizes.num_rows, 2 * inputs.sizes.intermediate)
    return relative_error(launcher(x), reference.silu_mul(x.double()))


def linear_arguments(inputs: Inputs, num_rows: int, kind: str) -> dict[str, Any]:
    """Of `fused_linear`, for a part of a decoder layer."""
    sizes, hidden = inputs.sizes, inputs.sizes.hidden
    heads, kv_heads = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    size, widths = {
        "qkv": (hidden, (heads, kv_heads, kv_heads)),
        "out": (heads, (hidden,)),
        "gate_up": (hidden, (sizes.intermediate, sizes.intermediate)),
        "down": (sizes.intermediate, (hidden,)),
        "head": (hidden, (sizes.vocab,)),
    }[kind]
    arguments: dict[str, Any] = {
        "x_ND": inputs.randn(num_rows, size),
        "weights": [inputs.randn(width, size).mul_(size**-0.5) for width in widths],
    }
    if kind in ("qkv", "gate_up"):
        arguments |= {"norm_D": 1 + 0.1 * inputs.randn(size), "eps": 1e-6, "gated": kind == "gate_up"}
    if kind in ("out", "down"):
        arguments["residual_NO"] = inputs.randn(num_rows, hidden)
    return arguments


def check_fused_linear(launcher: Callable, inputs: Inputs) -> float:
    errors = [0.0]
    for num_rows, kind in inputs.sizes.linears:
        arguments = linear_arguments(inputs, num_rows, kind)
        exact = {name: _doubled(value) for name, value in arguments.items()}
        errors.append(relative_error(launcher(**arguments), reference.fused_linear(**exact)))
    return max(errors)


def _doubled(value: Any) -> Any:
    if isinstance(value, list):
        return [x.double() for x in value]
    return value.double() if isinstance(value, torch.Tensor) else value
