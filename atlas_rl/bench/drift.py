"""How drafters follow a policy that moves: ways of drafting over the same recorded run, and how much retraining it takes.

Every mode makes the same rollouts with the same weights, one after another at each step, so that figures differ for the
drafters' sake alone. Retraining goes on in between as it does in training; what the recorded RL step took stands for the time
between two updates.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from atlas_rl.adapt.capture import Capture
from atlas_rl.adapt.distill import DistillConfig, distill
from atlas_rl.adapt.replay import Replay
from atlas_rl.adapt.retrainer import Retrainer
from atlas_rl.attachment import Attachment
from atlas_rl.bench.output_law import TIE_MARGIN, first_difference
from atlas_rl.bench.probe import LOOKAHEAD, Probe, duplicate
from atlas_rl.bench.recorded_run import RecordedRun, RecordedStep
from atlas_rl.config import AdaptConfig, AtlasConfig
from atlas_rl.drafters import load_drafter
from atlas_rl.drafters.base import Drafter
from atlas_rl.drafters.checkpoints import load_head
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import Rollout, SamplingParams

MODES: dict[str, AtlasConfig] = {
    "plain": AtlasConfig(speculate=False),
    "suffix": AtlasConfig(drafters=("suffix",)),
    "static": AtlasConfig(drafters=("static",), retrain="never"),
    "never": AtlasConfig(retrain="never"),
    "on_drift": AtlasConfig(retrain="on_drift"),
    "every_update": AtlasConfig(),
}
"""All drafters but where one is named; the last three differ in when the adaptive one is retrained."""
ROLLOUT_FIGURES = ("tokens_per_s", "tokens_per_decode_step", "completion_tokens", "seconds", "arms", "retrain")


class Mode:
    """One way of drafting, as it lives through a run: what a trainer's callback would hold."""

    def __init__(self, name: str, policy: PreTrainedModel, static_drafter: str, num_steps: int) -> None:
        self.name = name
        self.attachment = Attachment(policy, policy, None, replace(MODES[name], static_drafter=static_drafter))
        self.attachment.follow(SimpleNamespace(global_step=0, max_steps=num_steps))
        self.engine = self.attachment.ready_engine()
        self.drafters = self.attachment.adaptation.drafters

    @property
    def drafter(self) -> Drafter | None:
        """The one to look at: the adaptive drafter if there is one, or else the static one, or the suffix drafter."""
        neural = [d for d in self.drafters.all if d.layers is not None]
        return self.drafters.adaptive or next(iter(neural or self.drafters.all), None)

    def rollout(
        self, index: int, step: RecordedStep, sampling: SamplingParams, interval: float
    ) -> tuple[list[Rollout], dict[str, Any]]:
        """The step's rollouts by the policy as it is, and their figures, after the update that comes before them."""
        self.attachment.state.global_step = index
        self.attachment.adaptation.last_update = time.perf_counter() - interval
        self.engine.weights_changed = True
        rollouts = self.engine.generate(step.requests, sampling)
        row = self.engine.stats.to_dict()
        return rollouts, {name: row[name] for name in ROLLOUT_FIGURES if name in row}


def replay_run(
    policy: PreTrainedModel,
    run: RecordedRun,
    probe: Probe,
    static_drafter: str,
    modes: Iterable[str],
    num_probes: int,
) -> dict[str, Any]:
    """Figures of every mode at every step, and of its drafter at some. `policy` ends as the run's last one.

    Raises:
        AssertionError: a mode made other tokens than the run did, and no float tie explains it.
    """
    policy.load_state_dict(run.steps[0].weights)
    lived = [Mode(name, policy, static_drafter, len(run.steps)) for name in modes]
    try:
        return _replay(policy, run, probe, lived, num_probes)
    finally:
        for mode in reversed(lived):
            mode.attachment.close()


def _replay(
    policy: PreTrainedModel, run: RecordedRun, probe: Probe, lived: list[Mode], num_probes: int
) -> dict[str, Any]:
    looked_at = probed_steps(len(run.steps), num_probes)
    result: dict[str, Any] = {"steps": [], "float_ties": 0, "modes": {mode.name: {"steps": []} for mode in lived}}
    for index, step in enumerate(tqdm(run.steps, desc="replaying the run", unit="step")):
        policy.load_state_dict(step.weights)
        facts: dict[str, Any] = {"step": index, "rl_seconds": step.seconds}
        interval = run.steps[index - 1].seconds
        first = index % len(lived)  # whoever goes first finds cold caches
        for mode in lived[first:] + lived[:first]:
            rollouts, figures = mode.rollout(index, step, run.sampling, interval)
            result["float_ties"] += count_ties(policy, step, rollouts, run.sampling)
            result["modes"][mode.name]["steps"].append({"step": index} | figures)
        if index in looked_at:
            facts |= probe.look()
            _probe_all(lived, probe, result["modes"])
        result["steps"].append(facts)
    return result


def probed_steps(num_steps: int, num_probes: int) -> set[int]:
    """The first, the last, and some evenly between."""
    return {round(i * (num_steps - 1) / max(1, num_probes - 1)) for i in range(num_probes)}


def count_ties(
    policy: PreTrainedModel, step: RecordedStep, rollouts: Sequence[Rollout], sampling: SamplingParams
) -> int:
    """Completions that differ from the recorded ones, each because of a float tie."""
    differing = 0
    for request, expected, rollout in zip(step.requests, step.completions, rollouts, strict=True):
        if rollout.token_ids != expected:
            difference = first_difference(policy, request, sampling, expected, rollout.token_ids)
            assert difference.gap <= TIE_MARGIN[policy.dtype], f"other tokens, and no tie: {difference}"
            differing += 1
    return differing


def _probe_all(modes: Sequence[Mode], probe: Probe, results: dict[str, Any]) -> None:
    """Append to each mode's last step; a frozen drafter that two modes have is measured once."""
    known: dict[str, dict[str, Any]] = {}
    for mode in modes:
        drafter = mode.drafter
        if drafter is None:
            continue
        key = mode.name if drafter is mode.drafters.adaptive else drafter.name
        if key not in known:
            known[key] = probe.measure(drafter)
        results[mode.name]["steps"][-1]["probe"] = known[key]


# ---- how much retraining -----------------------------------------------------------------------------------------------------


class Learner:
    """A head that is given a fixed share of the run's time, whether it pays or not: it saves up until an update fits."""

    def __init__(self, drafter: RecurrentDrafter, share: float, sampling: SamplingParams, config: AdaptConfig) -> None:
        self.drafter, self.share = duplicate(drafter), share
        self.sampling = sampling
        self.retrainer = Retrainer(self.drafter, config, "every_update")
        self.saved = self.step_seconds = self.fixed_seconds = 0.0
        self.interval_seconds = 0.0

    def learn(self, view: PolicyView, replay: Replay, interval: float) -> None:
        """From the last rollouts, for the policy as it is now."""
        self.interval_seconds += interval
        self.saved += self.share * interval
        num_steps = int((self.saved - self.fixed_seconds) / self.step_seconds) if self.step_seconds else 1
        if num_steps < 1:
            self.retrainer.kept.append(replay)
            return
        self.retrainer.capture.take = lambda: replay
        self.retrainer.capture.sampling = self.sampling
        stats = self.retrainer.train(view, num_steps)
        if stats is None:
            return
        self.saved -= stats.seconds
        self.step_seconds = self.retrainer.step_seconds / stats.steps
        self.fixed_seconds = stats.seconds - self.retrainer.step_seconds

    def figures(self, probe: Probe) -> dict[str, Any]:
        totals = self.retrainer.totals
        return {
            "share": self.share,
            "share_spent": totals.seconds / self.interval_seconds,
            "retrain_seconds": totals.seconds,
            "optimizer_steps": totals.steps,
            "updates": totals.updates,
            "kept": totals.kept,
            "probe": probe.measure(self.drafter),
        }


def sweep_shares(
    policy: PreTrainedModel,
    run: RecordedRun,
    probe: Probe,
    static_drafter: str,
    shares: Iterable[float],
    converge: dict[str, Any],
) -> dict[str, Any]:
    """What is left at the run's end of a head that was given such shares of it; beside it the head as it was at the start, and
    one that was trained for the last policy alone (`converge`: minutes or steps of `distill`).

    All learn from the same captured rollouts: the rollouts do not depend on the drafter.
    """
    policy.load_state_dict(run.steps[0].weights)
    view, frozen = PolicyView(policy), load_drafter(static_drafter)
    if not isinstance(frozen, RecurrentDrafter):
        raise ValueError(f"{static_drafter} holds no recurrent head: only those are retrained")
    config = AdaptConfig()
    engine = RolloutEngine(view, AtlasConfig(lookahead=LOOKAHEAD), frozen)
    capture = engine.speculator.listener = Capture(frozen.layers, config.max_tokens)
    learners = [Learner(frozen, share, run.sampling, config) for share in shares]
    captured: Replay | None = None
    for index, step in enumerate(tqdm(run.steps, desc="sweeping shares", unit="step")):
        policy.load_state_dict(step.weights)
        for learner in learners if captured is not None else ():
            learner.learn(view, captured, run.steps[index - 1].seconds)
        engine.weights_changed = True
        engine.generate(step.requests, run.sampling)
        captured = capture.take()
    final = load_head(static_drafter)
    made = distill(view, run.prompts, final, DistillConfig(sampling=run.sampling, **converge))
    look = probe.look()
    best = probe.measure(RecurrentDrafter(final))
    swept = [learner.figures(probe) for learner in learners]
    for row in swept:
        row["of_converged"] = row["probe"]["tokens_per_decode_step"] / best["tokens_per_decode_step"]
    return {
        "policy": look,
        "converged": {"probe": best, "seconds": made.seconds, "optimizer_steps": made.steps},
        "frozen": {"probe": probe.measure(load_drafter(static_drafter))},
        "shares": swept,
    }


# ---- the figures that matter -------------------------------------------------------------------------------------------------


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """Ratios of modes, where both were run: tokens/s over the whole run and over its last third, retraining included, and tokens
    per step at the end; and the highest KL."""
    modes = result["modes"]
    speeds = {
        name: (_speed(mode["steps"]), _speed(mode["steps"][-max(1, len(mode["steps"]) // 3) :]))
        for name, mode in modes.items()
    }
    last = {name: mode["steps"][-1].get("probe", {}).get("tokens_per_decode_step") for name, mode in modes.items()}
    summary: dict[str, Any] = {
        "max_kl": max(step["kl"] for step in result["steps"] if "kl" in step),
        "tokens_per_s": {name: whole for name, (whole, _) in speeds.items()},
        "retrain_seconds": {
            name: sum(s.get("retrain", {}).get("seconds", 0) for s in m["steps"]) for name, m in modes.items()
        },
        "ratios": {},
    }
    for above, below in RATIOS:
        if above in modes and below in modes:
            ratio = {
                "tokens_per_s": speeds[above][0] / speeds[below][0],
                "tokens_per_s_last_third": speeds[above][1] / speeds[below][1],
            }
            if last[above] and last[below]:
                ratio["tokens_per_decode_step_at_the_end"] = last[above] / last[below]
            summary["ratios"][f"{above}/{below}"] = ratio
    return summary


RATIOS = (
    ("every_update", "never"),
    ("every_update", "on_drift"),
    ("every_update", "suffix"),
    ("every_update", "plain"),
    ("static", "plain"),
    ("suffix", "plain"),
)


def _speed(steps: Sequence[dict[str, Any]]) -> float:
    return sum(s["completion_tokens"] for s in steps) / sum(s["seconds"]["total"] for s in steps)
