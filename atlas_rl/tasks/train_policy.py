"""Trains the small policy of the embedded default run on worked solutions, from nothing, on a CPU.

    python -m atlas_rl.tasks.train_policy --out atlas_rl/tasks/policy             # what made the shipped policy
    python -m atlas_rl.tasks.train_policy --out /tmp/policy --steps 20            # a quick try of the script

The result is a Qwen3 decoder with its tokenizer, loadable by `AutoModelForCausalLM.from_pretrained`. `policy.json`
beside it records the command, the versions and the figures on held-out prompts (see `measure_policy`); `README.md` says the
same in words. About 30 minutes on two quiet cores.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from atlas_rl.tasks.measure_policy import measure
from atlas_rl.tasks.mix import TRAINING_LARGE_SHARE, draw_items
from atlas_rl.tasks.solutions import draw_style, write_solution
from atlas_rl.tasks.tokenizer import train_tokenizer

TOKENIZER_TEXTS = 4_000
POOL = 2_048  # examples sorted by length at a time, so that a batch holds hardly any padding
IGNORE = -100

Example = tuple[list[int], int]  # token ids, and how many of them belong to the prompt


def worked_examples(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, solution) pairs."""
    rng = Random(f"atlas-solutions-{seed}")
    for item in draw_items(seed, TRAINING_LARGE_SHARE):
        style = draw_style(item.large, rng)
        yield item.prompt, write_solution(item.task, item.metadata, item.answer, style, rng)


def tokenized(tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[Example]:
    for prompt, solution in worked_examples(seed):
        prompt_ids = tokenizer(prompt).input_ids
        yield [*prompt_ids, *tokenizer(solution).input_ids, tokenizer.eos_token_id], len(prompt_ids)


def batches(examples: Iterator[Example], tokens_per_batch: int, rng: Random) -> Iterator[list[Example]]:
    """Groups of examples of about the same length that fill `tokens_per_batch` with padding."""
    while True:
        pool = sorted(islice(examples, POOL), key=lambda example: len(example[0]))
        groups, group = [], []
        for example in pool:
            if (len(group) + 1) * len(example[0]) > tokens_per_batch:
                groups.append(group)
                group = []
            group.append(example)
        groups.append(group)
        rng.shuffle(groups)
        yield from groups


def collate(batch: list[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids_BL, labels_BL), right-padded; only the solution is learned, a prompt's numbers are chance."""
    width = max(len(ids) for ids, _ in batch)
    ids_BL = torch.full((len(batch), width), pad_id)
    labels_BL = torch.full((len(batch), width), IGNORE)
    for row, (ids, prompt_len) in enumerate(batch):
        ids_BL[row, : len(ids)] = torch.tensor(ids)
        labels_BL[row, prompt_len : len(ids)] = torch.tensor(ids[prompt_len:])
    return ids_BL, labels_BL


def new_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = min(100, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def new_optimizers(model: Qwen3ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms: about twice as quick per token as AdamW."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def loss_on(model: Qwen3ForCausalLM, ids_BL: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    hidden_BLD = model.model(input_ids=ids_BL, use_cache=False).last_hidden_state
    learned = labels_BL[:, 1:] != IGNORE
    logits_NV = model.lm_head(hidden_BLD[:, :-1][learned])
    return cross_entropy(logits_NV.float(), labels_BL[:, 1:][learned])


def train(args: argparse.Namespace) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    torch.manual_seed(args.seed)
    texts = (text for pair in islice(worked_examples(args.seed), TOKENIZER_TEXTS) for text in pair)
    tokenizer = train_tokenizer(texts)
    model = new_model(tokenizer).train()
    optimizers = new_optimizers(model, args.lr)
    stream = batches(tokenized(tokenizer, args.seed), args.tokens_per_batch, Random(args.seed))
    progress = tqdm(islice(stream, args.steps), total=args.steps, desc="training", unit="step")
    smoothed = None
    for step, batch in enumerate(progress):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, args.steps, args.lr)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_on(model, *collate(batch, tokenizer.pad_token_id))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        smoothed = loss.item() if smoothed is None else 0.98 * smoothed + 0.02 * loss.item()
        progress.set_postfix(loss=f"{smoothed:.3f}", refresh=False)
    return model, tokenizer


def save_record(out: Path, record: dict[str, Any]) -> None:
    (out / "policy.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / "README.md").write_text(model_card(record))


def model_card(record: dict[str, Any]) -> str:
    held_out, length = record["held_out"], record["held_out"]["length"]
    return f"""# The policy of the embedded default run

A Qwen3 decoder of {record["parameters"]:,} parameters, trained from nothing on worked solutions of five reasoning-gym
tasks, in three styles of different reliability. It is the start of `atlas-rl train --config quickstart`.

Made by `{record["command"]}`
({record["training_seconds"]} s on two shared cores), to be made again with

    python -m atlas_rl.tasks.train_policy --out atlas_rl/tasks/policy

On {held_out["completions"]} held-out prompts at temperature 1: mean reward {held_out["reward"]}, token entropy \
{held_out["entropy_nats"]} nats, completion length median {length["median"]:.0f}, mean {length["mean"]:.0f}, 95th \
percentile {length["p95"]:.0f}, longest {length["max"]:.0f}; {held_out["ended_by_eos"]:.1%} ended by themselves.
`policy.json` holds all figures and the versions; `python -m atlas_rl.tasks.measure_policy` measures them again.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the policy to")
    parser.add_argument("--steps", type=int, default=1300, help="optimizer steps")
    parser.add_argument("--tokens-per-batch", type=int, default=8192, help="tokens of a batch, padding included")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data and their order")
    parser.add_argument("--measure", type=int, default=512, help="held-out prompts to measure on")
    args = parser.parse_args()
    started = time.monotonic()
    model, tokenizer = train(args)
    seconds = time.monotonic() - started
    # before measuring: a padded call would leave its padding in tokenizer.json
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    figures = measure(model, tokenizer, args.measure)
    record = {
        "command": f"python -m atlas_rl.tasks.train_policy --out {args.out} --steps {args.steps} "
        f"--tokens-per-batch {args.tokens_per_batch} --lr {args.lr} --seed {args.seed} --measure {args.measure}",
        "training_seconds": round(seconds),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "tokenizers", "reasoning_gym")},
        "held_out": figures,
    }
    save_record(args.out, record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
