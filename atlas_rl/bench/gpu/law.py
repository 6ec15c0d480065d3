"""The output law on this device: the same completions with and without speculation, captured and not, but for float ties.

A first difference is a tie where the two tokens' perturbed scores, by a float32 forward over the tokens before, are no further
apart than two runs may err. How far one errs is measured: the largest error, over some completions, that transformers' own
forward in the policy's dtype makes in the gap between any two likely tokens of a place. In float32 it is DESIGN's 1e-4.
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
from atlas_rl.drafters.suffix import SuffixDrafter
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
LIKELY, NUM_MEASURED = 1e-2, 16
"""Probability of tokens, and number of completions, that the dtype's error is measured over."""


@torch.no_grad()
def check(section: Section, policy: PreTrainedModel) -> dict[str, Any]:
    plan, batch = section.plan, _batch(section, policy)
    exact = copy.deepcopy(policy).float()
    view, requests = PolicyView(policy), batch.requests()
    plain = RolloutEngine(view, AtlasConfig(speculate=False), graphs=section.machine.graphs)
    expected = plain.generate(requests, SAMPLING)
    errors = gap_errors(policy, exact, expected[:NUM_MEASURED])
    margin = TIE_MARGIN[torch.float32] if policy.dtype == torch.float32 else 2 * float(errors.max())
    variants = {}
    for name, config in VARIANTS.items():
        if config.drafters == ("suffix",) and SuffixDrafter.unavailable_reason() is not None:
            continue  # no C++ compiler
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
    quantiles = {str(q): float(errors.quantile(q)) for q in (0.5, 0.99, 1.0)}
    return {"tie_margin": margin, "gap_errors": quantiles, "tokens": batch.num_tokens, "variants": variants}


def gap_errors(policy: PreTrainedModel, exact: PreTrainedModel, rollouts: list[Rollout]) -> torch.Tensor:
    """By place: the largest error of the policy's forward in the gap between two likely tokens."""
    found = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.token_ids], device=policy.device)
        logits = exact(ids).logits[0]
        errors, is_likely = policy(ids).logits[0].float() - logits, logits.softmax(-1) >= LIKELY
        highest = errors.masked_fill(~is_likely, -torch.inf).amax(1)
        found.append(highest - errors.masked_fill(~is_likely, torch.inf).amin(1))
    return torch.cat(found)


def _batch(section: Section, policy: PreTrainedModel) -> Batch:
    """Some samples of each recorded prompt, all of one length: nothing ends early."""
    plan = section.plan
    config = WorkloadConfig(name="law", num_prompts=plan.draining_prompts, num_samples=8, new_tokens=None)
    batches = build_workload(config, BenchConfig(), policy).batches
    prompts = list(dict.fromkeys(prompt for batch in batches for prompt in batch.prompts))[: plan.law_prompts]
    rows = [prompt for prompt in prompts for _ in range(8)]
    return Batch(prompts=rows, seeds=list(range(len(rows))), lens=[plan.law_tokens] * len(rows))
