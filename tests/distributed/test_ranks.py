from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launching import launch_ranks

from atlas_rl.ranks import Ranks


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_what_ranks_tell_each_other(num_ranks):
    launch_ranks("ranks_worker.py", num_ranks=num_ranks)


def test_one_process_is_alone():
    ranks = Ranks.of_run()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.meet("a", 3) == [3] and ranks.from_first(4) == 4
    assert [part.tolist() for part in ranks.exchange([np.arange(3)])] == [[0, 1, 2]]
    ranks.add_up([weight := torch.ones(2)])
    ranks.take_from_first([weight])
    assert weight.tolist() == [1, 1]
    with pytest.raises(OSError, match="disk"):
        ranks.meet("a", error=OSError("disk"))


@pytest.mark.parametrize(
    ("backends", "devices"),
    [
        ("cuda:nccl", ["cuda:1"]),
        ("cpu:gloo,cuda:nccl", ["cpu", "cuda:1"]),
        ("cuda:nccl,cpu:gloo", ["cpu", "cuda:1"]),
        ("cpu:gloo,cuda:gloo,hpu:gloo", ["cpu", "cuda:1"]),
    ],
)
def test_tensors_go_where_the_backends_take_them(monkeypatch, backends, devices):
    """On a machine with an accelerator, here a pretended one."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    ranks = Ranks.of_run()
    assert [str(device) for device in ranks.devices] == devices
    assert str(ranks._near(torch.ones(1))) == devices[0]
