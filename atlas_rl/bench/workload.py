"""What a bench runs: a policy, prompts, and a length for every completion, the same for each arm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from atlas_rl.config import AtlasConfig
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import RolloutRequest, SamplingParams

SAMPLING = SamplingParams(temperature=1.0, ignore_eos=True)
"""Lengths are forced, so EOS is a token like any other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
    """One batch of completions."""

    name: str
    num_prompts: int
    num_samples: int = 1
    """Completions per prompt; they share the prompt's prefill."""
    prompt_tokens: int = 32
    """Length of random prompts; ignored where the shipped tasks give the prompts."""
    new_tokens: int | None = 128
    """Length of every completion; null takes the policy's own lengths, sampled once before the arms run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """`atlas-rl bench`: one YAML."""

    model: str | dict[str, Any] = "shipped"
    """`shipped`, a folder or hub id, or a transformers config (`model_type: qwen3`, …) for random weights."""
    workloads: list[WorkloadConfig] = field(default_factory=list)
    repeats: int = 5
    max_seconds: float = 600.0
    """No new repeat starts after this many seconds."""
    max_new_tokens: int = 512
    """Longest completion where lengths are the policy's own."""
    threads: int | None = None
    """torch's intra-op threads; null leaves them alone."""

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
        if config.repeats < 1:
            raise ValueError(f"bench config: repeats must be at least 1, got {config.repeats}")
        for workload in config.workloads:
            for name in ("num_prompts", "num_samples", "prompt_tokens", "new_tokens"):
                value = getattr(workload, name)
                if value is not None and value < 1:
                    raise ValueError(f"bench config: workload {workload.name}: {name} must be at least 1, got {value}")
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    config: WorkloadConfig
    prompts: list[tuple[int, ...]]
    """One per completion, prompt-major."""
    lens: list[int]

    def requests(self, repeat: int) -> list[RolloutRequest]:
        """Another repeat has other seeds, hence other completions: nothing can be learned by heart."""
        return [
            RolloutRequest(prompt_ids=prompt, seed=repeat * 1_000_003 + i, max_new_tokens=length)
            for i, (prompt, length) in enumerate(zip(self.prompts, self.lens, strict=True))
        ]


def load_policy(model: str | dict[str, Any]) -> PreTrainedModel:
    """The policy in float32, in eval mode."""
    if isinstance(model, dict):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**model)).float().eval()
    if model == "shipped":
        from atlas_rl.tasks import policy_path

        model = policy_path()
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def build_workload(config: WorkloadConfig, bench: BenchConfig, policy: PreTrainedModel) -> Workload:
    prompts = [p for p in _prompts(config, bench, policy) for _ in range(config.num_samples)]
    if config.new_tokens is not None:
        return Workload(config=config, prompts=prompts, lens=[config.new_tokens] * len(prompts))
    requests = [
        RolloutRequest(prompt_ids=prompt, seed=-1 - i, max_new_tokens=bench.max_new_tokens)
        for i, prompt in enumerate(prompts)
    ]
    eos = policy.generation_config.eos_token_id
    natural = replace(SAMPLING, ignore_eos=False, eos_token_ids=tuple(torch.as_tensor(eos).flatten().tolist()))
    rollouts = RolloutEngine(PolicyView(policy), AtlasConfig(speculate=False)).generate(requests, natural)
    return Workload(config=config, prompts=prompts, lens=[len(r.token_ids) for r in rollouts])


def _prompts(config: WorkloadConfig, bench: BenchConfig, policy: PreTrainedModel) -> list[tuple[int, ...]]:
    if bench.model == "shipped":
        return shipped_prompts(config.num_prompts)
    generator = torch.Generator().manual_seed(0)
    dims = (config.num_prompts, config.prompt_tokens)
    return [tuple(row) for row in torch.randint(0, policy.config.vocab_size, dims, generator=generator).tolist()]


def shipped_prompts(num_prompts: int) -> list[tuple[int, ...]]:
    """Token ids of prompts from the shipped tasks."""
    from transformers import AutoTokenizer

    from atlas_rl.tasks import build_dataset, policy_path

    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    return [tuple(tokenizer(text)["input_ids"]) for text in build_dataset(num_prompts, seed=1)["prompt"]]
