"""The rollout engine: prompts in, completions out."""
