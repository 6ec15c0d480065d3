"""How a decode step is launched: captured once as a CUDA graph and then replayed as one call, or simply called.

A step is a function of tensors that stay where they are: it reads and writes them in place, allocates its results anew, and never
looks at a value. `EagerGraphs` calls it, on any device; it is what the captured path's logic is tested with.
"""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from atlas_kernels import unavailable_reason

T = TypeVar("T")

SPARE_BYTES = 2**30
"""Free memory of the device with which a capture begins, if there is so much."""


class Graph(Protocol[T]):
    outputs: T
    """Tensors that hold the results of the latest replay, until the next one of any graph of the same pool."""

    def replay(self) -> None: ...


class HostCopy(Protocol):
    """A tensor on its way to the host."""

    def wait(self) -> np.ndarray: ...


class Stopwatch(Protocol):
    """Of work on the device, from its creation to `stop`; read when the work is known to be done."""

    def stop(self) -> None: ...

    def seconds(self) -> float: ...


class GraphBackend(Protocol):
    def capture(self, step: Callable[[], T]) -> Graph[T]:
        """Called when the step may run once without doing harm."""
        ...

    def to_host(self, tensor: torch.Tensor) -> HostCopy: ...

    def to_device(self, array: np.ndarray, target: torch.Tensor) -> None:
        """Fill the first part of a tensor."""
        ...

    def stopwatch(self) -> Stopwatch: ...

    def reset(self) -> None:
        """All graphs are gone: give back what they shared."""
        ...


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes it the current device: kernels are launched there, and events recorded."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def backend_for(device: torch.device) -> GraphBackend | None:
    """None where steps are not captured: off the GPU, and where torch twins, which wait for the device, stand in for kernels."""
    return CudaGraphs(device) if device.type == "cuda" and unavailable_reason(device) is None else None


class CudaGraphs:
    """Graphs share one memory pool: they never run at the same time, and what one leaves is read before the next one runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        """To capture on: capturing on the default stream is not allowed."""
        self.pool: tuple[int, int] | None = None

    def capture(self, step: Callable[[], T]) -> CudaGraph[T]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream), _without_collection():
                step()  # libraries make their workspaces, kernels are compiled and routes measured: none of it while capturing
                self._run_without_sync(step)
                self.stream.synchronize()
                if torch.cuda.mem_get_info(self.device)[0] < SPARE_BYTES:
                    torch.cuda.empty_cache()  # while capturing the allocator cannot give back what it holds unused
                return self._capture(step)
        finally:
            current.wait_stream(self.stream)

    def _run_without_sync(self, step: Callable[[], T]) -> None:
        """A step that waits for the device fails here: a capture that fails leaves torch's allocator in disorder."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it does not notice all there is
            torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def _capture(self, step: Callable[[], T]) -> CudaGraph[T]:
        pool, graph = self.pool or torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        try:
            # other threads (a data loader's, a logger's) may use the device meanwhile
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            outputs = step()
            graph.capture_end()
        except BaseException:
            with contextlib.suppress(Exception):
                graph.capture_end()
            with contextlib.suppress(
                Exception
            ):  # up to torch 2.11 a capture that was invalidated stays open in the allocator
                torch._C._cuda_endAllocateToPool(self.device.index, pool)
                torch._C._cuda_releasePool(self.device.index, pool)
            raise
        self.pool = pool
        return CudaGraph(graph, outputs, step)

    def to_host(self, tensor: torch.Tensor) -> CudaCopy:
        return CudaCopy(tensor)

    def to_device(self, array: np.ndarray, target: torch.Tensor) -> None:
        # pinned, so that the host need not wait; the allocator keeps the memory until the copy is done
        target[: len(array)].copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)

    def stopwatch(self) -> CudaStopwatch:
        return CudaStopwatch()

    def reset(self) -> None:
        self.pool = None


class CudaGraph(Generic[T]):
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: T, step: Callable[[], T]) -> None:
        self.graph = graph
        self.outputs = outputs
        self.step = step
        """Holds the tensors that the graph reads: it knows their addresses alone."""

    def replay(self) -> None:
        self.graph.replay()


class CudaCopy:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.host.copy_(tensor, non_blocking=True)
        self.done = torch.cuda.Event()
        self.done.record()

    def wait(self) -> np.ndarray:
        self.done.synchronize()
        return self.host.numpy()


class CudaStopwatch:
    def __init__(self) -> None:
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.start.record()

    def stop(self) -> None:
        self.end.record()

    def seconds(self) -> float:
        return self.start.elapsed_time(self.end) / 1e3


class EagerGraphs:
    """The same interface with nothing captured."""

    def capture(self, step: Callable[[], T]) -> EagerGraph[T]:
        return EagerGraph(step)

    def to_host(self, tensor: torch.Tensor) -> EagerCopy:
        return EagerCopy(tensor)

    def to_device(self, array: np.ndarray, target: torch.Tensor) -> None:
        target[: len(array)] = torch.from_numpy(array)

    def stopwatch(self) -> EagerStopwatch:
        return EagerStopwatch()

    def reset(self) -> None:
        pass


class EagerGraph(Generic[T]):
    def __init__(self, step: Callable[[], T]) -> None:
        self.step = step
        self.outputs = step()

    def replay(self) -> None:
        self.outputs = self.step()


class EagerCopy:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.host = tensor.to("cpu", copy=True)

    def wait(self) -> np.ndarray:
        return self.host.numpy()


class EagerStopwatch:
    def __init__(self) -> None:
        self.start = self.end = time.perf_counter()

    def stop(self) -> None:
        self.end = time.perf_counter()

    def seconds(self) -> float:
        return self.end - self.start


@contextlib.contextmanager
def _without_collection():
    """A collected graph or tensor would call the driver in the middle of a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
