"""One of two processes whose drafter is retrained on what both generate (see distributed/test_retraining_over_ranks.py)."""

from __future__ import annotations

import logging
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import tiny_llama
from learning_rank import LearningRank, same_bits, weights

from atlas_rl.adapt.adaptation import described
from atlas_rl.adapt.state import FOLDER, load_state, save_state
from atlas_rl.ranks import Ranks


def main(checkpoint: Path) -> None:
    torch.set_num_threads(1)
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("atlas_rl").addHandler(handler)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    ranks = Ranks.of_run()
    is_last = ranks.rank == ranks.size - 1
    mine = LearningRank(tiny_llama(), ranks)

    def update(seed: int, num_tokens: int = 24) -> bool:
        """Retrain on what was generated last, which is then the same on all ranks; whether that was kept."""
        mine.rollout(seed, num_tokens, meets=True)
        moments = mine.retrainer.optimizer.state_dict()["state"].values()
        sums = [float(tensor.double().sum()) for of_one in moments for tensor in of_one.values()]
        words = mine.drafter.vocabulary
        numbers = (
            mine.retrainer.judged_tokens,
            mine.retrainer.budget.state_dict(),
            words.counts_V.sum() > 0 and words.untold_V.sum() > 0,
        )
        seen = ranks.meet("comparing", (described(mine.drafter.head), sums, numbers, words.ids.tolist()))
        assert all(other == seen[0] for other in seen), seen
        stats = mine.engine.stats.retrain
        return stats is not None and bool(stats.kept)

    def warned(*texts: str) -> None:
        assert [any(text in warning for text in texts) for warning in warnings] == [True] * len(texts), warnings
        warnings.clear()

    assert not update(0), "nothing has been generated before"
    before = weights(mine)
    assert update(1, num_tokens=1 if is_last else 24) and not same_bits(before, weights(mine))
    before = weights(mine)
    assert update(2), "also where this rank has nothing to learn from"
    assert not same_bits(before, weights(mine))
    warned()

    before, unroll = weights(mine), mine.drafter.head.unroll
    if is_last:
        calls = []

        def failing(*args):
            calls.append(1)
            if len(calls) == 3:
                raise MemoryError("none left")
            return unroll(*args)

        mine.drafter.head.unroll = failing
    assert not update(3) and same_bits(before, weights(mine))
    warned("MemoryError: none left")
    if is_last:
        mine.drafter.head.unroll = unroll
    assert update(4)

    before, loss = weights(mine), mine.retrainer._loss
    if is_last:
        mine.retrainer._loss = lambda lesson: loss(lesson) * torch.inf
    assert not update(5) and same_bits(before, weights(mine))
    warned(*["diverged"] * (ranks.rank == 0))
    mine.retrainer._loss = loss

    if is_last:
        with torch.no_grad():
            mine.drafter.head.fc.weight[0, 0] += 1e-3
    assert update(6)
    warned(*["were not as on rank 0"] * (ranks.rank == 0))

    save_state(checkpoint, mine.adaptation, mine.engine)
    ranks.meet("saved")
    resumed = LearningRank(tiny_llama(), ranks)
    assert load_state(checkpoint, resumed.adaptation, resumed.engine)
    assert same_bits(weights(mine), weights(resumed))
    assert torch.equal(mine.retrainer.generator.get_state(), resumed.retrainer.generator.get_state())
    # a machine without the file
    resumed = LearningRank(tiny_llama(), ranks)
    assert load_state(checkpoint / "nowhere" if is_last else checkpoint, resumed.adaptation, resumed.engine)
    assert same_bits(weights(mine), weights(resumed))
    warned()
    assert (checkpoint / FOLDER).exists()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
