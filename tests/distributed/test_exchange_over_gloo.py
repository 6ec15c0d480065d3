from __future__ import annotations

from launching import launch_ranks


def test_completions_decoded_elsewhere_return():
    launch_ranks("exchange_worker.py", num_ranks=3)
