"""Section `training`: rollouts follow weights that an optimizer changes in place, which graphs captured before read again.

A policy gradient of our own, small enough to be looked through: the reward of a completion is the share of one token in it, the
advantage its reward less its prompt's mean, over their spread.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import atlas_rl
from atlas_rl.adapt.adaptation import Adaptation
from atlas_rl.bench.gpu.section import Section
from atlas_rl.bench.workload import BenchConfig, WorkloadConfig, build_workload, load_policy
from atlas_rl.config import AtlasConfig
from atlas_rl.drafters import build_drafters
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import Rollout, RolloutRequest, SamplingParams

LEARNING_RATE = 3e-4
TOLERANCE = 2e-3
"""Between a rollout's log-prob and a teacher-forced forward's, in float32."""
QUICKSTART = Path(atlas_rl.__file__).parents[1] / "configs" / "quickstart.yaml"


def run(section: Section) -> None:
    loop = section.part("policy gradient", lambda: policy_gradient(section), needs=5)
    last, first = (None, 0.0) if loop is None else (loop["rewards"][-1], loop["rewards"][0])
    mismatch = loop and max(loop["mismatch"])
    section.judge("log-probs after each update: largest distance to a forward", mismatch, TOLERANCE, at_least=False)
    section.judge("policy gradient: reward of the last rollout over the first", last and last / max(first, 1e-9), 1.0)
    if loop is not None:
        drift = min(loop["drift"])
        section.judge(
            "policy gradient: log-probs that an update moves", drift, TOLERANCE
        )  # else the first says nothing
    if not section.plan.quickstart:
        return
    section.part("quickstart", lambda: quickstart(section.seconds_left), needs=30)


def policy_gradient(section: Section) -> dict[str, Any]:
    plan, machine = section.plan, section.machine
    policy = load_policy("shipped").to(machine.device)
    prompts = _prompts(section, policy)
    config, view = AtlasConfig(), PolicyView(policy)
    drafters = build_drafters(config, view)
    engine = RolloutEngine(view, config, drafters.all, graphs=machine.graphs)
    Adaptation(config, drafters).attach(engine)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    sampling, wanted = SamplingParams(max_new_tokens=plan.train_tokens, ignore_eos=True), None
    row: dict[str, Any] = {"rewards": [], "mismatch": [], "drift": [], "tokens_per_s": [], "decode_steps": []}
    for update in range(plan.updates + 1):
        requests = [
            RolloutRequest(prompt_ids=prompt, seed=1000 * update + i, max_new_tokens=plan.train_tokens)
            for i, prompt in enumerate(prompts)
        ]
        rollouts = engine.generate(requests, sampling)
        tokens = torch.tensor([rollout.token_ids for rollout in rollouts], device=machine.device)
        reported = torch.tensor([rollout.logprobs for rollout in rollouts], device=machine.device)
        if wanted is None:  # a token that is drawn now and then: there is something to learn from
            wanted = int(tokens.flatten().bincount().argmax())
        rewards = (tokens == wanted).float().mean(1)
        logprobs = _logprobs(policy, rollouts)
        row["rewards"].append(float(rewards.mean()))
        row["mismatch"].append(float((logprobs.detach() - reported).abs().max()))
        row["tokens_per_s"].append(engine.stats.completion_tokens / engine.stats.seconds["total"])
        row["decode_steps"].append(engine.stats.decode_steps)
        if update == plan.updates:
            break
        grouped = rewards.view(plan.train_prompts, plan.train_samples)
        advantages = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
        optimizer.zero_grad()
        (-(advantages.flatten()[:, None] * logprobs).mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            row["drift"].append(float((_logprobs(policy, rollouts) - reported).abs().max()))
    captured = engine.captured
    return row | {"not_captured": "never" if captured is None else captured.failure, "drafting": engine.stats.to_dict()}


def _prompts(section: Section, policy: PreTrainedModel) -> list[tuple[int, ...]]:
    plan = section.plan
    config = WorkloadConfig(name="training", num_prompts=plan.train_prompts, num_samples=1, new_tokens=None)
    prompts = build_workload(config, BenchConfig(), policy).batches[0].prompts
    return [prompt for prompt in prompts for _ in range(plan.train_samples)]


def _logprobs(policy: PreTrainedModel, rollouts: list[Rollout]) -> torch.Tensor:
    """[completions, tokens] by a forward over all of them, padded on the right, where causal attention does not look."""
    rows = [rollout.prompt_ids + rollout.token_ids for rollout in rollouts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=policy.device)
    logprobs = policy(ids).logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    starts = [len(rollout.prompt_ids) - 1 for rollout in rollouts]
    length = len(rollouts[0].token_ids)
    return torch.stack([row[start : start + length] for row, start in zip(logprobs, starts, strict=True)])


def quickstart(seconds: float) -> dict[str, Any]:
    """20 steps of the shipped run, in a process of its own, where TRL and the tasks are installed."""
    from importlib.util import find_spec

    missing = [name for name in ("trl", "datasets", "accelerate", "reasoning_gym", "dacite") if find_spec(name) is None]
    if missing or not QUICKSTART.exists():
        return {"skipped": f"not installed: {', '.join(missing)}" if missing else f"{QUICKSTART} is not there"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "atlas_rl", "train", "--config", str(QUICKSTART), "--max_steps", "20"]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)}
        options = {"capture_output": True, "text": True, "timeout": max(30.0, seconds), "cwd": folder, "env": env}
        result = subprocess.run([*command, "--output_dir", folder], **options)
    if result.returncode:
        raise RuntimeError(f"atlas-rl train ended with {result.returncode}: {result.stderr[-1500:]}")
    lines = [line for line in result.stdout.splitlines() if re.search(r"[A-Za-z]", line)]
    return {"summary": lines[-30:]}
