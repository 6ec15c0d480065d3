"""GRPO of LoRA adapters. Atlas decodes with merged copies of the adapted matrices; the base is shared, and never written.

python examples/lora_grpo.py
python examples/lora_grpo.py --model ./my-model --rank 32
"""

import argparse

from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from atlas_rl import AtlasRolloutGenerator
from atlas_rl.tasks import build_dataset, policy_path, reasoning_gym_reward


def main() -> None:
    args = parse_arguments()
    trainer = GRPOTrainer(
        model=args.model,
        reward_funcs=reasoning_gym_reward,
        train_dataset=build_dataset(seed=0),
        peft_config=LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        args=GRPOConfig(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=256,
            learning_rate=1e-4,
            logging_steps=1,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
        ),
        callbacks=[AtlasRolloutGenerator()],  # <- all there is to change
    )
    trainer.train()
    trainer.save_model(args.output_dir)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=policy_path(), help="folder or hub id; default: the policy that Atlas ships")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, default=5)
    parser.add_argument("--output_dir", default="runs/lora")
    return parser.parse_args()


if __name__ == "__main__":
    main()
