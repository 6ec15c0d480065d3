"""GRPO under DeepSpeed ZeRO-3: weights sharded over all processes, gathered once per policy update into a copy that decodes.

    torchrun --nproc_per_node 8 examples/zero3_grpo.py --model Qwen/Qwen3-8B
    torchrun --nproc_per_node 8 examples/zero3_grpo.py --model Qwen/Qwen3-32B --deepspeed configs/deepspeed/zero3_offload.json

The script is what it would be on one GPU, but for `deepspeed=`; the launcher starts one process per GPU. A rehearsal on a machine
without GPUs is easier by `atlas-rl train --config my.yaml --accelerate_config configs/accelerate/zero3_cpu.yaml`.
"""

import argparse

from trl import GRPOConfig, GRPOTrainer

from atlas_rl import AtlasRolloutGenerator, last_complete_checkpoint
from atlas_rl.tasks import build_dataset, policy_path, reasoning_gym_reward


def main() -> None:
    args = parse_arguments()
    config = GRPOConfig(  # before the model: from then on it is loaded in shards
        output_dir=args.output_dir,
        deepspeed=args.deepspeed,
        max_steps=args.max_steps,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=512,
        learning_rate=1e-6,
        logging_steps=1,
        save_steps=20,
        save_total_limit=2,  # the older one is deleted before the newer is complete
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=args.model,
        reward_funcs=reasoning_gym_reward,
        train_dataset=build_dataset(seed=0),
        args=config,
        callbacks=[AtlasRolloutGenerator()],  # <- all there is to change
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))  # None: from the start


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=policy_path(), help="folder or hub id; default: the policy that Atlas ships")
    parser.add_argument("--deepspeed", default="configs/deepspeed/zero3.json", help="default: %(default)s")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--output_dir", default="runs/zero3")
    return parser.parse_args()


if __name__ == "__main__":
    main()
