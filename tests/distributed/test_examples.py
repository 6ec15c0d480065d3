"""examples/zero3_grpo.py on two processes: rollouts through Atlas from gathered weights, and a second start that goes on."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("reasoning_gym")

from launching import launch_ranks
from recipes import rollout_rows

from atlas_rl import last_complete_checkpoint


@pytest.mark.distributed
def test_zero3_grpo(tmp_path):
    launch_ranks("zero3_example_worker.py", tmp_path, 1)
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-1"
    launch_ranks("zero3_example_worker.py", tmp_path, 2)
    rows = rollout_rows(tmp_path)
    assert sorted((row["step"], row["rank"]) for row in rows) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert not any("fallback" in row or "error" in row for row in rows)
    assert all(row["gathered_bytes"] for row in rows)
