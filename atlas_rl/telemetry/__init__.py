"""What a rollout cost and what it bought: figures, `rollouts.jsonl`, trainer metrics, the console."""
