"""What ranks do together around a rollout: agree whether it can be made, share its groups out, and hear of each other's end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.twin import UnsupportedModel
from atlas_rl.exchange import describe, give_back, make_plan, send
from atlas_rl.integrations.hf_generate import Unsupported
from atlas_rl.lengths import LengthHistory, outcome
from atlas_rl.ranks import Ranks
from atlas_rl.types import Rollout, RolloutRequest, SamplingParams

T = TypeVar("T")


def agree(ranks: Ranks, what: str, work: Callable[[], T]) -> T:
    """Do something that each rank does by itself: its result, or on all ranks what has kept one of them from it.

    Raises:
        Unsupported: some rank cannot do it exactly; then none does.
        Exception: what it raised here. RankFailed: it raised on another rank.
    """
    result, reason = None, None
    try:
        result = work()
    except (Unsupported, UnsupportedModel) as error:
        reason = error
    except Exception as error:
        ranks.meet(what, error=error)
        raise
    if ranks.size == 1 and reason is not None:
        raise reason
    reasons = ranks.meet(what, None if reason is None else str(reason))
    if any(reasons):
        raise Unsupported(next(filter(None, reasons)))
    return result


def generate_together(
    engine: RolloutEngine,
    ranks: Ranks,
    requests: list[RolloutRequest],
    sampling: SamplingParams,
    lengths: LengthHistory,
    *,
    balance: bool,
) -> list[Rollout]:
    """One completion per request, in their order; all ranks call this.

    Args:
        lengths: of earlier completions, the same on all ranks. balance: let ranks with less to do make those of others.
    """
    start = time.perf_counter()
    try:
        requests = engine.checked(requests)  # here, where their numbers are the caller's
        units = describe(requests, lengths)
    except Exception as error:
        ranks.meet("sharing out a rollout", error=error)
        raise
    # who makes another's completions has to sample as that one does; limits of length travel with the requests
    told = ranks.meet(
        "sharing out a rollout", (units, replace(sampling, max_new_tokens=max(1, sampling.min_new_tokens)))
    )
    can_move = balance and all(theirs == told[0][1] for _, theirs in told)
    plan = make_plan(ranks.rank, [units for units, _ in told], requests) if can_move else None
    here = requests if plan is None else send(ranks, plan)
    engine.unbilled["exchange"] += time.perf_counter() - start
    try:
        rollouts = engine.generate(here, sampling)
    except Exception as error:
        ranks.meet("a rollout", error=error)
        raise
    stats = engine.stats
    busy = stats.seconds["total"]
    told = ranks.meet("a rollout", (busy, outcome(rollouts)))
    start = time.perf_counter()
    stats.slowest_rank_seconds = max(seconds for seconds, _ in told)
    stats.rank_idle_seconds = stats.slowest_rank_seconds - busy
    outcomes = [lens for _, lens in told]
    lengths.record_all(outcomes)
    stats.tokens_of_all_ranks = sum(int(lens[2].sum()) for lens in outcomes)
    if plan is not None:
        stats.moved_samples = plan.moved_samples
        stats.expected_idle = {"without": plan.idle_before, "with": plan.idle_after}
        rollouts = give_back(ranks, plan, rollouts)
    stats.bill("exchange", time.perf_counter() - start)
    return rollouts
