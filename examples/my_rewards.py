"""A reward of your own, for `atlas-rl train --reward_funcs my_rewards.exact_match` from the folder that holds this file.

TRL calls it with the completions and every column of the data set, and expects one number per completion.
"""


def exact_match(completions: list[str], answer: list[str], **columns: list) -> list[float]:
    """1 where the completion's last word is the answer, else 0."""
    words = [completion.split() for completion in completions]
    return [float(bool(said) and said[-1] == right) for said, right in zip(words, answer, strict=True)]
