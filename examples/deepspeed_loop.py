"""An RL loop on DeepSpeed alone, without TRL: rollouts by Atlas, under any ZeRO stage.

    deepspeed --num_gpus 2 examples/deepspeed_loop.py --zero_stage 3          (CPU: --num_accelerators 2)
    torchrun --nproc_per_node 2 examples/deepspeed_loop.py --zero_stage 2

Groups of completions per prompt, advantages relative to the group, one policy-gradient step on them. Swap in your own model,
prompts and reward.
"""

import argparse
import json

import deepspeed
import torch
from deepspeed.runtime.rollout import RolloutRequest, SamplingConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from atlas_rl.deepspeed import AtlasRollout
from atlas_rl.tasks import build_dataset, policy_path, reasoning_gym_reward


def main() -> None:
    args = parse_arguments()
    deepspeed.init_distributed()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(args))
    rollout = AtlasRollout(engine, tokenizer, max_steps=args.steps, output_dir=args.output_dir)
    sampling = SamplingConfig(max_new_tokens=args.max_new_tokens, n_samples_per_prompt=args.samples)

    tasks = list(build_dataset(args.prompts * world_size * args.steps, seed=0))
    for step in range(args.steps):
        start = (step * world_size + rank) * args.prompts
        rows = tasks[start : start + args.prompts]
        inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True).to(engine.device)
        batch = rollout.generate(RolloutRequest(inputs.input_ids, inputs.attention_mask), sampling)
        rewards = score(tokenizer, batch, [row for row in rows for _ in range(args.samples)])
        engine.backward(policy_loss(engine, batch, rewards.view(-1, args.samples)))
        engine.step()
        rollout.sync_weights(step + 1)
        report(step + 1, rewards, rollout)
    rollout.shutdown()
    torch.distributed.destroy_process_group()


def score(tokenizer, batch, rows) -> torch.Tensor:
    """[B] rewards of a batch's completions."""
    is_response = torch.arange(batch.seq_len, device=batch.input_ids.device) >= batch.response_start_idx[:, None]
    kept = batch.attention_mask.bool() & is_response
    texts = [tokenizer.decode(ids[k], skip_special_tokens=True) for ids, k in zip(batch.input_ids, kept)]
    columns = {name: [row[name] for row in rows] for name in ("task", "answer", "metadata")}
    return torch.tensor(reasoning_gym_reward([row["prompt"] for row in rows], texts, **columns))


def policy_loss(engine, batch, rewards: torch.Tensor) -> torch.Tensor:
    """Mean over response tokens of -advantage · log-prob; rewards are [prompts, samples]."""
    spread = rewards.std(dim=1, keepdim=True)
    advantages = ((rewards - rewards.mean(dim=1, keepdim=True)) / (spread + 1e-4)).view(-1, 1).to(engine.device)
    logits = engine(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
    targets = batch.input_ids[:, 1:]
    logprobs = torch.log_softmax(logits, dim=-1).gather(2, targets[:, :, None])[:, :, 0]
    is_response = torch.arange(1, batch.seq_len, device=targets.device) >= batch.response_start_idx[:, None]
    weights = (batch.attention_mask[:, 1:] * is_response).float()
    return -(advantages * logprobs * weights).sum() / weights.sum().clamp(min=1)


def report(step: int, rewards: torch.Tensor, rollout: AtlasRollout) -> None:
    mean = rewards.mean()
    torch.distributed.all_reduce(mean := mean.to(rollout.engine.device))
    figures = rollout.stats.to_dict()
    if torch.distributed.get_rank() == 0:
        reward = mean.item() / torch.distributed.get_world_size()
        shown = {name: round(figures[name], 3) for name in ("tokens_per_s", "speedup_estimate") if name in figures}
        print(f"step {step}: reward {reward:.3f} {json.dumps(shown)}", flush=True)


def deepspeed_config(args: argparse.Namespace) -> dict:
    return {
        "train_micro_batch_size_per_gpu": args.prompts * args.samples,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": args.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": torch.cuda.is_available()},
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=policy_path())
    parser.add_argument("--output_dir", default="runs/deepspeed_loop", help="for rollouts.jsonl")
    parser.add_argument("--zero_stage", type=int, default=2, choices=range(4))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=4, help="per rank and step")
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the launcher's
    return parser.parse_args()


if __name__ == "__main__":
    main()
