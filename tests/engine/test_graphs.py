"""How CUDA graphs are made: the order of calls, against torch's own signatures. No GPU is needed."""

from __future__ import annotations

import contextlib
import gc
from unittest.mock import MagicMock, create_autospec

import pytest
import torch

from atlas_rl.engine import graphs
from atlas_rl.engine.graphs import CudaGraphs, EagerGraphs, backend_for


@pytest.fixture
def cuda(monkeypatch) -> MagicMock:
    """Everything of torch.cuda that is called, as mocks that know the real signatures; `calls` notes their order."""
    calls = MagicMock()
    stream, graph = (
        create_autospec(torch.cuda.Stream, instance=True),
        create_autospec(torch.cuda.CUDAGraph, instance=True),
    )
    calls.attach_mock(stream, "stream")
    calls.attach_mock(graph, "graph")
    current = create_autospec(torch.cuda.Stream, instance=True)
    calls.attach_mock(current, "current")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "current_stream", create_autospec(torch.cuda.current_stream, return_value=current))
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    calls.graph_pool_handle.return_value = (0, 1)
    calls.get_sync_debug_mode.return_value = 0
    calls.mem_get_info.return_value = (2**35, 2**36)
    queries = ("graph_pool_handle", "get_sync_debug_mode", "mem_get_info")
    for name in (*queries, "set_sync_debug_mode", "empty_cache"):
        assert callable(getattr(torch.cuda, name))
        mock = getattr(calls, name)
        monkeypatch.setattr(torch.cuda, name, mock)
    for name in ("endAllocateToPool", "releasePool"):
        monkeypatch.setattr(torch._C, f"_cuda_{name}", getattr(calls, name), raising=False)
    return calls


def names(calls: MagicMock) -> list[str]:
    queries = ("graph_pool_handle", "get_sync_debug_mode", "mem_get_info")
    return [name for name, _, _ in calls.mock_calls if name not in queries]


def test_a_step_runs_once_before_it_is_captured(cuda):
    backend, steps = CudaGraphs(torch.device("cuda", 0)), []

    def step() -> int:
        cuda.step()
        assert not gc.isenabled(), "a tensor that is collected would call the driver"
        steps.append(len(steps))
        return len(steps)

    made = backend.capture(step)
    assert made.outputs == 3, "what the capture left"
    assert made.step is step, "which holds the tensors that the graph reads"
    assert names(cuda) == [
        "stream.wait_stream",
        "step",
        "set_sync_debug_mode",
        "step",
        "set_sync_debug_mode",
        "stream.synchronize",
        "graph.capture_begin",
        "step",
        "graph.capture_end",
        "current.wait_stream",
    ]
    assert [call.args for call in cuda.set_sync_debug_mode.call_args_list] == [("error",), (0,)]
    assert cuda.graph.capture_begin.call_args.kwargs == {"pool": (0, 1), "capture_error_mode": "thread_local"}
    assert gc.isenabled()
    made.replay()
    backend.capture(step)
    assert cuda.graph_pool_handle.call_count == 1, "one pool for all"
    backend.reset()
    backend.capture(step)
    assert cuda.graph_pool_handle.call_count == 2


def test_a_capture_that_fails_is_ended(cuda):
    backend, calls = CudaGraphs(torch.device("cuda", 0)), []

    def step() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")

    cuda.graph.capture_end.side_effect = RuntimeError("capture was invalidated")
    with pytest.raises(RuntimeError, match="not permitted"):
        backend.capture(step)
    assert cuda.graph.capture_end.called and gc.isenabled() and cuda.current.wait_stream.called
    cuda.endAllocateToPool.assert_called_once_with(0, (0, 1))
    cuda.releasePool.assert_called_once_with(0, (0, 1))


def test_memory_is_given_back_before_a_capture_that_may_lack_it(cuda):
    backend = CudaGraphs(torch.device("cuda", 0))
    backend.capture(lambda: None)
    assert not cuda.empty_cache.called
    cuda.mem_get_info.return_value = (2**20, 2**36)
    backend.capture(lambda: None)
    assert cuda.empty_cache.call_count == 1


def test_only_a_gpu_captures():
    assert backend_for(torch.device("cpu")) is None


def test_eager_steps_run_when_they_are_replayed():
    values = iter(range(10))
    graph = EagerGraphs().capture(lambda: next(values))
    assert graph.outputs == 0
    graph.replay()
    assert graph.outputs == 1
    watch = EagerGraphs().stopwatch()
    watch.stop()
    assert watch.seconds() >= 0 and graphs.EagerCopy(torch.arange(3)).wait().tolist() == [0, 1, 2]
