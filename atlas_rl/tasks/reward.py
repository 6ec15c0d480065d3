"""The reward: reasoning-gym's own verifier on the answer that a completion ends with."""

import json
from typing import Any

import reasoning_gym

from atlas_rl.tasks.solutions import ANSWER_PREFIX


def extract_answer(completion: str) -> str | None:
    """What follows the last `Answer:`, if that is the completion's last line; None where it never got there."""
    _, found, answer = completion.strip().rpartition(f"\n{ANSWER_PREFIX}")
    if not found or "\n" in answer.strip():
        return None
    return answer.strip() or None


def score_completion(task: str, answer: str, metadata: dict[str, Any], completion: str) -> float:
    verify = reasoning_gym.get_score_answer_fn(task)
    return float(verify(extract_answer(completion), {"answer": answer, "metadata": metadata}))


def _text(completion: str | list[dict[str, str]]) -> str:
    # TRL hands over a string for plain prompts and a list of messages for conversational ones
    return completion if isinstance(completion, str) else completion[-1]["content"]


def reasoning_gym_reward(
    prompts: list[Any],
    completions: list[Any],
    task: list[str],
    answer: list[str],
    metadata: list[str],
    **_: Any,
) -> list[float]:
    """Rewards in [0, 1] of `completions`, for TRL trainers: reasoning-gym's verdict on what follows the last `Answer:`.

    All arguments are as long. `prompts` is not read; `task`, `answer` and `metadata` are the columns of `build_dataset`.
    """
    assert len(prompts) == len(completions) == len(task)
    rows = zip(task, answer, metadata, completions, strict=True)
    return [score_completion(name, want, json.loads(meta), _text(completion)) for name, want, meta, completion in rows]
