"""What is particular to the device that is measured: clocks, memory, how work is captured."""

from __future__ import annotations

import gc
import platform
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch

from atlas_rl.engine.graphs import CudaGraphs, CudaStopwatch, EagerGraphs, GraphBackend

PACKAGES = ("atlas-rl", "torch", "triton", "transformers", "numpy", "trl")
DRY_L2_BYTES = 2**16


class Machine:
    """A CUDA device; or the CPU in its place, for dry runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        if self.is_gpu:
            torch.cuda.set_device(device)

    @property
    def graphs(self) -> GraphBackend | None:
        """For engines: None takes what the device has."""
        return None if self.is_gpu else EagerGraphs()

    @property
    def l2_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.is_gpu else DRY_L2_BYTES

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, calls: Sequence[Callable[[], Any]], repeats: int, *, captured: bool = True) -> float:
        """Of one call: the median over replays of all calls in one captured graph, so that launching them takes no time; or
        as they are launched."""
        backend = (
            CudaGraphs(self.device) if self.is_gpu and captured else CudaEvents() if self.is_gpu else EagerGraphs()
        )
        graph = backend.capture(lambda: [call() for call in calls])
        watches = []
        for _ in range(repeats + 1):
            watches.append(backend.stopwatch())
            graph.replay()
            watches[-1].stop()
        self.synchronize()
        return median(watch.seconds() for watch in watches[1:]) / len(calls)

    def num_buffers(self, nbytes: int) -> int:
        """Of inputs of so many bytes: as many in turn that none is found in L2 when it is read again."""
        return max(2, min(256, -(-5 * self.l2_bytes // (2 * max(1, nbytes)))))

    def memory(self) -> tuple[int, int]:
        """Bytes allocated, and reserved by torch's allocator, once what nobody refers to is collected."""
        gc.collect()
        self.synchronize()
        if not self.is_gpu:
            return 0, 0
        return torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """That a call takes at most, beyond what is there."""
        before, _ = self.memory()
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before if self.is_gpu else 0

    def release(self) -> None:
        """Give back what is not in use."""
        gc.collect()
        if self.is_gpu and self.works():
            torch.cuda.empty_cache()

    def works(self) -> bool:
        """Whether the device still computes in this process: after an illegal access it never does again."""
        try:
            return int(torch.ones(3, device=self.device).sum()) == 3
        except Exception:  # whatever the driver says
            return False

    def describe(self) -> dict[str, Any]:
        versions: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
        for package in PACKAGES:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                versions[package] = None
        row = {"device": platform.processor() or platform.machine(), "versions": versions, "driver": None}
        if self.is_gpu:
            properties = torch.cuda.get_device_properties(self.device)
            row |= {
                "device": properties.name,
                "multiprocessors": properties.multi_processor_count,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "l2_bytes": self.l2_bytes,
                "driver": _driver(),
            }
        return row


class CudaEvents(EagerGraphs):
    """Nothing is captured, and yet the device's own clock is read."""

    def stopwatch(self) -> CudaStopwatch:
        return CudaStopwatch()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
