"""The prompts of the embedded default run, as a `datasets.Dataset` for TRL."""

import json
from itertools import islice

from datasets import Dataset

from atlas_rl.tasks.mix import draw_items

# seeds of training text, held-out measurement and RL prompts never meet
RL_SEED_BASE = 1_000


def build_dataset(num_prompts: int = 64, seed: int = 0) -> Dataset:
    """`num_prompts` rows with columns `prompt`, `task`, `answer` and `metadata` (JSON), the same for the same `seed`.

    Raises:
        ValueError: `num_prompts` is below 1.
    """
    if num_prompts < 1:
        raise ValueError(f"num_prompts is {num_prompts}; ask for at least one prompt")
    items = islice(draw_items(RL_SEED_BASE + seed), num_prompts)
    return Dataset.from_list(
        [
            {"prompt": item.prompt, "task": item.task, "answer": item.answer, "metadata": json.dumps(item.metadata)}
            for item in items
        ]
    )
