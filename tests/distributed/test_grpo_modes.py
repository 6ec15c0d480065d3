"""GRPO through Atlas on two processes, in each way of distributing a policy: one process' tokens, and a model left alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("deepspeed")
pytest.importorskip("peft")

import torch
from ddp_worker import record
from grpo_ranks_worker import LEARNING, trainer_parts
from launching import launch_ranks
from recipes import make_trainer, rollout_rows, save_tiny_policy

from atlas_rl import AtlasRolloutGenerator

QUICK = ["zero3", "zero2_lora"]
"""In `make test`; that trainers of DDP work is seen in integration/test_ddp.py."""
LONGER = ["ddp", "zero1", "zero2", "fsdp2", "zero3_lora", "fsdp2_lora"]
MODES = [*QUICK, *(pytest.param(mode, marks=pytest.mark.distributed) for mode in LONGER)]
ROWS = 12
"""In a batch, of four each that share a prompt: one prompt's are on both ranks."""


@dataclass
class Run:
    mode: str
    folder: Path
    seen: list[dict[str, Any]]
    """By rank."""
    output: str

    @property
    def completions(self) -> list[list[list[int]]]:
        return [sum(of_step, []) for of_step in zip(*(seen["completions"] for seen in self.seen), strict=True)]


def options(mode: str) -> dict[str, Any]:
    """LoRA takes more steps and longer ones: its matrices start at zero."""
    longer = {"max_steps": 20, "learning_rate": 5.0} if mode.endswith("_lora") else {}
    return LEARNING | {"model_init_kwargs": {"dtype": "auto"}} | longer


def launch(
    mode: str,
    policy: Path,
    folder: Path,
    ok: bool = True,
    timeout: float = 240,
    num_ranks: int = 2,
    **arguments: Any,
) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(arguments)
    output = launch_ranks(
        "grpo_ranks_worker.py", policy, folder, mode, text, timeout=timeout, ok=ok, num_ranks=num_ranks
    )
    seen = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)] if ok else []
    return Run(mode, folder, seen, output)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """In float64, where a sum's order shows in no token (ZeRO-3 makes it float32)."""
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), torch.float64)


@pytest.fixture(scope="module", params=MODES)
def run(request, policy, tmp_path_factory) -> Run:
    mode = request.param
    batch = {"per_device_train_batch_size": ROWS // 2}
    return launch(mode, policy, tmp_path_factory.mktemp(mode), options=options(mode) | batch)


@pytest.fixture(scope="module")
def alone(policy, tmp_path_factory):
    """Of a mode, what one process makes: prompts and completions of each rollout."""
    made: dict[str, Any] = {}

    def of(mode: str) -> tuple[list[list[str]], list[list[list[int]]]]:
        kind = "lora" if mode.endswith("_lora") else "full"
        if kind not in made:
            atlas, folder = AtlasRolloutGenerator(), tmp_path_factory.mktemp(kind)
            arguments = options(mode) | {"per_device_train_batch_size": ROWS}
            trainer = make_trainer(
                "GRPOTrainer", policy, folder, [atlas], trainer_parts("GRPOTrainer", mode), **arguments
            )
            made[kind] = record(trainer)
            trainer.train()
            atlas.detach()
            assert not any("fallback" in row for row in rollout_rows(folder))
        return made[kind]

    return of


def test_two_ranks_make_the_tokens_of_one(run, alone):
    """Of all rollouts in float64: with plain SGD the weights differ by sums' rounding alone. ZeRO's optimizer keeps float32
    weights, whose rounding comes to show."""
    prompts, completions = alone(run.mode)
    assert [first + second for first, second in zip(*(seen["prompts"] for seen in run.seen))] == prompts
    assert run.completions[0] == completions[0]
    num_equal = 8 if run.mode.startswith("zero") else len(completions)
    assert run.completions[:num_equal] == completions[:num_equal]
    assert len({tuple(ids) for ids in completions[0]}) == ROWS, "distinct seeds"


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["ddp", "zero2"])
def test_four_ranks_make_the_tokens_of_one(mode, policy, alone, tmp_path):
    batch = {"per_device_train_batch_size": ROWS // 4}
    deterministic = {"deterministic": True}
    run = launch(mode, policy, tmp_path, num_ranks=4, timeout=400, options=options(mode) | batch, atlas=deterministic)
    assert run.completions == alone(mode)[1]
    assert len({seen["weights"] for seen in run.seen}) == 1


def test_rewards_rise(run):
    rewards = run.seen[0]["rewards"]
    third = len(rewards) // 3
    assert sum(rewards[-third:]) / third > sum(rewards[:third]) / third + 0.05


def test_every_rollout_goes_through_atlas(run):
    rows = rollout_rows(run.folder)
    assert not any("fallback" in row or "error" in row for row in rows)
    steps = len(run.completions)
    train = sorted((row["rank"], row["step"], row["call"]) for row in rows)
    later = [(0, steps, 0), (0, steps, 1), (0, steps, 2), (1, steps, 0)]
    assert train == sorted([(rank, step, 0) for rank in (0, 1) for step in range(steps)] + later)


def test_a_rollout_leaves_the_model_alone(run):
    """Weights, dtypes, hooks, flags, training mode and random numbers; and detaching the rest."""
    for seen in run.seen:
        assert seen["changes"] == [] and seen["is_detached"]
        assert seen["frozen"][0] == seen["frozen"][1], "the base of an adapted model"
        assert seen["gathers_for_generation"] == [False, True], "TRL's own gathering, while attached and later"


def test_ranks_end_with_equal_weights(run):
    assert run.seen[0]["weights"] == run.seen[1]["weights"]


def test_a_sharded_policy_is_gathered_once_per_update(run):
    is_sharded = run.mode.startswith(("zero3", "fsdp2"))
    for seen in run.seen:
        in_training = [seen["gathered"].get(str(step), []) for step in range(len(run.completions))]
        assert in_training == [[1] * (seen["num_parameters"] * is_sharded)] * len(run.completions)


def test_no_collective_in_decoding(run):
    for seen in run.seen:
        assert seen["decode_steps"] > len(run.completions) and seen["collectives_in_decoding"] == {}


@pytest.mark.parametrize("mode", ["zero3", *(pytest.param(m, marks=pytest.mark.distributed) for m in ("ddp", "fsdp2"))])
def test_a_rank_that_fails_in_mid_rollout_ends_the_run_with_its_error(mode, policy, tmp_path):
    """Long before the group's timeout."""
    arguments = LEARNING | {"per_device_train_batch_size": ROWS // 2}
    output = launch(mode, policy, tmp_path, ok=False, timeout=90, options=arguments, fails_at=1).output
    first = [line for line in output.splitlines() if line.startswith("[rank0]")]
    assert any("rank 1 failed" in line and "too much for this rank" in line for line in first), output[-3000:]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["GKDTrainer", "GOLDTrainer", "IWOPDTrainer"])
def test_trainers_that_always_gather_by_themselves(name, policy, tmp_path):
    """Atlas copies from inside their gather: a second one would not be allowed to overlap it. (TRL's A2PO, which gathers as well,
    refuses ZeRO-3.)"""
    run = launch("zero3", policy, tmp_path, trainer_name=name)
    rows = rollout_rows(run.folder)
    assert {(row["rank"], row["step"]) for row in rows} == {(rank, step) for rank in (0, 1) for step in (0, 1)}
    assert not any("fallback" in row or "error" in row for row in rows)
    assert run.seen[0]["weights"] == run.seen[1]["weights"]
    assert all(seen["changes"] == [] and seen["collectives_in_decoding"] == {} for seen in run.seen)
