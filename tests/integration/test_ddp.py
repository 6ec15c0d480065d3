"""Two processes over gloo: one run, distinct completions, equal weights, one log, and no rank waits for another to decode."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

from ddp_worker import record
from recipes import make_trainer

from atlas_rl import AtlasRolloutGenerator

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tiny_policy, tmp_path_factory) -> tuple[Path, list[dict]]:
    """Output folder, and what each rank saw. The folder holds an earlier run's log."""
    output_dir = tmp_path_factory.mktemp("ddp")
    (output_dir / "rollouts.jsonl").write_text('{"kind": "step"}\n')
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    paths = [str(TESTS), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(TESTS / "ddp_worker.py"), str(tiny_policy), str(output_dir)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the workers too
        raise
    assert process.returncode == 0, errors[-3000:]
    return output_dir, [json.loads((output_dir / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_end_with_equal_weights(run):
    _, (first, second) = run
    assert first["weights"] == second["weights"]


def test_a_group_that_straddles_ranks_has_distinct_completions(run):
    """Two rows a rank, four samples a prompt."""
    _, (first, second) = run
    for step in (0, 1):
        assert len(set(first["prompts"][step] + second["prompts"][step])) == 1
        completions = first["completions"][step] + second["completions"][step]
        assert len({tuple(ids) for ids in completions}) == 4


def test_two_ranks_make_the_completions_of_one(run, tiny_policy, tmp_path):
    _, (first, second) = run
    atlas = AtlasRolloutGenerator()
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 1}
    trainer = make_trainer("GRPOTrainer", tiny_policy, tmp_path, [atlas], **options)
    prompts, completions = record(trainer)
    trainer.train()
    atlas.detach()
    assert first["prompts"][0] + second["prompts"][0] == prompts[0]
    assert first["completions"][0] + second["completions"][0] == completions[0]


def test_both_ranks_write_one_log_and_an_earlier_one_is_kept(run):
    """Also where rank 0 comes late; and rank 0 generated twice more than rank 1 in the end."""
    output_dir, _ = run
    assert (output_dir / "rollouts.1.jsonl").read_text() == '{"kind": "step"}\n'
    rows = [json.loads(line) for line in (output_dir / "rollouts.jsonl").read_text().splitlines()]
    places = [(row["rank"], row["step"], row["call"]) for row in rows if row["kind"] == "rollout"]
    in_training = [(rank, step, 0) for rank in (0, 1) for step in (0, 1)]
    assert sorted(places) == sorted([*in_training, (0, 2, 0), (0, 2, 1), (0, 2, 2), (1, 2, 0)])
    steps = [(row["rank"], row["step"]) for row in rows if row["kind"] == "step"]
    assert sorted(steps) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert not any("fallback" in row or "error" in row for row in rows)
