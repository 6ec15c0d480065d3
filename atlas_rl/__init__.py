"""Atlas-RL: fast, exact rollouts for TRL trainers.

Public names are imported on first use, so that `import atlas_rl` (and `atlas-rl --help`) needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atlas_rl.checkpoints import last_complete_checkpoint
    from atlas_rl.config import AdaptConfig, AtlasConfig, EngineConfig
    from atlas_rl.generator import AtlasRolloutGenerator
    from atlas_rl.types import Rollout, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "AdaptConfig",
    "AtlasConfig",
    "AtlasRolloutGenerator",
    "EngineConfig",
    "Rollout",
    "SamplingParams",
    "last_complete_checkpoint",
]

_HOMES = {
    "AdaptConfig": "atlas_rl.config",
    "AtlasConfig": "atlas_rl.config",
    "AtlasRolloutGenerator": "atlas_rl.generator",
    "EngineConfig": "atlas_rl.config",
    "Rollout": "atlas_rl.types",
    "SamplingParams": "atlas_rl.types",
    "last_complete_checkpoint": "atlas_rl.checkpoints",
}


if not TYPE_CHECKING:  # a type checker takes no name for granted

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'atlas_rl' has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
