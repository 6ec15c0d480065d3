from __future__ import annotations

import numpy as np
import pytest
import torch
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
