"""What a bench runs: a policy, prompts, and a length for every completion, the same for each arm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from atlas_rl.bench import ARM_NAMES, is_arm
from atlas_rl.bench.deepened import deepened, random_policy
from atlas_rl.bench.judging import STEP
from atlas_rl.integrations.hf_generate import token_ids
from atlas_rl.types import RolloutRequest, SamplingParams

SAMPLING = SamplingParams(temperature=1.0, ignore_eos=True)
"""Lengths are forced, so EOS is a token like any other."""
RANDOM_PROMPT_TOKENS = 32
RECORDING = Path(__file__).parent / "draining.json"
"""The shipped policy's own completion lengths at its sampling settings, made by `record_lengths`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
    """One batch of completions."""

    name: str
    num_prompts: int
    num_samples: int = 1
    """Completions per prompt; they share the prompt's prefill."""
    prompt_tokens: int | None = None
    """Length of every prompt: the shipped policy gets its tasks' texts one after another, any other policy random tokens. null:
    one task's text, or 32 random tokens."""
    new_tokens: int | None = 128
    """Length of every completion; null takes the recorded lengths of the shipped policy, another batch at every repeat."""
    warm: int = 0
    """Untimed batches that a drafter learns from before it is timed, and lives on through the repeats as it does through the
    steps of a training run; 0: it starts every repeat from nothing."""
    training: dict[str, Any] | None = None
    """GRPOConfig's fields of a run that moves the policy, `num_prompts` x `num_samples` completions at each of its `max_steps`.
    It is recorded first, and then every arm makes its rollouts, step after step, each with that step's weights; drafters live on
    through the run. null: the policy stays as it is."""
    arms: list[str] | None = None
    """Only these take part; null: all."""
    expect: dict[str, float] = field(default_factory=dict)
    """What to judge: `arm/arm` is at least this, `step_over_linears` (a plain decode step over its own linears) at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """`atlas-rl bench`: one YAML."""

    model: str | dict[str, Any] = "shipped"
    """`shipped`, a folder or hub id, or a transformers config (`model_type: qwen3`, …) for random weights."""
    added_layers: int = 0
    """Layers put behind the policy's own that change nothing (what they would add is zero): the same completions and drafters,
    from steps that take as much longer as those of a policy so much larger."""
    workloads: list[WorkloadConfig] = field(default_factory=list)
    min_repeats: int = 6
    """Fewer cannot give a 95 % interval of a median."""
    max_repeats: int = 40
    max_seconds: float = 600.0
    """Shared by the workloads; what is undecided when a workload's share is spent is called so."""
    threads: int | None = None
    """torch's intra-op threads, for all arms; null leaves them alone."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchConfig:
        """A `ValueError` names an unknown field, or a value that makes no sense."""
        import dacite

        try:
            config = dacite.from_dict(cls, values, config=dacite.Config(strict=True, type_hooks={float: float}))
        except dacite.DaciteError as error:
            raise ValueError(f"bench config: {error}") from None
        if not config.workloads:
            raise ValueError("bench config: workloads is empty: list at least one {name, num_prompts, …}")
        if not 1 <= config.min_repeats <= config.max_repeats:
            raise ValueError(
                f"bench config: 1 <= min_repeats <= max_repeats must hold, got {config.min_repeats} and {config.max_repeats}"
            )
        if config.added_layers < 0:
            raise ValueError(f"bench config: added_layers must be at least 0, got {config.added_layers}")
        for workload in config.workloads:
            _check_training(workload, config)
            least = {"num_prompts": 1, "num_samples": 1, "prompt_tokens": 1, "new_tokens": 1, "warm": 0}
            for name, bound in least.items():
                value = getattr(workload, name)
                if value is not None and value < bound:
                    raise ValueError(
                        f"bench config: workload {workload.name}: {name} must be at least {bound}, got {value}"
                    )
            for name in workload.arms or ():
                if not is_arm(name):
                    raise ValueError(
                        f"bench config: workload {workload.name}: arms names {name!r}: known are {', '.join(ARM_NAMES)}"
                    )
            for key in workload.expect:
                if key != STEP and not (key.count("/") == 1 and all(map(is_arm, key.split("/")))):
                    raise ValueError(
                        f"bench config: workload {workload.name}: expect knows {STEP} and arm/arm, not {key!r} "
                        f"(arms: {', '.join(ARM_NAMES)})"
                    )
        return config

    def only(self, names: list[str]) -> BenchConfig:
        """With these workloads alone."""
        known = [workload.name for workload in self.workloads]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"--workloads names {', '.join(unknown)}: this config has {', '.join(known)}")
        return replace(self, workloads=[workload for workload in self.workloads if workload.name in names])


def _check_training(workload: WorkloadConfig, bench: BenchConfig) -> None:
    if workload.training is None:
        return
    problem = None
    if isinstance(bench.model, dict):
        problem = "training needs a policy with a tokenizer, as its prompts are the shipped tasks: not random weights"
    elif bench.added_layers:
        problem = "training moves the policy as it is: set added_layers to 0, or leave this workload out"
    elif workload.new_tokens is not None or workload.warm or workload.prompt_tokens is not None:
        problem = "with training, new_tokens has to be null, warm 0 and prompt_tokens absent: the run has its own"
    elif workload.training.get("max_steps", 0) < 1:
        problem = "training needs max_steps of at least 1"
    if problem is not None:
        raise ValueError(f"bench config: workload {workload.name}: {problem}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The completions of one repeat, prompt-major."""

    prompts: list[tuple[int, ...]]
    seeds: list[int]
    lens: list[int]
    own: SamplingParams | None = None
    """How the policy itself came to these lengths: its EOS, and the most tokens of a completion; None: they are merely given."""
    weights: dict[str, torch.Tensor] | None = None
    """Of the policy that makes them; None: it stays as it is."""
    training_seconds: float = 0.0
    """What training took between the batch before this one and this one."""

    @property
    def num_tokens(self) -> int:
        return sum(self.lens)

    def requests(self) -> list[RolloutRequest]:
        return [
            RolloutRequest(prompt_ids=prompt, seed=seed, max_new_tokens=length)
            for prompt, seed, length in zip(self.prompts, self.seeds, self.lens, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    config: WorkloadConfig
    batches: list[Batch]
    """No completion is in two of them."""

    def batch(self, repeat: int) -> Batch:
        """Of a counted repeat (1, 2, …); the round before them, which is not counted, is repeat 0."""
        return self.batches[self.config.warm + max(0, repeat - 1) % self._per_pass]

    def starts_over(self, repeat: int) -> bool:
        """Whether drafters are to begin from nothing before this repeat: nothing may be drafted that was learned by heart."""
        lives_on = self.config.warm > 0 or self.moves
        return not lives_on or repeat == 0 or (repeat - 1) % self._per_pass == 0

    @property
    def moves(self) -> bool:
        """Whether its repeats are the steps of a run in which the policy moves."""
        return self.config.training is not None

    @property
    def warm_batches(self) -> list[Batch]:
        """What drafters learn from, untimed, once they have begun from nothing."""
        return self.batches[: self.config.warm]

    @property
    def _per_pass(self) -> int:
        return len(self.batches) - self.config.warm


def load_policy(model: str | dict[str, Any], added_layers: int = 0) -> PreTrainedModel:
    """The policy in float32, in eval mode; `added_layers` as in `BenchConfig`."""
    if isinstance(model, dict):
        policy = random_policy(AutoConfig.for_model(**model))
    else:
        if model == "shipped":
            from atlas_rl.tasks import policy_path

            model = policy_path()
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return deepened(policy, added_layers) if added_layers else policy


def build_workload(
    config: WorkloadConfig,
    bench: BenchConfig,
    policy: PreTrainedModel,
    report: Callable[[str], None] = lambda _: None,
) -> Workload:
    if config.training is not None:
        from atlas_rl.bench.moving import moving_batches

        return Workload(config=config, batches=moving_batches(config, policy.config._name_or_path, report))
    if config.new_tokens is None:
        return Workload(config=config, batches=_recorded_batches(config, bench, policy))
    if bench.model == "shipped":
        prompts = shipped_prompts(config.num_prompts, config.prompt_tokens)
    else:
        prompts = _random_prompts(config, policy, seed=0)
    prompts = [prompt for prompt in prompts for _ in range(config.num_samples)]
    batches = [
        Batch(
            prompts=prompts,
            seeds=[index * 1_000_003 + i for i in range(len(prompts))],
            lens=[config.new_tokens] * len(prompts),
        )
        for index in range(config.warm + bench.max_repeats)
    ]
    return Workload(config=config, batches=batches)


def _recorded_batches(config: WorkloadConfig, bench: BenchConfig, policy: PreTrainedModel) -> list[Batch]:
    """The recorded batches, or as many of their prompts and samples as the workload has."""
    recorded = json.loads(RECORDING.read_text())
    if bench.model == "shipped" and recorded["policy_sha256"] != policy_sha256():
        raise ValueError(
            f"{RECORDING} was recorded from another policy than the shipped one: run `python -m atlas_rl.bench.record_lengths`"
        )
    num_prompts, num_samples = recorded["num_prompts"], recorded["num_samples"]
    if config.num_prompts > num_prompts or config.num_samples > num_samples:
        raise ValueError(
            f"bench config: workload {config.name}: lengths are recorded for {num_prompts} prompts of {num_samples} samples: "
            "ask for no more, or give new_tokens"
        )
    if config.warm >= len(recorded["batches"]):
        raise ValueError(
            f"bench config: workload {config.name}: warm must be below the {len(recorded['batches'])} recorded batches"
        )
    rows = [i * num_samples + j for i in range(config.num_prompts) for j in range(config.num_samples)]
    own = None
    if bench.model == "shipped":
        eos_ids = token_ids(policy.generation_config.eos_token_id)
        own = SamplingParams(**recorded["sampling"], eos_token_ids=eos_ids)
    batches = []
    for index, row in enumerate(recorded["batches"]):
        prompts = [tuple(prompt) for prompt in row["prompts"]]
        if bench.model != "shipped":  # whose vocabulary is its own
            prompts = _random_prompts(config, policy, seed=index)
        batches.append(
            Batch(
                prompts=[prompts[i // num_samples] for i in rows],
                seeds=[row["seeds"][i] for i in rows],
                lens=[row["lens"][i] for i in rows],
                own=own,
            )
        )
    return batches


def _random_prompts(config: WorkloadConfig, policy: PreTrainedModel, seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    dims = (config.num_prompts, config.prompt_tokens or RANDOM_PROMPT_TOKENS)
    return [tuple(row) for row in torch.randint(0, policy.config.vocab_size, dims, generator=generator).tolist()]


def shipped_prompts(num_prompts: int, num_tokens: int | None = None) -> list[tuple[int, ...]]:
    """Token ids of prompts from the shipped tasks; with `num_tokens`, as many tasks before each as give it that length."""
    from transformers import AutoTokenizer

    from atlas_rl.tasks import build_dataset, policy_path

    tokenizer = AutoTokenizer.from_pretrained(policy_path())

    def tasks(num: int, seed: int) -> list[tuple[int, ...]]:
        return [tuple(tokenizer(text)["input_ids"]) for text in build_dataset(num, seed=seed)["prompt"]]

    if num_tokens is None:
        return tasks(num_prompts, seed=1)
    # a task has at least one token
    return [tuple(chain.from_iterable(tasks(num_tokens, seed=1 + i)))[-num_tokens:] for i in range(num_prompts)]


def policy_sha256() -> str:
    """Of the shipped policy's weights."""
    from atlas_rl.tasks import policy_path

    return hashlib.sha256((Path(policy_path()) / "model.safetensors").read_bytes()).hexdigest()
