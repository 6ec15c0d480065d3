from __future__ import annotations

from launching import launch_ranks


def test_two_processes_retrain_one_head(tmp_path):
    launch_ranks("retraining_worker.py", tmp_path)
