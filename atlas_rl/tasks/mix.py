"""The task mix: five reasoning-gym tasks, each in a usual and a rare large size.

The rare size (one item in six to eight) is what makes completions long-tailed, as they are in real RL on verifiable tasks:
most rollouts of a batch finish early and a few decide when the batch is done.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset

TRAINING_LARGE_SHARE = 0.12  # in the worked solutions
ROLLOUT_LARGE_SHARE = 0.16  # in the prompts of RL and of measurements, where the tail is the point
# reasoning-gym draws item i from Random(seed + i), so seeds of different datasets must lie far apart
SEED_STRIDE = 10_000_019
ITEMS_PER_SEED = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """One reasoning-gym task with the settings of its usual and its large items."""

    name: str
    usual: dict[str, Any]
    large: dict[str, Any]


TASKS: tuple[TaskSpec, ...] = (
    TaskSpec(
        name="chain_sum",
        usual={"min_terms": 5, "max_terms": 7, "min_digits": 2, "max_digits": 2},
        large={"min_terms": 11, "max_terms": 12, "min_digits": 2, "max_digits": 2},
    ),
    TaskSpec(name="count_bits", usual={"min_n": 64, "max_n": 1023}, large={"min_n": 32768, "max_n": 131071}),
    TaskSpec(
        name="gcd",
        usual={"min_value": 10, "max_value": 250, "max_numbers": 3},
        large={"min_value": 30, "max_value": 300, "min_numbers": 6, "max_numbers": 7},
    ),
    TaskSpec(
        name="letter_counting",
        usual={"min_words": 6, "max_words": 8},
        large={"min_words": 16, "max_words": 17},
    ),
    TaskSpec(
        name="leg_counting",
        usual={"min_animals": 4, "max_animals": 5},
        large={"min_animals": 9, "max_animals": 10},
    ),
)
TASK_NAMES = tuple(spec.name for spec in TASKS)


@dataclass(frozen=True, slots=True)
class TaskItem:
    """A reasoning-gym entry and the task that can score it."""

    task: str
    question: str
    answer: str
    metadata: dict[str, Any]
    large: bool

    @property
    def prompt(self) -> str:
        return self.question.strip() + "\n"


@cache
def _source(spec_index: int, large: bool, seed: int) -> ProceduralDataset:
    spec = TASKS[spec_index]
    # the offset keeps the sources of one seed apart; the modulus keeps the sum in 64 bits for numpy users
    offset = (seed * 2 * len(TASKS) + 2 * spec_index + large) * SEED_STRIDE % 2**62
    settings = spec.large if large else spec.usual
    return reasoning_gym.create_dataset(spec.name, seed=offset, size=ITEMS_PER_SEED, **settings)


def draw_items(seed: int, large_share: float = ROLLOUT_LARGE_SHARE) -> Iterator[TaskItem]:
    """Endless stream of items, the same for the same seed."""
    rng = Random(f"atlas-tasks-{seed}")
    for index in range(ITEMS_PER_SEED):
        spec_index = rng.randrange(len(TASKS))
        large = rng.random() < large_share
        entry = _source(spec_index, large, seed)[index]
        yield TaskItem(TASKS[spec_index].name, entry["question"], entry["answer"], entry["metadata"], large)
