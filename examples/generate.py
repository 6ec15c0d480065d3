"""Fast sampling from a bare transformers model.

python examples/generate.py [MODEL_FOLDER]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from atlas_rl import AtlasRolloutGenerator, SamplingParams
from atlas_rl.tasks import build_dataset, policy_path

folder = sys.argv[1] if len(sys.argv) > 1 else policy_path()
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompts = tokenizer(list(build_dataset(4, seed=0)["prompt"]))["input_ids"]
sampling = SamplingParams(temperature=1.0, max_new_tokens=256, eos_token_ids=(tokenizer.eos_token_id,))

with AtlasRolloutGenerator().attach(model) as atlas:
    rollouts = atlas.generate(prompts, sampling=sampling, num_samples=4, seed=1)
    stats = atlas.stats.to_dict()

for rollout in rollouts[::4]:
    print("-" * 80)
    print(tokenizer.decode(rollout.prompt_ids + rollout.token_ids, skip_special_tokens=True))
print("-" * 80)
print(f"{len(rollouts)} completions, {stats['completion_tokens']:,} tokens, {stats['tokens_per_s']:,.0f} tokens/s")
