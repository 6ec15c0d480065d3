"""What the steps of two runs say, taken in pairs: how much faster a step can become when rollouts do, how much faster it did, and
whether the policy learned as much."""

from __future__ import annotations

from statistics import fmean, median, stdev
from typing import Any

from atlas_rl.bench.judging import judge, summarize

TARGET = 0.85
"""Of the bound."""

Step = dict[str, Any]
Runs = list[dict[str, list[Step]]]
"""By seed, each arm's steps."""

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t for 95 %, two-sided, by degrees of freedom from 1 on."""


def bound(share: float, ratio: float) -> float:
    """Of a step's speed-up, if this share of it becomes `ratio` times as fast and the rest takes as long as it did."""
    return 1 / (1 - share + share / ratio)


def paired(runs: Runs, reference: str, arm: str) -> list[tuple[Step, Step]]:
    """Steps that both arms took, and made rollouts in."""
    pairs = [pair for run in runs for pair in zip(run[reference], run[arm])]
    return [(a, b) for a, b in pairs if a["tokens"] and b["tokens"]]


def compare_speed(pairs: list[tuple[Step, Step]]) -> dict[str, Any]:
    """Of pairs (reference's step, other arm's step).

    Arms draw other random numbers, and so make completions of other lengths. The rollout ratio is one of seconds per token; the
    speed-up is stated as it is, per token, and per position of the longest completion: to that one a trainer's forward and
    backward pad the others, and `generate` runs as many steps, so that this varies least from pair to pair.
    """
    share = median(a["parts"]["rollout"] / a["seconds"] for a, _ in pairs)
    rollouts = [a["parts"]["rollout"] / b["parts"]["rollout"] for a, b in pairs]
    ratio = summarize([ratio * b["tokens"] / a["tokens"] for ratio, (a, b) in zip(rollouts, pairs)])
    limit = bound(share, ratio["median"])
    speedups = [a["seconds"] / b["seconds"] for a, b in pairs]
    return {
        "pairs": len(pairs),
        "seconds_per_step": [median(step["seconds"] for step in steps) for steps in zip(*pairs)],
        "tokens_per_step": [fmean(step["tokens"] for step in steps) for steps in zip(*pairs)],
        "longest": [fmean(step["longest"] for step in steps) for steps in zip(*pairs)],
        "rollout_share": share,
        "rollout_ratio": ratio,
        "bound": limit,
        "per_step": _held_against(limit, speedups),
        **{
            f"per_{name}": _held_against(limit, [s * b[key] / a[key] for s, (a, b) in zip(speedups, pairs)])
            for name, key in (("token", "tokens"), ("position", "longest"))
        },
        "speedup_of_sums": sum(a["seconds"] for a, _ in pairs) / sum(b["seconds"] for _, b in pairs),
    }


def _held_against(limit: float, speedups: list[float]) -> dict[str, Any]:
    of_bound = summarize([speedup / limit for speedup in speedups])
    return {"speedup": summarize(speedups), "of_bound": of_bound, **judge(of_bound, TARGET)}


def parts_of(steps: list[Step]) -> dict[str, float]:
    """Median seconds of a step's parts; `other` is what none of the parts holds. Beside the whole step stands what processors
    worked for it, all threads together: on a shared machine that varies less."""
    names = list(dict.fromkeys(name for step in steps for name in step["parts"]))
    rows = [{name: step["parts"].get(name, 0.0) for name in names} for step in steps]
    for row, step in zip(rows, steps):
        row["other"] = step["seconds"] - sum(row.values())
        row |= {"whole step": step["seconds"], "processor time": step["cpu_seconds"]}
    return {name: median(row[name] for row in rows) for name in rows[0]}


def fifths(rewards: list[float]) -> tuple[float, float]:
    """Means of a curve's first and last fifth."""
    size = max(1, len(rewards) // 5)
    return fmean(rewards[:size]), fmean(rewards[-size:])


def compare_rewards(reference: list[list[float]], other: list[list[float]]) -> dict[str, Any]:
    """Of two arms' reward curves, one per seed: does the mean of the last fifth differ by more than seeds do?

    The difference of the arms' means is held against its 95 % confidence interval (standard error pooled from the spread between
    seeds, Student's t). `missed`: zero lies outside. `passed`: zero lies inside, and the interval is fine enough to have shown an
    arm that learns half as much: its half-width is at most half of what the reference gained. Otherwise `undecided`.
    """
    firsts, lasts = zip(*[zip(*map(fifths, curves)) for curves in (reference, other)])
    means = [fmean(values) for values in lasts]
    difference, num_seeds = means[1] - means[0], len(reference)
    found = {"first": list(firsts), "last": list(lasts), "difference": difference}
    if num_seeds < 2:
        return found | {"half_width": None, "verdict": "undecided"}
    error = (sum(stdev(values) ** 2 for values in lasts) / num_seeds) ** 0.5
    half_width = error * T95[min(2 * num_seeds - 2, len(T95)) - 1]
    gain = means[0] - fmean(firsts[0])
    if abs(difference) > half_width:
        verdict = "missed"
    else:
        verdict = "passed" if half_width <= gain / 2 else "undecided"
    return found | {"standard_error": error, "half_width": half_width, "verdict": verdict}


def summarize_runs(runs: Runs, reference: str, arms: list[str]) -> dict[str, Any]:
    """Each arm against the reference, by seed and over all of them. Runs that broke off count as far as they came."""
    summary: dict[str, Any] = {
        "parts": {name: parts_of([step for run in runs for step in run[name]]) for name in [reference, *arms]}
    }
    for arm in arms:
        curves = [[[step["reward"] for step in run[name]] for run in runs] for name in (reference, arm)]
        summary[arm] = {
            "by_seed": [compare_speed(paired([run], reference, arm)) for run in runs],
            "overall": compare_speed(paired(runs, reference, arm)),
            "rewards": compare_rewards(*curves),
        }
    return summary
