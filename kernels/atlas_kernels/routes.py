"""Which of several ways to compute the same is the fastest on this device: measured once per kind of call, then remembered."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch

logger = logging.getLogger(__name__)

Route = TypeVar("Route")
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""Relative difference in the Frobenius norm between two ways to compute the same, by the dtype of the arithmetic."""
WARM_UPS, REPEATS = 3, 10


class Routes(Generic[Route]):
    """The fastest route per key. As many keys are kept as there are kinds of calls: layer shapes times buckets of rows."""

    def __init__(
        self,
        seconds: Callable[[Callable[[], torch.Tensor]], float] | None = None,
        is_capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing,
    ) -> None:
        """`seconds` times a call, by default on the current CUDA device."""
        self.measures = True
        """False: the baseline serves, for results that no clock has a say in."""
        self.chosen: dict[Hashable, Route] = {}
        self.seconds: dict[Hashable, dict[str, float]] = {}
        """What was measured, by key and the route's name."""
        self._time, self._is_capturing = seconds or device_seconds, is_capturing

    def fastest(
        self,
        key: Hashable,
        routes: Sequence[Route],
        prepare: Callable[[], Callable[[Route], torch.Tensor]],
        dtype: torch.dtype,
    ) -> Route:
        """The route to take. The first is the baseline: others must equal it, and it serves while a graph is captured.

        Args:
            prepare: gives what computes by a route, on inputs fit to be compared: a first caller's may hold anything.
            dtype: of the arithmetic.
        """
        if not self.measures:
            return routes[0]
        if key in self.chosen:
            return self.chosen[key]
        if self._is_capturing():
            return routes[0]
        call = prepare()
        expected = call(routes[0])
        seconds = {routes[0]: self._time(lambda: call(routes[0]))}
        for route in routes[1:]:
            try:
                error = relative_error(call(route), expected)
                if not error <= tolerance(dtype):
                    raise ArithmeticError(f"it is off by {error:.2g}")
                seconds[route] = self._time(lambda route=route: call(route))
            except Exception as reason:
                logger.warning("Left out the route %s for %s: %s", route, key, reason)
        self.seconds[key] = {str(route): value for route, value in seconds.items()}
        self.chosen[key] = min(seconds, key=seconds.get)
        return self.chosen[key]


def tolerance(dtype: torch.dtype) -> float:
    """cuBLAS' own products in float32 are not exact where TF32 is allowed."""
    is_rounded = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return 3e-3 if is_rounded else TOLERANCE[dtype]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """|value - expected| / |expected|, NaN where either is not finite."""
    return ((value.float() - expected.float()).norm() / expected.float().norm()).item()


def device_seconds(call: Callable[[], torch.Tensor]) -> float:
    """Median time of a call on the current CUDA device, with its inputs in memory and not in L2, launches hidden."""
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    scratch = torch.empty(2 * cache_bytes, dtype=torch.int8, device="cuda")
    events = []
    for _ in range(WARM_UPS + REPEATS):
        for _ in range(4):  # as long as the host takes to launch the call
            scratch.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        events.append((start, end))
    end.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events[WARM_UPS:]) / 1000
