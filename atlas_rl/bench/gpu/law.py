"""The output law on this device: the same completions with and without speculation, captured and not, but for float ties.

A first difference is a tie where the two tokens' perturbed scores, by a float32 forward over the tokens before, are no further
apart than two runs may err. How far one errs is measured: the largest error, over some completions, that transformers' own
forward in the policy's dtype makes in the gap between any two of a place's likeliest tokens. In float32 it is DESIGN's 1e-4.
What comes after a first difference differs for that reason, and says nothing.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from atlas_rl.bench.gpu.section import Section
from atlas_rl.bench.output_law import TIE_MARGIN, first_difference
from atlas_rl.bench.workload import SAMPLING, Batch, BenchConfig, WorkloadConfig, build_workload
from atlas_rl.config import AtlasConfig, EngineConfig
from atlas_rl.drafters import build_drafters
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import Rollout

UNCAPTURED = EngineConfig(capture_steps=False)
VARIANTS = {
    "plain, uncaptured": AtlasConfig(speculate=False, engine=UNCAPTURED),
    "atlas": AtlasConfig(retrain="never"),
    "atlas, uncaptured": AtlasConfig(retrain="never", engine=UNCAPTURED),
    "static, lookahead 4": AtlasConfig(drafters=("static",), lookahead=4, retrain="never"),
    "suffix, lookahead 4": AtlasConfig(drafters=("suffix",), lookahead=4, retrain="never"),
}
LIKELIEST, NUM_MEASURED = 5, 16
"""Tokens of a place, and completions, that the dtype's error is measured over."""


@torch.no_grad()
def check(section: Section, policy: PreTrainedModel) -> dict[str, Any]:
    plan, batch = section.plan, _batch(section, policy)
    exact = copy.deepcopy(policy).float()
    view, requests = PolicyView(policy), batch.requests()
    plain = RolloutEngine(view, AtlasConfig(speculate=False), graphs=section.machine.graphs)
    expected = plain.generate(requests, SAMPLING)
    margin = tie_margin(policy, exact, expected[:NUM_MEASURED])
    variants = {}
    for name, config in VARIANTS.items():
        graphs = section.machine.graphs if config.engine.capture_steps else None
        engine = RolloutEngine(view, config, build_drafters(config, view).all, graphs=graphs)
        got = engine.generate(requests, SAMPLING)
        pairs = zip(requests, expected, got, strict=True)
        differences = [
            first_difference(exact, request, SAMPLING, a.token_ids, b.token_ids)
            for request, a, b in pairs
            if a.token_ids != b.token_ids
        ]
        # what follows a completion's first difference is no longer compared
        compared = batch.num_tokens - sum(plan.law_tokens - d.position - 1 for d in differences)
        gaps = sorted(d.gap for d in differences)
        variants[name] = {
            "tokens_compared": compared,
            "first_differences": len(differences),
            "per_million": 1e6 * len(differences) / compared,
            "violations": sum(not gap <= margin for gap in gaps),
            "largest_gaps": gaps[-5:],
            "tokens_per_decode_step": engine.stats.completion_tokens / engine.stats.row_steps,
            "captured": engine.captured is not None and engine.captured.failure is None,
        }
    return {"tie_margin": margin, "tokens": batch.num_tokens, "variants": variants}


def tie_margin(policy: PreTrainedModel, exact: PreTrainedModel, rollouts: list[Rollout]) -> float:
    if policy.dtype == torch.float32:
        return TIE_MARGIN[torch.float32]
    largest = 0.0
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.token_ids], device=policy.device)
        logits, errors = exact(ids).logits[0], policy(ids).logits[0].float()
        errors = (errors - logits).gather(1, logits.topk(LIKELIEST).indices)
        largest = max(largest, float((errors.amax(1) - errors.amin(1)).max()))
    return 2 * largest


def _batch(section: Section, policy: PreTrainedModel) -> Batch:
    """Some samples of each recorded prompt, all of one length: nothing ends early."""
    plan = section.plan
    config = WorkloadConfig(name="law", num_prompts=plan.draining_prompts, num_samples=8, new_tokens=None)
    batches = build_workload(config, BenchConfig(), policy).batches
    prompts = list(dict.fromkeys(prompt for batch in batches for prompt in batch.prompts))[: plan.law_prompts]
    rows = [prompt for prompt in prompts for _ in range(8)]
    return Batch(prompts=rows, seeds=list(range(len(rows))), lens=[plan.law_tokens] * len(rows))
