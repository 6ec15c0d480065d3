"""GRPO with TRL, rollouts by Atlas: the callback is the whole integration.

    python examples/grpo.py

Swap in your own model, data and reward; nothing else changes.
"""

from trl import GRPOConfig, GRPOTrainer

from atlas_rl import AtlasRolloutGenerator
from atlas_rl.tasks import build_dataset, policy_path, reasoning_gym_reward

trainer = GRPOTrainer(
    model=policy_path(),
    reward_funcs=reasoning_gym_reward,
    train_dataset=build_dataset(seed=0),
    args=GRPOConfig(
        output_dir="runs/example",
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=256,
        max_steps=5,
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
    ),
    callbacks=[AtlasRolloutGenerator()],
)
trainer.train()
