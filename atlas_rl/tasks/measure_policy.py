"""Measures a policy on fresh held-out prompts, sampled at temperature 1 without any filter.

    python -m atlas_rl.tasks.measure_policy                       # the shipped policy
    python -m atlas_rl.tasks.measure_policy runs/my_policy --num-prompts 512

Prints mean reward (reasoning-gym's verifiers), mean token entropy, the distribution of completion lengths, the share of
completions that ended by themselves, and the reward by task and by style of solution.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from atlas_rl.tasks import policy_path
from atlas_rl.tasks.mix import TaskItem, draw_items
from atlas_rl.tasks.reward import score_completion
from atlas_rl.tasks.solutions import style_of

HELD_OUT_SEED = 900
MAX_NEW_TOKENS = 288


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> tuple[list[list[int]], torch.Tensor]:
    """Completions at T = 1 (EOS included where reached) and the entropy of every token's distribution."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**batch, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
    width = batch.input_ids.shape[1]
    new_BT = out[:, width:]
    ended_BT = new_BT == tokenizer.eos_token_id
    # a token counts up to and with the first EOS
    mask_BT = (ended_BT.cumsum(1) - ended_BT.long()) == 0
    attention = torch.cat([batch.attention_mask, mask_BT.long()], 1)
    logits_BTV = model(input_ids=out, attention_mask=attention).logits[:, width - 1 : -1].float()
    logp_BTV = logits_BTV.log_softmax(-1)
    entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
    completions = [row[keep].tolist() for row, keep in zip(new_BT, mask_BT, strict=True)]
    return completions, entropy_BT[mask_BT]


def _mean_by(key: Callable[[dict[str, Any]], str], rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return {
        name: {
            "share": round(len(group) / len(rows), 3),
            "reward": round(sum(row["reward"] for row in group) / len(group), 3),
            "length": round(sum(row["length"] for row in group) / len(group), 1),
        }
        for name, group in sorted(groups.items())
    }


def summarize(rows: list[dict[str, Any]], entropies: torch.Tensor) -> dict[str, Any]:
    lengths = torch.tensor([row["length"] for row in rows], dtype=torch.float64)
    median, p95 = torch.quantile(lengths, torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    return {
        "completions": len(rows),
        "reward": round(sum(row["reward"] for row in rows) / len(rows), 3),
        "entropy_nats": round(entropies.mean().item(), 3),
        "ended_by_eos": round(sum(row["ended"] for row in rows) / len(rows), 4),
        "length": {"median": median, "mean": round(lengths.mean().item(), 1), "p95": p95, "max": lengths.max().item()},
        "p95_over_median": round(p95 / median, 2),
        "max_over_mean": round((lengths.max() / lengths.mean()).item(), 2),
        "by_task": _mean_by(lambda row: row["task"], rows),
        "by_style": _mean_by(lambda row: row["style"], rows),
    }


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_prompts: int = 512,
    batch_size: int = 128,
    seed: int = HELD_OUT_SEED,
) -> dict[str, Any]:
    """One completion per held-out prompt; returns the figures that `policy.json` records."""
    model.eval()
    torch.manual_seed(seed)
    items: list[TaskItem] = list(islice(draw_items(seed), num_prompts))
    rows, entropies = [], []
    for start in tqdm(range(0, num_prompts, batch_size), desc="sampling", unit="batch"):
        part = items[start : start + batch_size]
        completions, entropy = sample(model, tokenizer, [item.prompt for item in part])
        entropies.append(entropy)
        for item, ids in zip(part, completions, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            rows.append(
                {
                    "task": item.task,
                    "style": style_of(text) or "other",
                    "length": len(ids),
                    "ended": ids[-1] == tokenizer.eos_token_id,
                    "reward": score_completion(item.task, item.answer, item.metadata, text),
                }
            )
    return summarize(rows, torch.cat(entropies))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "policy", nargs="?", default=policy_path(), help="folder of the policy (default: the shipped one)"
    )
    parser.add_argument("--num-prompts", type=int, default=512, help="held-out prompts, one completion each")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED, help="seed of prompts and sampling")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.policy, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    print(json.dumps(measure(model, tokenizer, args.num_prompts, seed=args.seed), indent=2))


if __name__ == "__main__":
    main()
