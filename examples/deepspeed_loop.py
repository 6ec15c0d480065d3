"""An RL loop on DeepSpeed alone, without TRL: rollouts by Atlas, under any ZeRO stage.

    deepspeed --num_gpus 2 examples/deepspeed_loop.py --zero_stage 3          (on CPU: --num_accelerators 2)
    torchrun --nproc_per_node 2 examples/deepspeed_loop.py --zero_stage 2
    python examples/deepspeed_loop.py                                         (one process)

Groups of completions per prompt, advantages relative to the group, one policy-gradient step on them. Swap in your own model,
prompts and reward. A run that was killed goes on with --resume, if it has saved (--save_steps).
"""

import argparse
import os
import warnings
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.rollout import ResponseTokenBatch, RolloutBatch, RolloutRequest, SamplingConfig
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from atlas_rl import AtlasConfig
from atlas_rl.deepspeed import AtlasRollout
from atlas_rl.tasks import build_dataset, policy_path, reasoning_gym_reward
from atlas_rl.telemetry.summary import summarize_run

ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
"""What a launcher sets."""


def main() -> None:
    args = parse_arguments()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # how DeepSpeed calls it
    for name, value in ONE_PROCESS.items():
        os.environ.setdefault(name, value)
    deepspeed.init_distributed()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(args))
    config = AtlasConfig(deterministic=args.deterministic)
    rollout = AtlasRollout(engine, tokenizer, config, max_steps=args.steps, output_dir=args.output_dir)
    sampling = SamplingConfig(max_new_tokens=args.max_new_tokens, n_samples_per_prompt=args.samples)
    if args.resume:
        tag = last_checkpoint(args.output_dir)
        engine.load_checkpoint(args.output_dir, tag)
        rollout.resume(f"{args.output_dir}/{tag}")

    # the same prompts at each step, so that twenty steps show how the policy learns
    rows = list(build_dataset(args.prompts * world_size, seed=0))[rank * args.prompts : (rank + 1) * args.prompts]
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True).to(engine.device)
    mean_rewards = []
    for step in range(engine.global_steps, args.steps):
        batch = rollout.generate(RolloutRequest(inputs.input_ids, inputs.attention_mask), sampling)
        rewards = score(tokenizer, batch, [row for row in rows for _ in range(args.samples)])
        engine.backward(policy_loss(engine, batch, rewards.view(-1, args.samples)))
        engine.step()
        rollout.sync_weights(step + 1)
        mean_rewards.append(mean_over_ranks(rewards, engine.device))
        if rank == 0:
            print_step(step + 1, args.steps, mean_rewards[-1], rollout)
        if args.save_steps and (step + 1) % args.save_steps == 0:
            engine.save_checkpoint(args.output_dir, tag=f"step-{step + 1}")
            rollout.save(f"{args.output_dir}/step-{step + 1}")
    rollout.shutdown()
    torch.distributed.barrier()  # all rows are written
    if rank == 0:
        summary = summarize_run(f"{args.output_dir}/rollouts.jsonl", [{"reward": mean} for mean in mean_rewards])
        Console().print(summary.to_table())
        print(f"Every rollout and step, with its figures: {summary.log_path}")
    torch.distributed.destroy_process_group()


def score(tokenizer, batch: RolloutBatch, rows: list[dict]) -> torch.Tensor:
    """[completions] rewards."""
    positions = torch.arange(batch.seq_len, device=batch.input_ids.device)
    is_response = batch.attention_mask.bool() & (positions >= batch.response_start_idx[:, None])
    texts = [tokenizer.decode(ids[kept], skip_special_tokens=True) for ids, kept in zip(batch.input_ids, is_response)]
    columns = {name: [row[name] for row in rows] for name in ("task", "answer", "metadata")}
    return torch.tensor(reasoning_gym_reward([row["prompt"] for row in rows], texts, **columns))


def policy_loss(engine, batch: RolloutBatch, rewards: torch.Tensor) -> torch.Tensor:
    """Mean over response tokens of -advantage · log-prob; rewards are [prompts, samples]."""
    spread = rewards.std(dim=1, keepdim=True)
    advantages = ((rewards - rewards.mean(dim=1, keepdim=True)) / (spread + 1e-4)).view(-1, 1).to(engine.device)
    targets = ResponseTokenBatch.from_rollout(batch)
    logits = targets.select_causal_logits(engine(batch.input_ids, attention_mask=batch.attention_mask).logits).float()
    logprobs = torch.log_softmax(logits, dim=-1).gather(2, targets.target_ids[:, :, None])[:, :, 0]
    return -(advantages * logprobs * targets.response_mask).sum() / targets.response_mask.sum().clamp(min=1)


def mean_over_ranks(rewards: torch.Tensor, device: torch.device) -> float:
    total = rewards.mean().to(device)
    torch.distributed.all_reduce(total)
    return total.item() / torch.distributed.get_world_size()


def print_step(step: int, steps: int, reward: float, rollout: AtlasRollout) -> None:
    figures = rollout.stats.to_dict()
    length = figures["completion_tokens"] / max(1, figures["num_completions"])
    speed = f"{figures['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in figures else ""
    idle = f"waited {figures['rank_idle_s']:.2f} s for other ranks" if "rank_idle_s" in figures else ""
    print(f"step {step}/{steps}  reward {reward:.3f}  length {length:.0f}  {speed}  {idle}".rstrip(), flush=True)


def last_checkpoint(folder: str) -> str:
    """The newest tag that all ranks have finished writing."""
    tags = [path.parent.name for path in Path(folder).glob("step-*/atlas")]
    if not tags:
        raise SystemExit(f"--resume: {folder} holds no complete checkpoint; a run makes them with --save_steps N")
    return max(tags, key=lambda tag: int(tag.removeprefix("step-")))


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
    parser.add_argument("--model", default=policy_path(), help="folder or hub id; default: the policy that Atlas ships")
    parser.add_argument("--output_dir", default="runs/deepspeed_loop", help="for rollouts.jsonl and checkpoints")
    parser.add_argument("--zero_stage", type=int, default=2, choices=range(4))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4, help="of each rank")
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--max_new_tokens", type=int, default=288)
    parser.add_argument("--learning_rate", type=float, default=1.2e-4)
    parser.add_argument("--save_steps", type=int, default=0, help="a checkpoint after so many steps; 0: none")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    parser.add_argument("--deterministic", action="store_true", help="a resumed run repeats an uninterrupted one")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser.parse_args()


if __name__ == "__main__":
    main()
