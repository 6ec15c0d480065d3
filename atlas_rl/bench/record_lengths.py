"""Record the draining batches: the shipped policy's own completion lengths, to be forced on every arm of a bench alike.

    python -m atlas_rl.bench.record_lengths            # writes atlas_rl/bench/draining.json, in less than a minute on one core

Each batch is a GRPO step of the embedded default run, with other prompts than the batches before it. The completions themselves
are not recorded: an arm of the engine makes the same ones from the same seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from atlas_rl.bench.workload import RECORDING, load_policy, policy_sha256, shipped_prompts
from atlas_rl.config import AtlasConfig
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.integrations.hf_generate import token_ids
from atlas_rl.types import RolloutRequest, SamplingParams

NUM_BATCHES, NUM_PROMPTS, NUM_SAMPLES = 12, 8, 8
MAX_NEW_TOKENS = 288
"""As in configs/quickstart.yaml."""


def natural_lens(policy: PreTrainedModel, prompts: list[tuple[int, ...]], seeds: list[int]) -> list[int]:
    """Tokens until EOS (included) at temperature 1, `NUM_SAMPLES` completions per prompt."""
    sampling = SamplingParams(temperature=1.0, eos_token_ids=token_ids(policy.generation_config.eos_token_id))
    requests = [
        RolloutRequest(prompt_ids=prompts[i // NUM_SAMPLES], seed=seed, max_new_tokens=MAX_NEW_TOKENS)
        for i, seed in enumerate(seeds)
    ]
    engine = RolloutEngine(PolicyView(policy), AtlasConfig(speculate=False))
    return [len(rollout.token_ids) for rollout in engine.generate(requests, sampling)]


def record() -> dict[str, Any]:
    policy = load_policy("shipped")
    num_prompts = NUM_BATCHES * NUM_PROMPTS
    prompts = list(dict.fromkeys(shipped_prompts(2 * num_prompts)))[:num_prompts]  # the tasks repeat one now and then
    batches = []
    for index in range(NUM_BATCHES):
        own = prompts[index * NUM_PROMPTS : (index + 1) * NUM_PROMPTS]
        seeds = [index * 1_000_003 + i for i in range(NUM_PROMPTS * NUM_SAMPLES)]
        batches.append({"prompts": own, "seeds": seeds, "lens": natural_lens(policy, own, seeds)})
    return {
        "policy_sha256": policy_sha256(),
        "sampling": {"temperature": 1.0, "max_new_tokens": MAX_NEW_TOKENS},
        "num_prompts": NUM_PROMPTS,
        "num_samples": NUM_SAMPLES,
        "batches": batches,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RECORDING, help="default: the file in the repository")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    recorded = record()
    batches = ",\n".join(json.dumps(batch) for batch in recorded.pop("batches"))
    args.out.write_text(f'{json.dumps(recorded)[:-1]}, "batches": [\n{batches}\n]}}\n')
    print(f"{args.out}: {NUM_BATCHES} batches of {NUM_PROMPTS} x {NUM_SAMPLES} completions")


if __name__ == "__main__":
    main()
