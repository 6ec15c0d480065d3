"""What a process holds of a policy whose weights are spread over ranks; each case is in the worker."""

from __future__ import annotations

import pytest
from launching import launch_ranks


def test_under_fsdp2():
    launch_ranks("gathered_policy_worker.py", "fsdp2")


@pytest.mark.distributed  # DeepSpeed builds an operator at its first use
def test_under_zero3():
    pytest.importorskip("deepspeed")
    launch_ranks("gathered_policy_worker.py", "zero3", timeout=300)
