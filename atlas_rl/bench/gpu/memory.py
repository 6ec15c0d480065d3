"""Section `memory`: many short rollouts with changing weights take no more and more, and leave no KV memory behind."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from atlas_rl.adapt.adaptation import Adaptation
from atlas_rl.bench.gpu.section import Section
from atlas_rl.bench.workload import SAMPLING, Batch, BenchConfig, WorkloadConfig, build_workload, load_policy
from atlas_rl.config import AtlasConfig
from atlas_rl.drafters import build_drafters
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import RolloutRequest, SamplingParams

SETTLED = 10
"""Rollouts after which everything that is kept has been made: graphs, workspaces, what drafters learn from."""
SLACK, LEFT = 32 * 2**20, 256 * 2**20
"""Bytes that may be added once all has settled, and that a first rollout may leave beside its KV (workspaces of libraries)."""
LARGE_MODEL = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""Little to compute, and much to keep: 32 KiB of KV per token in bf16."""


def run(section: Section) -> None:
    kept = section.part("small policy", lambda: small_policy(section), needs=8)
    section.judge(
        "growth of allocated MiB over rollouts", kept and kept["growth_mib"]["allocated"], SLACK / 2**20, at_least=False
    )
    section.judge(
        "growth of reserved MiB over rollouts", kept and kept["growth_mib"]["reserved"], SLACK / 2**20, at_least=False
    )
    section.machine.release()
    large = section.part("much KV", lambda: much_kv(section), needs=8)
    section.judge("rollouts over much KV: MiB left behind", large and large["left_mib"], LEFT / 2**20, at_least=False)


def small_policy(section: Section) -> dict[str, Any]:
    """Every drafter, retrained at every update; KV and graphs are small enough to be kept."""
    policy, plan = load_policy("shipped").to(section.machine.device, torch.bfloat16), section.plan
    config, view = AtlasConfig(), PolicyView(policy)
    drafters = build_drafters(config, view)
    engine = RolloutEngine(view, config, drafters.all, graphs=section.machine.graphs)
    Adaptation(config, drafters).attach(engine)
    recorded = build_workload(
        WorkloadConfig(name="memory", num_prompts=plan.draining_prompts, num_samples=8, new_tokens=None),
        BenchConfig(),
        policy,
    ).batches
    used = []
    for index in range(plan.kept_rollouts):
        batch = recorded[index % len(recorded)]
        short = Batch(
            prompts=batch.prompts, seeds=[s + index for s in batch.seeds], lens=[min(n, 24) for n in batch.lens]
        )
        engine.generate(short.requests(), SAMPLING)
        _update(policy, index)
        used.append(section.machine.memory())
        if section.seconds_left < 5 and index > 2 * SETTLED:
            break
    return {"rollouts": len(used), "growth_mib": _growth(used), "mib": _mib(used)}


def much_kv(section: Section) -> dict[str, Any]:
    """Rollouts that ask for far more KV than is kept, and end after a few tokens: half of all tokens stop them."""
    machine, plan = section.machine, section.plan
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LARGE_MODEL)).to(machine.device, torch.bfloat16)
    engine = RolloutEngine(PolicyView(policy.eval()), AtlasConfig(speculate=False), graphs=machine.graphs)
    sampling = SamplingParams(eos_token_ids=tuple(range(0, 64, 2)), max_new_tokens=plan.large_tokens)
    used, kv_bytes = [machine.memory()], 0
    for index in range(plan.large_rollouts):
        requests = [
            RolloutRequest(prompt_ids=(1 + row % 60, 3, 5), seed=1000 * index + row, max_new_tokens=plan.large_tokens)
            for row in range(plan.large_rows)
        ]
        engine.generate(requests, sampling)
        kv_bytes = engine.view.kv_shape(16).block_bytes * plan.large_rows * plan.large_tokens // 16
        _update(policy, index)
        used.append(machine.memory())
        if section.seconds_left < 5 and index > 2:
            break
    left = max(allocated for allocated, _ in used) - used[0][0]
    return {"rollouts": len(used) - 1, "kv_mib": kv_bytes / 2**20, "left_mib": left / 2**20, "mib": _mib(used)}


@torch.no_grad()
def _update(policy: PreTrainedModel, index: int) -> None:
    """A small change of all weights, in place."""
    for parameter in policy.parameters():
        parameter.mul_(1.0 + 2.0**-7 * (-1) ** index)


def _growth(used: list[tuple[int, int]]) -> dict[str, float]:
    settled = used[min(SETTLED, len(used) - 1)]
    late = used[-max(1, len(used) // 4) :]
    return {
        name: (max(row[i] for row in late) - settled[i]) / 2**20 for i, name in enumerate(("allocated", "reserved"))
    }


def _mib(used: list[tuple[int, int]]) -> dict[str, list[float]]:
    return {name: [round(row[i] / 2**20, 1) for row in used] for i, name in enumerate(("allocated", "reserved"))}
