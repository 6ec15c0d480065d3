"""What a user's type checker makes of the public API: read by mypy (`make lint`), never run."""

from pathlib import Path

from transformers import PreTrainedModel
from trl import GRPOTrainer
from typing_extensions import assert_type

import atlas_rl
from atlas_rl import (
    AdaptConfig,
    AtlasConfig,
    AtlasRolloutGenerator,
    EngineConfig,
    Rollout,
    SamplingParams,
    last_complete_checkpoint,
)
from atlas_rl.deepspeed import AtlasRollout

config = AtlasConfig(
    drafters=("suffix", "static"), engine=EngineConfig(kv_memory_gib=2.0), adapt=AdaptConfig(max_share=0.1)
)
assert_type(AtlasConfig.from_yaml("atlas.yaml"), AtlasConfig)
assert_type(atlas_rl.__version__, str)
# wrong on purpose: mypy complains of an ignored error that is none
atlas_rl.AtlasConfg  # type: ignore[attr-defined]  # noqa: B018
AtlasConfig(speculate="yes")  # type: ignore[arg-type]
AtlasConfig().speculate = False  # type: ignore[misc]


def on_a_model(model: PreTrainedModel) -> list[str]:
    with AtlasRolloutGenerator(config).attach(model) as atlas:
        assert_type(atlas, AtlasRolloutGenerator)
        rollouts = atlas.generate([[1, 2, 3]], SamplingParams(temperature=0.8, max_new_tokens=(8, 9)), num_samples=2)
        assert_type(rollouts, list[Rollout])
        assert_type(rollouts[0].logprobs, list[float])
        assert_type(atlas.stats.completion_tokens, int)
    return [rollout.finish_reason for rollout in rollouts]


def on_a_trainer(trainer: GRPOTrainer) -> None:
    atlas = AtlasRolloutGenerator().attach(trainer, logprobs=True)
    atlas.detach()
    assert_type(last_complete_checkpoint("runs/mine"), Path | None)


def in_a_loop(rollout: AtlasRollout) -> None:
    rollout.sync_weights(step=1)
    rollout.save(Path("checkpoint"))
