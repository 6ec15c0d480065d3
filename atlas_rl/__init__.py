"""Atlas-RL: fast, exact rollouts for TRL trainers.

Public names are imported on first use, so that `import atlas_rl` (and `atlas-rl --help`) needs neither torch nor transformers.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "AtlasConfig": "atlas_rl.config",
    "AtlasRolloutGenerator": "atlas_rl.generator",
    "EngineConfig": "atlas_rl.config",
    "Rollout": "atlas_rl.types",
    "SamplingParams": "atlas_rl.types",
    "last_complete_checkpoint": "atlas_rl.checkpoints",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'atlas_rl' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
