"""Faster `model.generate`, without any RL: the same call before and after, and how many tokens a second each makes.

    python examples/generate.py                     the small policy that ships with Atlas-RL
    python examples/generate.py --model ./my-model

Everything is seeded alike. transformers draws by random numbers of its own, so that its completions differ from Atlas'; with and
without drafts Atlas makes the same ones, token for token.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atlas_rl import AtlasConfig, AtlasRolloutGenerator
from atlas_rl.tasks import build_dataset, policy_path


def main() -> None:
    args = parse_arguments()
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(list(build_dataset(args.prompts, seed=0)["prompt"]), return_tensors="pt", padding=True)

    def generate() -> torch.Tensor:
        torch.manual_seed(args.seed)
        return model.generate(
            **inputs, do_sample=True, top_k=0, max_new_tokens=args.tokens, num_return_sequences=args.samples
        )

    width = inputs.input_ids.shape[1]
    measure("transformers", generate, width, tokenizer)
    outputs = []
    for name, config in {"Atlas, no drafts": AtlasConfig(speculate=False), "Atlas": AtlasConfig()}.items():
        with AtlasRolloutGenerator(config).attach(model):  # <- all there is to change
            outputs.append(measure(name, generate, width, tokenizer))
    print("the same tokens with and without drafts:", torch.equal(*outputs))
    print("-" * 80)
    print(tokenizer.decode(outputs[-1][0], skip_special_tokens=True))


def measure(name: str, generate, width: int, tokenizer) -> torch.Tensor:
    """The output of a second call: the first one may compile, allocate and look around."""
    generate()
    start = time.perf_counter()
    output = generate()
    seconds = time.perf_counter() - start
    tokens = int((output[:, width:] != tokenizer.pad_token_id).sum())
    print(f"{name:18s} {len(output)} completions, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s")
    return output


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=policy_path(), help="folder or hub id; default: the policy that Atlas ships")
    parser.add_argument("--prompts", type=int, default=4, help="of the shipped tasks (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="per prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of a completion at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
