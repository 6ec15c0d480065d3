"""AtlasConfig: one tree of frozen dataclasses, one YAML. `AtlasConfig()` needs no argument."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

CONFIGS = Path(__file__).parent / "configs"
"""What comes with Atlas-RL: `configs/` of the repository, to which this is a link there."""
DRAFTER_NAMES = ("suffix", "recurrent", "static")
RETRAIN = ("every_update", "on_drift", "never")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Expert settings of the rollout engine."""

    block_size: int = 16
    """Tokens per KV block."""
    kv_memory_gib: float | None = None
    """Upper bound of the KV cache in GiB; None takes half of the memory that is free when a rollout starts."""
    max_num_seqs: int = 256
    """Sequences that decode at once; the others wait."""
    max_prefill_tokens: int = 2048
    """Prompt tokens per prefill forward; longer prompts are prefilled in chunks."""
    pack_linears: bool = True
    """On CPU, in float32: pack the Linear weights for few-row products (one extra copy), and run Llama-like layers fused."""

    balance_ranks: bool = True
    """On several ranks: let those with less to do make completions of those with more; the completions are the same."""
    capture_steps: bool = True
    """On a GPU: capture decode steps as CUDA graphs and replay them; false launches kernel by kernel."""
    compile_layers: bool = False
    """On a GPU, for policies whose layers Atlas does not fuse itself: compile them with torch.compile, and use that if captured
    steps measure faster with it. Takes tens of seconds, once."""

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine.{name} must be at least 1, got {getattr(self, name)}")
        if self.kv_memory_gib is not None and self.kv_memory_gib <= 0:
            raise ValueError(f"engine.kv_memory_gib must be positive, or null for automatic, got {self.kv_memory_gib}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptConfig:
    """Expert settings of the adaptive drafter's retraining."""

    max_share: float = 0.05
    """Share of the time between two policy updates that retraining may take at most; it takes less where more does not pay."""
    tokens_per_update: int = 16_384
    """Without a trainer, whose updates it would follow, the drafter is retrained after so many generated tokens."""
    deterministic_steps: int = 2
    """Optimizer steps per update where clocks must not decide (`deterministic: true`)."""
    learning_rate: float = 5e-4
    """Of the drafter's own optimizer."""
    max_grad_norm: float = 1.0
    """The norm to which the drafter's gradients are clipped."""
    depth: int = 5
    """Of the drafts that it learns from."""
    max_tokens: int = 8192
    """Tokens of a rollout whose hidden states are kept, at most; completions are chosen at random."""
    rollouts_kept: int = 8
    """Rollouts, the newest, that an update learns from."""
    tolerance: float = 0.0
    """An update is undone if its drafter gets fewer tokens per step right on held-out completions, by more than this share."""
    intermediate_size: int | None = None
    """Of a new recurrent head's MLP; null takes the policy's hidden size."""

    def __post_init__(self) -> None:
        for name in ("tokens_per_update", "deterministic_steps", "depth", "max_tokens", "rollouts_kept"):
            if getattr(self, name) < 1:
                raise ValueError(f"adapt.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.max_share <= 1:
            raise ValueError(f"adapt.max_share must be a share above 0 and up to 1, got {self.max_share}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"adapt.{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"adapt.tolerance must be at least 0 and below 1, got {self.tolerance}")
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ValueError(f"adapt.intermediate_size must be at least 1, or null, got {self.intermediate_size}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AtlasConfig:
    """What a user may set. Every default is meant to be left alone."""

    speculate: bool = True
    """False: plain decoding by the same engine. The tokens are the same either way."""
    drafters: str | tuple[str, ...] = "auto"
    """`auto`, or the names of the drafters to use: suffix (counts what was said before), recurrent (adaptive: retrained with the
    policy), static (frozen)."""
    static_drafter: str | None = None
    """Folder (or hub id) of the static drafter: one made by `atlas-rl drafter train`, an EAGLE-3 checkpoint of SpecForge or
    speculators, or a small language model with the same tokenizer. null takes the folder `drafter` beside the policy, if any."""
    retrain: str = "every_update"
    """When the adaptive drafter is retrained: every_update, on_drift (only when it has become worse), never."""
    lookahead: int | None = None
    """Draft tokens per step; None follows the drafter's own confidence and the measured step times."""
    deterministic: bool = False
    """Take every decision from counts, never from clocks, so that a resumed run repeats an uninterrupted one."""
    log_path: str | None = None
    """Where `rollouts.jsonl` goes; None puts it into the trainer's output_dir (nowhere for a bare model)."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Expert settings of the engine."""
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    """Expert settings of retraining."""

    def __post_init__(self) -> None:
        if self.retrain not in RETRAIN:
            raise ValueError(f"retrain is {self.retrain!r}: choose one of {', '.join(RETRAIN)}")
        if self.lookahead is not None and self.lookahead < 0:
            raise ValueError(f"lookahead must be null (automatic), 0 (off) or positive, got {self.lookahead}")
        if self.drafters == "auto":
            return
        names = (self.drafters,) if isinstance(self.drafters, str) else tuple(self.drafters)
        unknown = [name for name in names if name not in DRAFTER_NAMES]
        if unknown or not names:
            raise ValueError(
                f"drafters names {unknown or 'nothing'}: give 'auto' or some of {', '.join(DRAFTER_NAMES)}"
            )
        object.__setattr__(self, "drafters", names)

    @property
    def drafter_names(self) -> tuple[str, ...]:
        """The drafters to build; empty when speculation is off."""
        if not self.speculate or self.lookahead == 0:
            return ()
        return self.drafters if isinstance(self.drafters, tuple) else DRAFTER_NAMES

    @classmethod
    def from_dict(cls, values: dict[str, Any] | None) -> AtlasConfig:
        """Build from nested plain values; None gives the defaults.

        Raises:
            ValueError: `values` holds an unknown field, or a value of the wrong type or out of range; it is named.
        """
        return _build(cls, values or {}, prefix="")

    @classmethod
    def from_yaml(cls, path: str | Path) -> AtlasConfig:
        """Read the YAML that `to_yaml` writes, or one with some of its fields.

        Raises:
            ValueError: the file at `path` cannot be read, is no YAML, or holds what `from_dict` refuses.
        """
        return cls.from_dict(read_yaml(path))

    def to_yaml(self, path: str | Path) -> None:
        """Write every field to the file at `path`."""
        import yaml

        values = asdict(self)
        if isinstance(self.drafters, tuple):
            values["drafters"] = list(self.drafters)
        Path(path).write_text(yaml.safe_dump(values, sort_keys=False))


def shipped_configs(folder: str = "") -> dict[str, Path]:
    """Those that come with Atlas-RL, by the names that `--config` (and `--accelerate_config` those of `accelerate`) takes."""
    return {path.stem: path for path in sorted((CONFIGS / folder).glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The path of a file, or of a shipped config; a `ValueError` names these where there is neither."""
    shipped = shipped_configs()
    if name in shipped and not Path(name).is_file():
        return shipped[name]
    if not Path(name).exists():
        raise ValueError(
            f"config file {name} does not exist: check the path, or name one that comes with Atlas-RL: {', '.join(shipped)}"
        )
    return Path(name)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; a `ValueError` says what is wrong with it, and where."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"config file {path} does not exist: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config file {path} is not valid YAML: {error}") from None
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"config file {path} must hold `field: value` lines, not a {type(values).__name__}")
    return values or {}


def _as_float(value: Any) -> Any:
    """Also of `1e-4`, which YAML takes for a text; what is no number is left for dacite to name."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """Dataclass from plain values, recursively. dacite checks types; this adds field names to its messages."""
    import dacite

    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'atlas'} must be a mapping of fields, got {values!r}")
    known = {f.name for f in fields(cls)}
    for name in values:
        if name not in known:
            raise ValueError(f"unknown field {prefix}{name}: known are {', '.join(sorted(known))}")
    hints = get_type_hints(cls)
    built = {k: _build(hints[k], v, f"{prefix}{k}.") if is_dataclass(hints[k]) else v for k, v in values.items()}
    try:
        return dacite.from_dict(cls, built, config=dacite.Config(cast=[tuple], type_hooks={float: _as_float}))
    except dacite.WrongTypeError as error:
        expected = str(error.field_type).replace("<class '", "").replace("'>", "")
        raise ValueError(f"{prefix}{error.field_path} must be {expected}, got {error.value!r}") from None
