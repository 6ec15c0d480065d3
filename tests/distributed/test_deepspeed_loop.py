"""examples/deepspeed_loop.py on two processes under ZeRO-3."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("deepspeed.runtime.rollout")
pytest.importorskip("reasoning_gym")

import torch
from deepspeed.runtime.rollout import RolloutRequest, SamplingConfig
from launching import launch_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from atlas_rl.deepspeed import AtlasRollout
from atlas_rl.tasks import build_dataset, policy_path

SIZE = ["--prompts", "2", "--samples", "3", "--max_new_tokens", "24", "--zero_stage", "3", "--deterministic"]


def run_loop(folder: Path, name: str, *arguments: object, killed_at: int = -1) -> tuple[list[list[dict]], str]:
    """What each rank saw, by call of generate, and what was printed."""
    seen = folder / name
    arguments = (seen, killed_at, *SIZE, "--output_dir", folder, *arguments)
    output = launch_ranks("deepspeed_loop_worker.py", *arguments, timeout=300, ok=killed_at < 0)
    return [list(map(json.loads, Path(f"{seen}.{rank}").read_text().splitlines())) for rank in (0, 1)], output


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory) -> tuple[Path, list[list[dict]]]:
    """Of four steps with a checkpoint after the second; dies after the fourth's rollout."""
    folder = tmp_path_factory.mktemp("loop")
    seen, _ = run_loop(folder, "killed", "--steps", 4, "--save_steps", 2, killed_at=3)
    assert [row["step"] for row in seen[0]] == [0, 1, 2, 3]
    return folder, seen


@pytest.fixture(scope="module")
def resumed_run(killed_run) -> tuple[list[list[dict]], str]:
    return run_loop(killed_run[0], "resumed", "--steps", 4, "--resume")


@pytest.mark.distributed
def test_the_first_rollout_is_that_of_one_process(killed_run):
    """With all ranks' prompts in turn, and the same seed."""
    model = AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(policy_path(), padding_side="left")
    engine = SimpleNamespace(module=model, global_steps=0, device=model.device, torch_autocast_enabled=lambda: False)
    alone = AtlasRollout(engine, tokenizer)
    inputs = tokenizer([row["prompt"] for row in build_dataset(4, seed=0)], return_tensors="pt", padding=True)
    sampling = SamplingConfig(max_new_tokens=24, n_samples_per_prompt=3)
    batch = alone.generate(RolloutRequest(inputs.input_ids, inputs.attention_mask), sampling)
    alone.shutdown()
    width = inputs.input_ids.shape[1]
    lengths = batch.attention_mask[:, width:].sum(1)
    expected = [ids[width : width + n].tolist() for ids, n in zip(batch.input_ids, lengths)]
    first, second = (seen[0]["completions"] for seen in killed_run[1])
    assert first + second == expected


@pytest.mark.distributed
def test_a_killed_loop_goes_on_from_its_checkpoint_with_the_same_completions(killed_run, resumed_run):
    """And the same drafts: what the drafters have learned is taken up too."""
    for before, after in zip(killed_run[1], resumed_run[0]):
        assert after[:2] == before[2:]
        assert any(row["drafters"] for row in after[:2])


@pytest.mark.distributed
def test_ranks_stay_equal_and_gather_once_per_update(resumed_run):
    first, second = (seen[-1] for seen in resumed_run[0])
    assert first["weights"] == second["weights"]
    assert first["gathers"] == second["gathers"] == 3  # two steps, and the rollout after the last one
    assert first["uneven"][0] == 2 and second["uneven"][0] == 0
    assert (
        "padded on the left" in first["refused"] and first["refused"] == second["refused"]
    )  # as it was rank 1's fault


@pytest.mark.distributed
def test_the_log_has_the_figures_of_a_trainers_run(killed_run, resumed_run):
    """In one file, over the kill; and the loop ends with their table."""
    folder, (_, output) = killed_run[0], resumed_run
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    steps = sorted((row["step"], row["rank"]) for row in rows if row["kind"] == "step")
    assert steps == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 0), (3, 1), (3, 1), (4, 0), (4, 1)]
    rollouts = [row for row in rows if row["kind"] == "rollout"]
    assert all({"tokens_per_s", "rank_idle_s", "seconds"} <= row.keys() for row in rollouts if row["step"] < 4)
    assert not any("error" in row or "fallback" in row for row in rows)
    assert any(row.get("retrain", {}).get("updates") for row in rollouts)
    assert "step 4/4  reward" in output and "Rollouts of this run" in output
    assert f"Every rollout and step, with its figures: {folder / 'rollouts.jsonl'}" in output
