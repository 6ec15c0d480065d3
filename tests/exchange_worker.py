"""One of several processes: completions decoded elsewhere return (see distributed/test_exchange_over_gloo.py)."""

from __future__ import annotations

import torch.distributed as dist

from atlas_rl.exchange import describe, give_back, make_plan, send
from atlas_rl.lengths import LengthHistory, outcome
from atlas_rl.ranks import Ranks
from atlas_rl.types import Rollout, RolloutRequest


def decode(request: RolloutRequest) -> Rollout:
    tokens = [request.seed % 1000 + i for i in range(request.prompt_ids[0])]
    logprobs = [-1 / (3 + token) for token in tokens]
    return Rollout(
        prompt_ids=list(request.prompt_ids),
        token_ids=tokens,
        logprobs=logprobs,
        finish_reason="stop" if tokens[0] % 2 else "length",
    )


def main() -> None:
    dist.init_process_group("gloo")
    ranks, history = Ranks.of_run(), LengthHistory()
    # a prompt's first token is how long its completions are; rank 0 has the long ones, the last rank has none
    lens = [] if ranks.rank == ranks.size - 1 else [(90, 80, 70, 60), (5, 6, 7, 8)][ranks.rank]
    own = [
        RolloutRequest(prompt_ids=(length, 1), seed=-(2**63) + 10 * length + i, max_new_tokens=100)
        for length in lens
        for i in range(4)
    ]
    idle = []
    for _ in range(2):
        plan = make_plan(ranks.rank, ranks.meet("plan", describe(own, history)), own)
        here = [decode(request) for request in send(ranks, plan)]
        history.record_all(ranks.meet("results", outcome(here)))
        assert give_back(ranks, plan, here) == [decode(request) for request in own]
        assert plan.moved_units and here, "the last rank has got some"
        idle.append((plan.idle_before, plan.idle_after))
    (unknown_before, _), (before, after) = idle
    assert abs(unknown_before - 1 / 3) < 1e-6 and before > 0.5 and after < 0.1, idle
    assert len(set(ranks.meet("end", str(sorted(history.by_prompt.items()))))) == 1
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
