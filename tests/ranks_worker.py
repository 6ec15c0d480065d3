"""One of two processes: what `Ranks` does (see distributed/test_ranks.py)."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from atlas_rl.ranks import RankFailed, Ranks


def main() -> None:
    dist.init_process_group("gloo")
    ranks = Ranks.of_run()
    rank, size = ranks.rank, ranks.size
    assert ranks.meet("a", rank * 10) == [10 * r for r in range(size)]
    assert ranks.from_first(f"of {rank}") == "of 0"

    parts = ranks.exchange([np.full(rank + r, 100 * rank + r) for r in range(size)])
    assert [part.tolist() for part in parts] == [[100 * r + rank] * (r + rank) for r in range(size)]

    tensors = [torch.full((2, 3), rank + 1.0), torch.tensor(rank + 0.5, dtype=torch.bfloat16)]
    ranks.add_up(tensors)
    assert tensors[0].tolist() == [[sum(range(1, size + 1))] * 3] * 2 and tensors[1] == sum(range(size)) + size / 2
    ranks.take_from_first(weights := [torch.full((2,), float(rank))])
    assert weights[0].tolist() == [0.0, 0.0]

    # the last rank fails on its way to the second of two meetings
    try:
        try:
            ranks.meet("b")
            if rank == size - 1:
                raise OSError("disk")
        except Exception as error:
            ranks.meet("c", error=error)
        ranks.meet("c")
    except RankFailed as failure:
        assert rank < size - 1 and str(failure) == f"rank {size - 1} failed in c: OSError: disk"
    except OSError:
        assert rank == size - 1
    else:
        raise AssertionError("nobody was told")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
