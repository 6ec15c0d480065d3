"""Verifiable tasks and the small policy for the embedded default run.

`atlas-rl train --config quickstart` trains the shipped policy (`policy_path()`) by GRPO on the prompts of
`build_dataset()`, rewarded by `reasoning_gym_reward`: reasoning-gym's own verifiers. Importing this package is cheap;
what needs reasoning_gym or datasets is imported on first use.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["build_dataset", "policy_path", "reasoning_gym_reward"]

_HOMES = {"build_dataset": "atlas_rl.tasks.dataset", "reasoning_gym_reward": "atlas_rl.tasks.reward"}


def policy_path() -> str:
    """Folder of the shipped policy, for `from_pretrained`."""
    return str(Path(__file__).parent / "policy")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "reasoning_gym":
            raise
        raise ModuleNotFoundError("the shipped tasks need reasoning-gym: pip install 'atlas-rl[tasks]'") from error
